// One pass over scores that lie in memory [rows, cols], whoever multiplied them: the portable route.
#include "epilogue.h"
#include "kernels.h"

namespace ck {
namespace cuda {

extern __shared__ __align__(16) unsigned char shared_memory[];

template <class Term, bool IDS, bool CAPPED, bool SUMS, bool WEIGHTS>
__global__ __launch_bounds__(kThreads, 2) void panel_pass_kernel(const __grid_constant__ Panel p) {
  const TilePlace tile(p, blockIdx.x);
  const ThreadPlace mine;
  const Alike<IDS> alike(p, tile, mine);
  const Guided<CAPPED> guided(p, tile, mine);
  Scores scores;
  load_scores(p, tile, mine, scores);
  finish_tile<Term, IDS, CAPPED, SUMS, WEIGHTS>(p, tile, mine, scores, alike, guided,
                                                *reinterpret_cast<EpilogueMemory*>(shared_memory));
}

namespace {

template <class Term, bool IDS, bool CAPPED>
TileKernel choose(bool sums, bool weights) {
  const unsigned bytes = sizeof(EpilogueMemory);
  if constexpr (!Term::kTargets) {  // which have no sums
    if (!weights) return {panel_pass_kernel<Term, IDS, CAPPED, true, false>, bytes};
    if (sums) return {panel_pass_kernel<Term, IDS, CAPPED, true, true>, bytes};
  }
  return {panel_pass_kernel<Term, IDS, CAPPED, false, true>, bytes};
}

template <class Term, bool CAPPED = false>
TileKernel choose_ids(bool ids, bool sums, bool weights) {
  return ids ? choose<Term, true, CAPPED>(sums, weights) : choose<Term, false, CAPPED>(sums, weights);
}

}  // namespace

TileKernel panel_pass(Kind kind, bool sums, bool weights) {
  if (kind.targets) return choose_ids<WithTargets>(kind.ids, sums, weights);
  if (kind.capped) return choose_ids<BothSides, true>(kind.ids, sums, weights);
  return kind.term == PairTerm::kSigmoid ? choose_ids<Sigmoid>(kind.ids, sums, weights)
                                         : choose_ids<BothSides>(kind.ids, sums, weights);
}

}  // namespace cuda
}  // namespace ck
