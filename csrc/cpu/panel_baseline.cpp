// The panel loops for the compiler's default instruction set: the fallback on any machine.
#include "isa.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#include <cstdint>
#include <type_traits>

#include "../include/inline.h"

namespace ck {
namespace baseline {

#include "../include/dtype.h"
#include "../include/elementary.h"
#include "../terms/exponential.h"
#include "../terms/gumbel.h"
#include "../terms/sigmoid.h"
#include "pairs.h"
#include "panel_loops.h"
#include "search_loops.h"
#include "visit_loops.h"

}  // namespace baseline

const IsaTable kBaseline = {"baseline",           baseline::run_panel,  baseline::exp_run,      baseline::run_search,
                            baseline::gumbel_run, baseline::gather_run, baseline::visit_matrix, baseline::alike_run,
                            baseline::run_scaled};

}  // namespace ck
