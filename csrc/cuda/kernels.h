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

TileKernel panel_pass(bool exponential, bool sums, bool weights);

// Folds what the tiles' blocks left in the scratch into row and column states and dparams.
void launch_merge(const Panel& panel);

}  // namespace cuda
}  // namespace ck
