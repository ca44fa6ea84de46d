// What happens to a tile of scores in registers: sums by row and column against a shift, and weights. Shared by the
// pass over scores in memory and by the kernel that multiplies on the tensor cores. The terms are those of csrc/terms.
//
// Each block leaves its partial sums in the scratch; merge_kernel folds them in order, so that results are bitwise
// reproducible.
#pragma once

#include "shifts.h"

namespace ck {
namespace cuda {

// The terms as the kernels know them: whichever sides take part, the other's gains are 0.
using BothSides = Exponential<false, true, true>;
using WithTargets = Exponential<false, true, true, true>;

// Whether pairs of equal ids are kept in mind.
template <class Term, bool IDS>
constexpr bool kKeepsIds = IDS && (Term::kSigned || Term::kTargets);

// The warps' sums of one row or column, added up.
__device__ __forceinline__ float merged_sum(const EpilogueMemory& m, const Element& e) {
  float sum = 0.0f;
  for (int k = 0; k < (e.is_row ? kWarpsAcross : kWarpsDown); ++k)
    sum += e.is_row ? m.row_part[k][e.index] : m.col_part[k][e.index];
  return sum;
}

// Adds the row's sums of the four lanes that share it, and leaves the warp's.
__device__ __forceinline__ void leave_row_sum(const ThreadPlace& mine, int row, float sum, EpilogueMemory& m) {
  sum += __shfl_xor_sync(kAllLanes, sum, 1);
  sum += __shfl_xor_sync(kAllLanes, sum, 2);
  if (mine.lane % 4 == 0) m.row_part[mine.warp_across][row] = sum;
}

// Adds the columns' sums of the eight lanes that share them, and leaves the warp's.
__device__ __forceinline__ void leave_col_sums(const ThreadPlace& mine, float (&sum)[kCols], EpilogueMemory& m) {
#pragma unroll
  for (int j = 0; j < kCols; ++j) {
    for (int step = 4; step < 32; step *= 2) sum[j] += __shfl_xor_sync(kAllLanes, sum[j], step);
    if (mine.lane < 4) m.col_part[mine.warp_down][mine.col + j] = sum[j];
  }
}

// What all weights of a tile have in common, and this thread's part of the gradients of scale and bias.
struct ParamSums {
  float center, factor;
  float dscale = 0.0f, dbias = 0.0f;

  __device__ __forceinline__ explicit ParamSums(const Panel& p)
      : center(p.params[2]), factor(p.factor ? *p.factor : p.params[0]) {}
  // Adds w, the weight of a score; returns what is written.
  __device__ __forceinline__ float add(float w, float score) {
    dscale += w * (score - center);
    dbias += w;
    return w * factor;
  }
};

// Writes the block's sums of w * (score - center) and of w.
__device__ __forceinline__ void leave_params(const Panel& p, const ThreadPlace& mine, ParamSums params,
                                             EpilogueMemory& m) {
  for (int step = 16; step > 0; step /= 2) {
    params.dscale += __shfl_xor_sync(kAllLanes, params.dscale, step);
    params.dbias += __shfl_xor_sync(kAllLanes, params.dbias, step);
  }
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (mine.lane == 0) m.params[warp][0] = params.dscale, m.params[warp][1] = params.dbias;
  __syncthreads();
  if (threadIdx.x >= 2) return;
  double sum = 0.0;
  for (int k = 0; k < kWarps; ++k) sum += m.params[k][threadIdx.x];
  Scratch(p).params[2 * static_cast<int64_t>(blockIdx.x) + threadIdx.x] = sum;
}

// Leaves the targets of the tile's rows and columns; a side that takes no part has none.
__device__ __forceinline__ void load_targets(const Panel& p, const TilePlace& tile, EpilogueMemory& m) {
  const Element e(tile, p.row.target, p.col.target);
  const Side& side = e.is_row ? p.row : p.col;
  m.target[0][threadIdx.x] = e.inside ? side.target[e.at] : 0.0f;
  m.target[1][threadIdx.x] = e.inside ? side.target_alike[e.at] : 0.0f;
}

// What comes off the weight of a pair that counts.
__device__ __forceinline__ float target_of(const ThreadPlace& mine, const EpilogueMemory& m, int i, int j, bool alike) {
  const volatile float* const target = m.target[alike];
  return target[mine.row + i * kRowStep] + target[kTile + mine.col + j];
}

// Exponentials (or what a term has in their place), their sums in row_part and col_part, and the weights.
template <class Term, bool CAPPED, bool SUMS, bool WEIGHTS, class Logits>
__device__ __forceinline__ ParamSums sweep(const Panel& p, const TilePlace& tile, const ThreadPlace& mine,
                                           const Scores& s, const Logits& logits, EpilogueMemory& m) {
  // read where it is needed: eight more registers are not to be had
  const volatile float* const col_shift = m.shift + kTile + mine.col;
  const float* const col_gains = m.gain + kTile + mine.col;
  const volatile float* const ceiling = m.ceiling;
  WeightWriter writer(p, tile, mine);
  ParamSums params(p);
  float col_sum[kCols] = {};
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = mine.row + i * kRowStep;
    const float row_shift = Term::kHasShift ? m.shift[row] : 0.0f, row_gain = WEIGHTS ? m.gain[row] : 0.0f;
    const uint32_t row_above = CAPPED ? above_in_row<false>(m, i) : 0u;
    const uint32_t col_above = CAPPED ? above_in_row<true>(m, i) : 0u;
    float row_sum = 0.0f, out[kCols];
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      const float z = logits(s, i, j);
      float by_row = Term::row_score(z, row_shift);
      float by_col = Term::col_score(z, by_row, Term::kCol ? col_shift[j] : 0.0f);
      if (CAPPED) {  // (what lies far above may be infinite)
        const float scaled = s.score[i][j] * logits.scale;
        by_row = scaled > ceiling[row] || (row_above >> j & 1u) ? 0.0f : by_row;
        by_col = scaled > ceiling[kTile + mine.col + j] || (col_above >> j & 1u) ? 0.0f : by_col;
      }
      if (SUMS) row_sum += Term::row_part(z, by_row);
      if (SUMS && Term::kCol) col_sum[j] += by_col;
      if (WEIGHTS) {
        const float col_gain = Term::kCol ? col_gains[j] : 0.0f;
        float w = WeightsOf<Term, CAPPED>::Type::weight(z, by_row, by_col, row_gain, col_gain);
        if constexpr (Term::kTargets)
          w = z == -__builtin_inff() ? 0.0f : w - target_of(mine, m, i, j, logits.is_alike(i, j));
        out[j] = params.add(logits.with_sign(w, i, j), s.score[i][j]);
      }
    }
    if (SUMS) leave_row_sum(mine, row, row_sum, m);
    if (WEIGHTS) writer.write(i, out);
  }
  if (SUMS && Term::kCol) leave_col_sums(mine, col_sum, m);
  return params;
}

// A term's shifts and gains, then its sweep. A side that takes no part has gains of 0, and nobody reads its sums.
template <class Term, bool CAPPED, bool SUMS, bool WEIGHTS, class Logits>
__device__ __forceinline__ ParamSums sweep_with_shifts(const Panel& p, const TilePlace& tile, const ThreadPlace& mine,
                                                       const Scores& s, const Logits& logits, EpilogueMemory& m) {
  if constexpr (Term::kHasShift) {
    if constexpr (Term::kTargets) load_targets(p, tile, m);
    if constexpr (CAPPED) {
      load_ceilings(p, tile, m);
      __syncthreads();
    }
    if constexpr (SUMS) {
      find_maxima<CAPPED>(mine, s, logits, m);
      __syncthreads();
    }
    const bool by_row = SUMS && p.row.sum ? true : WEIGHTS && p.row.gain;
    const bool by_col = SUMS && p.col.sum ? true : WEIGHTS && p.col.gain;
    const bool common = choose_shifts<SUMS, WEIGHTS>(p, mine, Element(tile, by_row, by_col), m);
    const Logits again = logits.anew();
    if (common) return sweep<typename Term::WithCommonShift, CAPPED, SUMS, WEIGHTS>(p, tile, mine, s, again, m);
    return sweep<Term, CAPPED, SUMS, WEIGHTS>(p, tile, mine, s, again, m);
  } else {
    if (WEIGHTS) {
      const Element e(tile, true, false);
      if (e.is_row) m.gain[e.index] = e.inside ? p.row.gain[e.at] : 0.0f;
      __syncthreads();
    }
    return sweep<Term, CAPPED, SUMS, WEIGHTS>(p, tile, mine, s, logits, m);
  }
}

// Leaves the tile's statistics in the scratch.
template <class Term>
__device__ __forceinline__ void leave_sums(const Panel& p, const TilePlace& tile, const EpilogueMemory& m) {
  const Element e(tile, p.row.sum, p.col.sum);
  if (!e.inside) return;
  const Scratch scratch(p);
  const int64_t at = e.is_row ? tile.across * p.rows + e.at : tile.down * p.cols + e.at;
  if (Term::kHasShift) (e.is_row ? scratch.row_shift : scratch.col_shift)[at] = m.shift[threadIdx.x];
  (e.is_row ? scratch.row_sum : scratch.col_sum)[at] = merged_sum(m, e);
}

// Everything that is done with a tile once its scores are in registers. IDS: its pairs have ids; CAPPED: its rows and
// columns have ceilings, or a guide's thresholds.
template <class Term, bool IDS, bool CAPPED, bool SUMS, bool WEIGHTS>
__device__ __forceinline__ void finish_tile(const Panel& p, const TilePlace& tile, const ThreadPlace& mine, Scores& s,
                                            const Alike<IDS>& alike, const Guided<CAPPED>& guided, EpilogueMemory& m) {
  leave_guided(guided, m);
  constexpr bool kZeros = SUMS && WEIGHTS, kSigned = IDS && Term::kSigned, kKeeps = kKeepsIds<Term, IDS>;
  const Logits<kSigned, kKeeps> logits = find_logits<IDS, kSigned, kKeeps, kZeros>(p, tile, mine, s, alike, m.pairs);
  const ParamSums params = sweep_with_shifts<Term, CAPPED, SUMS, WEIGHTS>(p, tile, mine, s, logits, m);
  if (SUMS) {
    __syncthreads();
    leave_sums<Term>(p, tile, m);
  }
  if (WEIGHTS && p.dparams) leave_params(p, mine, params, m);
}

}  // namespace cuda
}  // namespace ck
