// What the kernels' source files offer to the dispatcher.
#pragma once

#include "../include/api.h"

namespace ck {
namespace cuda {

// A kernel with one block of kThreads for each tile, and its shared memory.
struct TileKernel {
  void (*kernel)(Panel);
  unsigned shared_bytes;
};

// The pair term, whether pairs have ids, weights have targets, and rows or columns have ceilings or a guide: these have
// kernels of their own, for which the usual ones pay nothing.
struct Kind {
  PairTerm term;
  bool ids, targets, capped = false;
};

// Over scores in memory.
TileKernel panel_pass(Kind kind, bool sums, bool weights);

// With the product of 16-bit operands; from sm_80 on, elsewhere it does nothing.
TileKernel tensor_cores(Kind kind, Dtype operands, bool sums, bool weights);

// Folds what the tiles' blocks left in the scratch into row and column states and dparams.
void launch_merge(const Panel& panel);

}  // namespace cuda
}  // namespace ck
