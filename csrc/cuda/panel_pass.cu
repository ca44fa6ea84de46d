// One pass over scores that lie in memory [rows, cols], whoever multiplied them: the portable route.
#include "epilogue.h"
#include "kernels.h"

namespace ck {
namespace cuda {

extern __shared__ __align__(16) unsigned char shared_memory[];

template <class Term, bool SUMS, bool WEIGHTS>
__global__ __launch_bounds__(kThreads, 2) void panel_pass_kernel(const __grid_constant__ Panel p) {
  const TilePlace tile(p, blockIdx.x);
  const ThreadPlace mine;
  Scores scores;
  load_scores(p, tile, mine, scores);
  finish_tile<Term, SUMS, WEIGHTS>(p, tile, mine, scores, *reinterpret_cast<EpilogueMemory*>(shared_memory));
}

namespace {

template <class Term>
TileKernel choose(bool sums, bool weights) {
  const unsigned bytes = sizeof(EpilogueMemory);
  if (!weights) return {panel_pass_kernel<Term, true, false>, bytes};
  return {sums ? panel_pass_kernel<Term, true, true> : panel_pass_kernel<Term, false, true>, bytes};
}

}  // namespace

TileKernel panel_pass(PairTerm term, bool sums, bool weights) {
  return term == PairTerm::kSigmoid ? choose<Sigmoid>(sums, weights) : choose<BothSides>(sums, weights);
}

}  // namespace cuda
}  // namespace ck
