// The panel loops for AVX2 and FMA.
#include "isa.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#include <cstdint>
#include <type_traits>

#include "../include/inline.h"

namespace ck {
namespace avx2 {

#include "../include/dtype.h"
#include "../include/elementary.h"
#include "../terms/exponential.h"
#include "../terms/gumbel.h"
#include "../terms/sigmoid.h"
#include "pairs.h"
#include "panel_loops.h"
#include "search_loops.h"
#include "visit_loops.h"

}  // namespace avx2

const IsaTable kAvx2 = {"avx2",           avx2::run_panel,    avx2::exp_run,   avx2::run_search, avx2::gumbel_run,
                        avx2::gather_run, avx2::visit_matrix, avx2::alike_run, avx2::run_scaled};

}  // namespace ck
