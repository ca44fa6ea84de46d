// What a block keeps in shared memory once its tile is multiplied, and what it leaves in the panel's scratch.
#pragma once

#include "pairs.h"

namespace ck {
namespace cuda {

#include "../include/elementary.h"
#include "../terms/exponential.h"
#include "../terms/sigmoid.h"

constexpr int kWarps = kThreads / 32;
static_assert(kThreads == 2 * kTile, "each thread looks after one row or one column of the tile");

// A block's shared memory. Vectors hold the tile's rows, then its columns.
struct EpilogueMemory {
  double params[kWarps][2];
  float row_part[kWarpsAcross][kTile], col_part[kWarpsDown][kTile];  // the warps' maxima, then their sums
  float shift[2 * kTile], gain[2 * kTile];
  float target[2][2 * kTile];  // of pairs of other ids, of equal ids
  float ceiling[2 * kTile];
  uint32_t above[4][kThreads];  // each thread's bits of Guided: two of rows, two of columns
  PairsMemory pairs;
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

}  // namespace cuda
}  // namespace ck
