// A block's tile of scores and how it lies in the registers of its threads: the layout in which mma.sync leaves its
// products, with columns renamed so that each thread's are neighbours. What is said of its pairs is in pairs.h.
#pragma once

#include <cstdint>

#include "../include/api.h"
#include "../include/inline.h"
#include "ptx.h"

namespace ck {
namespace cuda {

constexpr int kTile = 128;           // rows and columns of a block's tile
constexpr int kThreads = 256;        // its threads: warps lie 2 x 4
constexpr int kWarpsDown = 2;        // ... with 64 rows each,
constexpr int kWarpsAcross = 4;      // ... and 32 columns
constexpr int kRows = 8, kCols = 8;  // a thread's rows and columns
constexpr int kRowStep = 8;          // from one of a thread's rows to the next
constexpr int kGroup = 8;            // rows of tiles that go through the columns together, and share them in L2
constexpr unsigned kAllLanes = ~0u;

// The tile of this block, and what of it lies within the panel.
struct TilePlace {
  int down, across;  // which tile
  int rows, cols;    // at most kTile

  __device__ __forceinline__ TilePlace(const Panel& p, unsigned block) {
    const unsigned tiles_down = static_cast<unsigned>((p.rows + kTile - 1) / kTile);
    const unsigned tiles_across = static_cast<unsigned>((p.cols + kTile - 1) / kTile);
    const unsigned first = block / (kGroup * tiles_across) * kGroup, within = block % (kGroup * tiles_across);
    const unsigned group = tiles_down - first < kGroup ? tiles_down - first : kGroup;
    down = static_cast<int>(first + within % group);
    across = static_cast<int>(within / group);
    rows = static_cast<int>(p.rows - row0() < kTile ? p.rows - row0() : kTile);
    cols = static_cast<int>(p.cols - col0() < kTile ? p.cols - col0() : kTile);
  }
  // Its first row and column in the panel.
  __device__ __forceinline__ int64_t row0() const { return static_cast<int64_t>(down) * kTile; }
  __device__ __forceinline__ int64_t col0() const { return static_cast<int64_t>(across) * kTile; }
};

// This thread's first row and first column in the tile: it has rows `row`, `row + 8`, ... and columns `col`, `col + 1`,
// ... Four lanes of a warp share a row, eight share a column.
struct ThreadPlace {
  int lane, warp_down, warp_across, row, col;

  __device__ __forceinline__ ThreadPlace() {
    const int thread = static_cast<int>(threadIdx.x);
    lane = thread % 32;
    warp_down = thread / 32 / kWarpsAcross;
    warp_across = thread / 32 % kWarpsAcross;
    row = warp_down * (kTile / kWarpsDown) + lane / 4;
    col = warp_across * (kTile / kWarpsAcross) + lane % 4 * kCols;
  }
};

// What one thread holds of the tile.
struct Scores {
  float score[kRows][kCols];
};

// Eight neighbouring floats; fewer (`valid`) at the panel's edge. `aligned`: the address is a multiple of 16.
__device__ __forceinline__ void load_row(const float* from, int valid, bool aligned, float (&to)[kCols]) {
  if (aligned && valid >= kCols) {
    const float4 low = reinterpret_cast<const float4*>(from)[0], high = reinterpret_cast<const float4*>(from)[1];
    to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
    to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
  } else {
#pragma unroll
    for (int j = 0; j < kCols; ++j) to[j] = j < valid ? from[j] : 0.0f;
  }
}

// Reads the thread's scores where they lie.
__device__ __forceinline__ void load_scores(const Panel& p, const TilePlace& tile, const ThreadPlace& mine, Scores& s) {
  const bool aligned = reinterpret_cast<uintptr_t>(p.scores) % 16 == 0 && p.stride % 4 == 0;
  const float* from = p.scores + (tile.row0() + mine.row) * p.stride + tile.col0() + mine.col;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int valid = mine.row + i * kRowStep < tile.rows ? tile.cols - mine.col : 0;
    load_row(from + i * kRowStep * p.stride, valid, aligned, s.score[i]);
  }
}

// Writes a thread's weights, eight neighbours of one row after the other, rounded to their type.
struct WeightWriter {
  unsigned char* to;  // the row to write next
  int64_t row_step;   // in bytes, to the thread's next row
  int rows, cols;     // below and right of the thread's first weight
  Dtype dtype;
  bool vectors;  // whether eight can be written at once

  __device__ __forceinline__ WeightWriter(const Panel& p, const TilePlace& tile, const ThreadPlace& mine) {
    const int64_t size = p.weights_dtype == Dtype::kFloat32 ? 4 : 2;
    const int64_t at = (tile.row0() + mine.row) * p.weights_stride + tile.col0() + mine.col;
    to = static_cast<unsigned char*>(p.weights) + at * size;
    row_step = kRowStep * p.weights_stride * size;
    rows = tile.rows - mine.row;
    cols = tile.cols - mine.col;
    dtype = p.weights_dtype;
    vectors = cols >= kCols && reinterpret_cast<uintptr_t>(p.weights) % 16 == 0 && p.weights_stride * size % 16 == 0;
  }

  // Writes the thread's i-th row.
  __device__ __forceinline__ void write(int i, const float (&w)[kCols]) {
    if (i * kRowStep < rows) {
      if (dtype == Dtype::kFloat32)
        write_float32(w);
      else
        write_16_bit(w);
    }
    to += row_step;
  }

 private:
  __device__ __forceinline__ void write_float32(const float (&w)[kCols]) {
    if (vectors) {
      reinterpret_cast<float4*>(to)[0] = make_float4(w[0], w[1], w[2], w[3]);
      reinterpret_cast<float4*>(to)[1] = make_float4(w[4], w[5], w[6], w[7]);
    } else {
#pragma unroll
      for (int j = 0; j < kCols; ++j)
        if (j < cols) reinterpret_cast<float*>(to)[j] = w[j];
    }
  }
  __device__ __forceinline__ void write_16_bit(const float (&w)[kCols]) {
    uint32_t pairs[kCols / 2];
#pragma unroll
    for (int j = 0; j < kCols / 2; ++j)
      pairs[j] =
          dtype == Dtype::kBFloat16 ? pack_bfloat16(w[2 * j], w[2 * j + 1]) : pack_float16(w[2 * j], w[2 * j + 1]);
    if (vectors) {
      *reinterpret_cast<uint4*>(to) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    } else {
#pragma unroll
      for (int j = 0; j < kCols; ++j)
        if (j < cols) reinterpret_cast<uint16_t*>(to)[j] = static_cast<uint16_t>(pairs[j / 2] >> (j % 2 * 16));
    }
  }
};

}  // namespace cuda
}  // namespace ck
