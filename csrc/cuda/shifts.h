// The shifts of a tile's exponentials: maxima of rows and columns, or their normalisers. As on the CPU, rows and
// columns share one where theirs lie close together.
#pragma once

#include "tile_memory.h"

namespace ck {
namespace cuda {

__device__ __forceinline__ float larger(float a, float b) { return b > a ? b : a; }  // a NaN in b is passed over
__device__ __forceinline__ float smaller(float a, float b) { return b < a ? b : a; }

// Leaves the ceilings of the tile's rows and columns; +inf where there are none.
__device__ __forceinline__ void load_ceilings(const Panel& p, const TilePlace& tile, EpilogueMemory& m) {
  const Element e(tile, p.pairs.row_ceiling, p.pairs.col_ceiling);
  const float* const ceiling = e.is_row ? p.pairs.row_ceiling : p.pairs.col_ceiling;
  m.ceiling[threadIdx.x] = e.inside ? ceiling[e.at] : __builtin_inff();
}

// Leaves a thread's bits where only it reads them.
template <bool CAPPED>
__device__ __forceinline__ void leave_guided(const Guided<CAPPED>& guided, EpilogueMemory& m) {
#pragma unroll
  for (int k = 0; CAPPED && k < 2; ++k)
    m.above[k][threadIdx.x] = guided.row[k], m.above[2 + k][threadIdx.x] = guided.col[k];
}

// The bits of the thread's i-th row: of pairs above the row's threshold or, of COLS, above the columns'.
template <bool COLS>
__device__ __forceinline__ uint32_t above_in_row(const EpilogueMemory& m, int i) {
  const volatile uint32_t& bits = m.above[2 * COLS + i / 4][threadIdx.x];
  return bits >> (i % 4 * kCols);
}

// Leaves each warp's maxima of its rows and columns in row_part and col_part. CAPPED: of what lies below their
// ceilings, and a guide's thresholds.
template <bool CAPPED>
__device__ __forceinline__ void find_maxima(const ThreadPlace& mine, const Scores& s, const Logits<false>& logits,
                                            EpilogueMemory& m) {
  float col_best[kCols];
#pragma unroll
  for (int j = 0; j < kCols; ++j) col_best[j] = -__builtin_inff();
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const uint32_t row_above = CAPPED ? above_in_row<false>(m, i) : 0u;
    const uint32_t col_above = CAPPED ? above_in_row<true>(m, i) : 0u;
    float best = -__builtin_inff();
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      const float z = logits(s, i, j), scaled = s.score[i][j] * logits.scale;
      const bool row_out = CAPPED && (scaled > m.ceiling[mine.row + i * kRowStep] || (row_above >> j & 1u));
      const bool col_out = CAPPED && (scaled > m.ceiling[kTile + mine.col + j] || (col_above >> j & 1u));
      best = larger(best, row_out ? -__builtin_inff() : z);
      col_best[j] = larger(col_best[j], col_out ? -__builtin_inff() : z);
    }
    best = larger(best, __shfl_xor_sync(kAllLanes, best, 1));
    best = larger(best, __shfl_xor_sync(kAllLanes, best, 2));
    if (mine.lane % 4 == 0) m.row_part[mine.warp_across][mine.row + i * kRowStep] = best;
  }
#pragma unroll
  for (int j = 0; j < kCols; ++j) {
    for (int step = 4; step < 32; step *= 2)
      col_best[j] = larger(col_best[j], __shfl_xor_sync(kAllLanes, col_best[j], step));
    if (mine.lane < 4) m.col_part[mine.warp_down][mine.col + j] = col_best[j];
  }
}

// The largest of the warps' maxima of one row or column.
__device__ __forceinline__ float merged_maximum(const EpilogueMemory& m, const Element& e) {
  float best = -__builtin_inff();
  for (int k = 0; k < (e.is_row ? kWarpsAcross : kWarpsDown); ++k)
    best = larger(best, e.is_row ? m.row_part[k][e.index] : m.col_part[k][e.index]);
  return best;
}

// Chooses the shifts of the tile's rows and columns, and the gains that go with them. True: all share one.
// SUMS: the shifts are the maxima in row_part and col_part, else the normalisers, rounded.
template <bool SUMS, bool WEIGHTS>
__device__ __forceinline__ bool choose_shifts(const Panel& p, const ThreadPlace& mine, const Element& e,
                                              EpilogueMemory& m) {
  const Side& side = e.is_row ? p.row : p.col;
  const float normalizer_shift = WEIGHTS && e.inside ? side.normalizer_shift[e.at] : 0.0f;
  const float normalizer_rest = WEIGHTS && e.inside ? side.normalizer_rest[e.at] : 0.0f;
  const float rounded = normalizer_as_shift(normalizer_shift, normalizer_rest);
  const float maximum = SUMS ? merged_maximum(m, e) : rounded;
  const bool nothing = SUMS && maximum == -__builtin_inff();
  float shift = SUMS ? finite_shift(maximum) : rounded;
  float low = __builtin_inff(), high = -__builtin_inff(), lowest = __builtin_inff();
  if (e.inside) {
    low = smaller(low, shift);
    high = larger(high, shift);
    lowest = WEIGHTS ? smaller(lowest, rounded) : lowest;
  }
  for (int step = 16; step > 0; step /= 2) {
    low = smaller(low, __shfl_xor_sync(kAllLanes, low, step));
    high = larger(high, __shfl_xor_sync(kAllLanes, high, step));
    lowest = smaller(lowest, __shfl_xor_sync(kAllLanes, lowest, step));
  }
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (mine.lane == 0) m.low[warp] = low, m.high[warp] = high, m.lowest_normalizer[warp] = lowest;
  __syncthreads();
  for (int k = 0; k < kWarps; ++k) {
    low = smaller(low, m.low[k]);
    high = larger(high, m.high[k]);
    lowest = smaller(lowest, m.lowest_normalizer[k]);
  }
  const bool shared = share_shift(low, high, lowest);
  // a row of nothing that shares no shift gets its normaliser: against 0 the gain might overflow, times nothing NaN
  if (WEIGHTS && nothing && rounded - rounded == 0.0f) shift = rounded;
  shift = shared ? high : shift;
  m.shift[threadIdx.x] = shift;
  if (WEIGHTS)
    m.gain[threadIdx.x] = e.inside ? refer_gain(side.gain[e.at], normalizer_shift, normalizer_rest, shift) : 0.0f;
  __syncthreads();
  return shared;
}

}  // namespace cuda
}  // namespace ck
