// One pass over scores that lie in memory [rows, cols], whoever multiplied them: the portable route.
#include "epilogue.h"
#include "kernels.h"

namespace ck {
namespace cuda {

extern __shared__ __align__(16) unsigned char shared_memory[];

template <class Term, bool IDS, bool SUMS, bool WEIGHTS>
__global__ __launch_bounds__(kThreads, 2) void panel_pass_kernel(const __grid_constant__ Panel p) {
  const TilePlace tile(p, blockIdx.x);
  const ThreadPlace mine;
  const Alike<IDS> alike(p, tile, mine);
  Scores scores;
  load_scores(p, tile, mine, scores);
  finish_tile<Term, IDS, SUMS, WEIGHTS>(p, tile, mine, scores, alike,
                                        *reinterpret_cast<EpilogueMemory*>(shared_memory));
}

namespace {

template <class Term, bool IDS>
TileKernel choose(bool sums, bool weights) {
  const unsigned bytes = sizeof(EpilogueMemory);
  if constexpr (!Term::kTargets) {  // which have no sums
    if (!weights) return {panel_pass_kernel<Term, IDS, true, false>, bytes};
    if (sums) return {panel_pass_kernel<Term, IDS, true, true>, bytes};
  }
  return {panel_pass_kernel<Term, IDS, false, true>, bytes};
}

template <class Term>
TileKernel choose(bool ids, bool sums, bool weights) {
  return ids ? choose<Term, true>(sums, weights) : choose<Term, false>(sums, weights);
}

}  // namespace

TileKernel panel_pass(Kind kind, bool sums, bool weights) {
  if (kind.targets) return choose<WithTargets>(kind.ids, sums, weights);
  return kind.term == PairTerm::kSigmoid ? choose<Sigmoid>(kind.ids, sums, weights)
                                         : choose<BothSides>(kind.ids, sums, weights);
}

}  // namespace cuda
}  // namespace ck
