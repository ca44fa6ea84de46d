// The panel loops for AVX-512 (F, BW, DQ, VL).
#include "isa.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#include <cstdint>
#include <type_traits>

#include "../include/inline.h"

namespace ck {
namespace avx512 {

#include "../include/dtype.h"
#include "../include/elementary.h"
#include "../terms/exponential.h"
#include "../terms/gumbel.h"
#include "../terms/sigmoid.h"
#include "pairs.h"
#include "panel_loops.h"
#include "search_loops.h"
#include "visit_loops.h"

}  // namespace avx512

const IsaTable kAvx512 = {"avx512",           avx512::run_panel,  avx512::exp_run,      avx512::run_search,
                          avx512::gumbel_run, avx512::gather_run, avx512::visit_matrix, avx512::alike_run,
                          avx512::run_scaled};

}  // namespace ck
