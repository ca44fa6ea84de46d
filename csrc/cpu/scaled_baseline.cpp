// The loops over panels with scales by row and column for the baseline of the machine's architecture.
// In a file of their own: beside them gcc 12 inlines less of the plain loops, which lose 7 % of their speed.
#include "isa.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#include <cstdint>
#include <type_traits>

#include "../include/inline.h"

#pragma GCC diagnostic ignored "-Wunused-function"  // what other panels need

namespace ck {
namespace baseline {

#include "../include/dtype.h"
#include "../include/elementary.h"
#include "../terms/exponential.h"
#include "../terms/sigmoid.h"
#include "pairs.h"
#include "panel_loops.h"
#include "scaled_loops.h"

}  // namespace baseline
}  // namespace ck
