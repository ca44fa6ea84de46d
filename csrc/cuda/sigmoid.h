// The sigmoid term on a tile: each logit by itself, and no columns.
#pragma once

#include "epilogue.h"

namespace ck {
namespace cuda {

#include "../terms/sigmoid.h"

// Row sums of softplus(z) in row_part, weights gain_i * sigmoid(z).
template <bool SUMS, bool WEIGHTS>
__device__ __forceinline__ ParamSums sweep_sigmoid(const Panel& p, const TilePlace& tile, const ThreadPlace& mine,
                                                   const Scores& s, const Logits& logits, EpilogueMemory& m) {
  WeightWriter writer(p, tile, mine);
  ParamSums params(p);
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = mine.row + i * kRowStep;
    const float gain = WEIGHTS ? m.gain[row] : 0.0f;
    float sum = 0.0f, out[kCols];
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      const float z = logits(s, i, j);
      const float e = exp_term(z > 0.0f ? -z : z);
      if (SUMS) sum += softplus_from(z, e);
      if (WEIGHTS) out[j] = params.add(gain * sigmoid_from(z, e), s.score[i][j]);
    }
    if (SUMS) leave_row_sum(mine, row, sum, m);
    if (WEIGHTS) writer.write(i, out);
  }
  return params;
}

struct Sigmoid {
  static constexpr bool kHasShift = false;

  static __device__ __forceinline__ void merge(float&, float& sum, float, float other_sum) { sum += other_sum; }

  template <bool SUMS, bool WEIGHTS>
  static __device__ __forceinline__ ParamSums finish(const Panel& p, const TilePlace& tile, const ThreadPlace& mine,
                                                     const Scores& s, const Logits& logits, EpilogueMemory& m) {
    if (WEIGHTS) {
      const Element e(tile, true, false);
      if (e.is_row) m.gain[e.index] = e.inside ? p.row.gain[e.at] : 0.0f;
      __syncthreads();
    }
    return sweep_sigmoid<SUMS, WEIGHTS>(p, tile, mine, s, logits, m);
  }
};

}  // namespace cuda
}  // namespace ck
