// What happens to a tile of scores in registers: sums by row and column against a reference, and weights. Shared by the
// pass over scores in memory and by the kernel that multiplies on the tensor cores.
//
// As on the CPU: maxima of rows and columns first, then exponentials against a reference, which rows and columns share
// where they lie close together. Each block leaves its partial sums in the scratch; merge_kernel folds them in order,
// so that results are bitwise reproducible.
#pragma once

#include "tile.h"

namespace ck {
namespace cuda {

constexpr int kWarps = kThreads / 32;
static_assert(kThreads == 2 * kTile, "each thread looks after one row or one column of the tile");

// A block's shared memory. Vectors hold the tile's rows, then its columns.
struct EpilogueMemory {
  double params[kWarps][2];
  float row_part[kWarpsAcross][kTile], col_part[kWarpsDown][kTile];  // the warps' maxima, then their sums
  float reference[2 * kTile], gain[2 * kTile];
  float low[kWarps], high[kWarps], lowest_normalizer[kWarps];
};

// Where the blocks' partial results lie in the panel's scratch.
struct Scratch {
  double* params;                  // [blocks, 2]
  float *row_reference, *row_sum;  // [tiles across, rows]
  float *col_reference, *col_sum;  // [tiles down, cols]

  __host__ __device__ __forceinline__ explicit Scratch(const Panel& p) {
    const int64_t down = (p.rows + kTile - 1) / kTile, across = (p.cols + kTile - 1) / kTile;
    params = static_cast<double*>(p.scratch);
    row_reference = reinterpret_cast<float*>(params + 2 * down * across);
    row_sum = row_reference + across * p.rows;
    col_reference = row_sum + across * p.rows;
    col_sum = col_reference + down * p.cols;
  }
};

__device__ __forceinline__ float larger(float a, float b) { return b > a ? b : a; }  // a NaN in b is passed over
__device__ __forceinline__ float smaller(float a, float b) { return b < a ? b : a; }

// The vector element that this thread looks after.
struct Element {
  bool is_row, inside;
  int index;   // in the tile
  int64_t at;  // in the panel

  __device__ __forceinline__ Element(const TilePlace& tile, bool row_wanted, bool col_wanted) {
    is_row = static_cast<int>(threadIdx.x) < kTile;
    index = static_cast<int>(threadIdx.x) % kTile;
    inside = is_row ? row_wanted && index < tile.rows : col_wanted && index < tile.cols;
    at = (is_row ? tile.row0() : tile.col0()) + index;
  }
};

// Leaves each warp's maxima of its rows and columns in row_part and col_part.
__device__ __forceinline__ void find_maxima(const ThreadPlace& mine, const Scores& s, float scale, float bias,
                                            EpilogueMemory& m) {
  float col_best[kCols];
#pragma unroll
  for (int j = 0; j < kCols; ++j) col_best[j] = -__builtin_inff();
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    float best = -__builtin_inff();
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      const float z = s.logit(i, j, scale, bias);
      best = larger(best, z);
      col_best[j] = larger(col_best[j], z);
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

// The largest of the warps' maxima, or their sum, for one row or column.
__device__ __forceinline__ float merged_maximum(const EpilogueMemory& m, const Element& e) {
  float best = -__builtin_inff();
  for (int k = 0; k < (e.is_row ? kWarpsAcross : kWarpsDown); ++k)
    best = larger(best, e.is_row ? m.row_part[k][e.index] : m.col_part[k][e.index]);
  return best;
}
__device__ __forceinline__ float merged_sum(const EpilogueMemory& m, const Element& e) {
  float sum = 0.0f;
  for (int k = 0; k < (e.is_row ? kWarpsAcross : kWarpsDown); ++k)
    sum += e.is_row ? m.row_part[k][e.index] : m.col_part[k][e.index];
  return sum;
}

// Chooses the references of the tile's rows and columns, and the gains that go with them. True: all share one.
// SUMS: the references are the maxima in row_part and col_part, else the normalisers.
template <bool SUMS, bool WEIGHTS>
__device__ __forceinline__ bool choose_references(const Panel& p, const ThreadPlace& mine, const Element& e,
                                                  EpilogueMemory& m) {
  const Side& side = e.is_row ? p.row : p.col;
  const float normalizer = WEIGHTS && e.inside ? side.normalizer[e.at] : 0.0f;
  float reference = SUMS ? finite_reference(merged_maximum(m, e)) : normalizer;
  float low = __builtin_inff(), high = -__builtin_inff(), lowest = __builtin_inff();
  if (e.inside) {
    low = smaller(low, reference);
    high = larger(high, reference);
    lowest = WEIGHTS ? smaller(lowest, normalizer) : lowest;
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
  const bool shared = share_reference(low, high, lowest);
  reference = shared ? high : reference;
  m.reference[threadIdx.x] = reference;
  if (WEIGHTS) m.gain[threadIdx.x] = e.inside ? refer_gain(side.gain[e.at], normalizer, reference) : 0.0f;
  __syncthreads();
  return shared;
}

// This thread's part of the gradients of scale and bias.
struct ParamSums {
  float dscale = 0.0f, dbias = 0.0f;
};

// Exponentials, their sums in row_part and col_part, and the weights. SHARED: one exponential serves both sides.
template <bool SHARED, bool SUMS, bool WEIGHTS>
__device__ __forceinline__ ParamSums sweep_exponential(const Panel& p, const TilePlace& tile, const ThreadPlace& mine,
                                                       const Scores& s, bool by_row, bool by_col, EpilogueMemory& m) {
  const float scale = p.params[0], bias = p.params[1], factor = p.factor ? *p.factor : scale;
  // read where it is needed: eight more registers are not to be had
  const volatile float* const col_reference = m.reference + kTile + mine.col;
  WeightWriter writer(p, tile, mine);
  ParamSums params;
  float col_sum[kCols] = {};
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = mine.row + i * kRowStep;
    const float row_reference = m.reference[row], row_gain = WEIGHTS ? m.gain[row] : 0.0f;
    float row_sum = 0.0f, out[kCols];
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      const float z = s.logit(i, j, scale, bias);
      const float col_gain = WEIGHTS ? m.gain[kTile + mine.col + j] : 0.0f;
      float w = 0.0f;
      if (SHARED) {
        const float e = exp_term(z - row_reference);
        row_sum += e;
        col_sum[j] += e;
        w = e * (row_gain + col_gain);
      } else {
        if (by_row) {
          const float e = exp_term(z - row_reference);
          row_sum += e;
          w = e * row_gain;
        }
        if (by_col) {
          const float e = exp_term(z - col_reference[j]);
          col_sum[j] += e;
          w += e * col_gain;
        }
      }
      params.dscale += w * s.score[i][j];
      params.dbias += w;
      out[j] = w * factor;
    }
    if (SUMS) {
      row_sum += __shfl_xor_sync(kAllLanes, row_sum, 1);
      row_sum += __shfl_xor_sync(kAllLanes, row_sum, 2);
      if (mine.lane % 4 == 0) m.row_part[mine.warp_across][row] = row_sum;
    }
    if (WEIGHTS) writer.write(i, out);
  }
  if (SUMS)
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      for (int step = 4; step < 32; step *= 2) col_sum[j] += __shfl_xor_sync(kAllLanes, col_sum[j], step);
      if (mine.lane < 4) m.col_part[mine.warp_down][mine.col + j] = col_sum[j];
    }
  return params;
}

// The sigmoid term: row sums of softplus(z) in row_part, weights gain_i * sigmoid(z).
template <bool SUMS, bool WEIGHTS>
__device__ __forceinline__ ParamSums sweep_sigmoid(const Panel& p, const TilePlace& tile, const ThreadPlace& mine,
                                                   const Scores& s, EpilogueMemory& m) {
  const float scale = p.params[0], bias = p.params[1], factor = p.factor ? *p.factor : scale;
  WeightWriter writer(p, tile, mine);
  ParamSums params;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = mine.row + i * kRowStep;
    const float gain = WEIGHTS ? m.gain[row] : 0.0f;
    float sum = 0.0f, out[kCols];
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      const float z = s.logit(i, j, scale, bias);
      const float e = exp_term(z > 0.0f ? -z : z);
      if (SUMS) sum += softplus_from(z, e);
      if (WEIGHTS) {
        const float w = gain * sigmoid_from(z, e);
        params.dscale += w * s.score[i][j];
        params.dbias += w;
        out[j] = w * factor;
      }
    }
    if (SUMS) {
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      if (mine.lane % 4 == 0) m.row_part[mine.warp_across][row] = sum;
    }
    if (WEIGHTS) writer.write(i, out);
  }
  return params;
}

// Writes the block's sums of w * score and of w.
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

// Everything that is done with a tile once its scores are in registers.
template <bool EXPONENTIAL, bool SUMS, bool WEIGHTS>
__device__ __forceinline__ void finish_tile(const Panel& p, const TilePlace& tile, const ThreadPlace& mine, Scores& s,
                                            EpilogueMemory& m) {
  find_excluded(p, tile, mine, s);
  const bool by_row = SUMS && p.row.sum ? true : WEIGHTS && p.row.gain;
  const bool by_col = SUMS && p.col.sum ? true : WEIGHTS && p.col.gain;
  ParamSums params;
  bool shared = false;
  if (EXPONENTIAL) {
    if (SUMS) {
      find_maxima(mine, s, p.params[0], p.params[1], m);
      __syncthreads();
    }
    shared = choose_references<SUMS, WEIGHTS>(p, mine, Element(tile, by_row, by_col), m);
    params = shared ? sweep_exponential<true, SUMS, WEIGHTS>(p, tile, mine, s, by_row, by_col, m)
                    : sweep_exponential<false, SUMS, WEIGHTS>(p, tile, mine, s, by_row, by_col, m);
  } else {
    if (WEIGHTS) {
      const Element e(tile, by_row, by_col);
      if (e.is_row) m.gain[e.index] = e.inside ? p.row.gain[e.at] : 0.0f;
      __syncthreads();
    }
    params = sweep_sigmoid<SUMS, WEIGHTS>(p, tile, mine, s, m);
  }
  if (SUMS) {
    __syncthreads();
    const Element e(tile, by_row, by_col);
    const Scratch scratch(p);
    if (e.inside && e.is_row && p.row.sum) {
      if (EXPONENTIAL)
        scratch.row_reference[static_cast<int64_t>(tile.across) * p.rows + e.at] = m.reference[threadIdx.x];
      scratch.row_sum[static_cast<int64_t>(tile.across) * p.rows + e.at] = merged_sum(m, e);
    }
    if (e.inside && !e.is_row && p.col.sum) {
      if (EXPONENTIAL)
        scratch.col_reference[static_cast<int64_t>(tile.down) * p.cols + e.at] = m.reference[threadIdx.x];
      scratch.col_sum[static_cast<int64_t>(tile.down) * p.cols + e.at] = merged_sum(m, e);
    }
  }
  if (WEIGHTS && p.dparams) leave_params(p, mine, params, m);
}

}  // namespace cuda
}  // namespace ck
