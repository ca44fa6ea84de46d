// One pass over scores that lie in memory [rows, cols], whoever multiplied them: the portable route.
#include "epilogue.h"
#include "kernels.h"

namespace ck {
namespace cuda {

extern __shared__ __align__(16) unsigned char shared_memory[];

template <bool EXPONENTIAL, bool SUMS, bool WEIGHTS>
__global__ __launch_bounds__(kThreads, 2) void panel_pass_kernel(const __grid_constant__ Panel p) {
  const TilePlace tile(p, blockIdx.x);
  const ThreadPlace mine;
  Scores scores;
  load_scores(p, tile, mine, scores);
  finish_tile<EXPONENTIAL, SUMS, WEIGHTS>(p, tile, mine, scores, *reinterpret_cast<EpilogueMemory*>(shared_memory));
}

TileKernel panel_pass(bool exponential, bool sums, bool weights) {
  const unsigned bytes = sizeof(EpilogueMemory);
  if (exponential) {
    if (!weights) return {panel_pass_kernel<true, true, false>, bytes};
    return {sums ? panel_pass_kernel<true, true, true> : panel_pass_kernel<true, false, true>, bytes};
  }
  if (!weights) return {panel_pass_kernel<false, true, false>, bytes};
  return {sums ? panel_pass_kernel<false, true, true> : panel_pass_kernel<false, false, true>, bytes};
}

}  // namespace cuda
}  // namespace ck
