// The panel loops for the compiler's default instruction set: the fallback on any machine.
#include "isa.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>

namespace ck {
namespace baseline {

#include "../include/pair_terms.h"
#include "../include/dtype.h"
#include "panel_loops.h"

}  // namespace baseline

const IsaTable kBaseline = {"baseline", baseline::run_panel, baseline::exp_run};

}  // namespace ck
