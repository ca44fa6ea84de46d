// What happens to a tile of scores in registers: sums by row and column against a shift, and weights. Shared by the
// pass over scores in memory and by the kernel that multiplies on the tensor cores. A pair term is a class:
// exponential.h, sigmoid.h.
//
// Each block leaves its partial sums in the scratch; merge_kernel folds them in order, so that results are bitwise
// reproducible.
#pragma once

#include "pairs.h"

namespace ck {
namespace cuda {

#include "../include/elementary.h"

constexpr int kWarps = kThreads / 32;
static_assert(kThreads == 2 * kTile, "each thread looks after one row or one column of the tile");

// A block's shared memory. Vectors hold the tile's rows, then its columns.
struct EpilogueMemory {
  double params[kWarps][2];
  float row_part[kWarpsAcross][kTile], col_part[kWarpsDown][kTile];  // the warps' maxima, then their sums
  float shift[2 * kTile], gain[2 * kTile];
  float col_bias[kTile];
  float low[kWarps], high[kWarps], lowest_normalizer[kWarps];
};

// Where the blocks' partial results lie in the panel's scratch.
struct Scratch {
  double* params;              // [blocks, 2]
  float *row_shift, *row_sum;  // [tiles across, rows]
  float *col_shift, *col_sum;  // [tiles down, cols]

  __host__ __device__ __forceinline__ explicit Scratch(const Panel& p) {
    const int64_t down = (p.rows + kTile - 1) / kTile, across = (p.cols + kTile - 1) / kTile;
    params = static_cast<double*>(p.scratch);
    row_shift = reinterpret_cast<float*>(params + 2 * down * across);
    row_sum = row_shift + across * p.rows;
    col_shift = row_sum + across * p.rows;
    col_sum = col_shift + down * p.cols;
  }
};

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

// Everything that is done with a tile once its scores are in registers.
template <class Term, bool SUMS, bool WEIGHTS>
__device__ __forceinline__ void finish_tile(const Panel& p, const TilePlace& tile, const ThreadPlace& mine, Scores& s,
                                            EpilogueMemory& m) {
  const Logits logits = find_logits < SUMS && WEIGHTS > (p, tile, mine, s, m.col_bias);
  const ParamSums params = Term::template finish<SUMS, WEIGHTS>(p, tile, mine, s, logits, m);
  if (SUMS) {
    __syncthreads();
    leave_sums<Term>(p, tile, m);
  }
  if (WEIGHTS && p.dparams) leave_params(p, mine, params, m);
}

}  // namespace cuda
}  // namespace ck
