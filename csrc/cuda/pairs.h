// All that the kernels know of pairs: which of a tile's count, and how a logit is made of a score. A further member is
// a few lines here.
#pragma once

#include "tile.h"

namespace ck {
namespace cuda {

// What a block keeps of its tile's pairs in shared memory, for registers are scarce.
struct PairsMemory {
  float col_bias[kTile];
};

// A bit for each of a thread's pairs of equal ids, where there are IDS. Found before there are scores: beside them,
// eight ids would not fit the registers.
template <bool IDS>
struct Alike {
  uint32_t bits[2] = {0u, 0u};

  __device__ __forceinline__ Alike(const Panel& p, const TilePlace& tile, const ThreadPlace& mine) {
    if (!IDS) return;
    const int64_t* const ids = p.pairs.col_ids + tile.col0() + mine.col;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = mine.row + i * kRowStep;
      if (row >= tile.rows) break;
      const int64_t id = p.pairs.row_ids[tile.row0() + row];
#pragma unroll
      for (int j = 0; j < kCols; ++j)
        if (mine.col + j < tile.cols && ids[j] == id) bits[i / 4] |= 1u << (i % 4 * kCols + j);
    }
    forget(bits[0]), forget(bits[1]);
  }
};

// A bit for each of a thread's pairs whose guide's score lies above the threshold of its row, and of its column; where
// there are LIMITS. Found before there are scores, as ids are; afterwards they lie in shared memory.
template <bool LIMITS>
struct Guided {
  uint32_t row[2] = {0u, 0u}, col[2] = {0u, 0u};

  __device__ __forceinline__ Guided(const Panel& p, const TilePlace& tile, const ThreadPlace& mine) {
    if (!LIMITS || !p.pairs.guide) return;
    const int64_t stride = p.pairs.guide_stride;
    const float* from = p.pairs.guide + (tile.row0() + mine.row) * stride + tile.col0() + mine.col;
    const bool aligned = reinterpret_cast<uintptr_t>(p.pairs.guide) % 16 == 0 && stride % 4 == 0;
    const int valid = tile.cols - mine.col;
    float col_limit[kCols];
#pragma unroll
    for (int j = 0; j < kCols; ++j)
      col_limit[j] =
          p.pairs.col_threshold && j < valid ? p.pairs.col_threshold[tile.col0() + mine.col + j] : __builtin_inff();
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int at = mine.row + i * kRowStep;
      if (at >= tile.rows) break;
      const float row_limit = p.pairs.row_threshold ? p.pairs.row_threshold[tile.row0() + at] : __builtin_inff();
      float score[kCols];
      load_row(from + i * kRowStep * stride, valid, aligned, score);
#pragma unroll
      for (int j = 0; j < kCols; ++j) {
        const uint32_t bit = 1u << (i % 4 * kCols + j);
        row[i / 4] |= score[j] > row_limit ? bit : 0u;
        col[i / 4] |= score[j] > col_limit[j] ? bit : 0u;
      }
    }
    forget(row[0]), forget(row[1]), forget(col[0]), forget(col[1]);
  }
};

// How a thread makes its logits. SIGNED: pairs of equal ids are positives, with -z in the place of z. KEEPS: it is kept
// which pairs these are.
template <bool SIGNED, bool KEEPS = SIGNED>
struct Logits {
  float scale, bias;
  uint32_t left_out[2];            // a bit for each score that does not count or lies outside of the panel
  bool biased;                     // whether columns have biases:
  const volatile float* col_bias;  // of the thread's columns, in shared memory
  uint32_t alike[KEEPS ? 2 : 1];   // a bit for each pair of equal ids

  __device__ __forceinline__ float operator()(const Scores& s, int i, int j) const {
    const float z = s.score[i][j] * scale + bias;
    if ((left_out[i / 4] >> (i % 4 * kCols + j)) & 1u) return -__builtin_inff();
    return with_sign(biased ? z + col_bias[j] : z, i, j);
  }
  __device__ __forceinline__ bool is_alike(int i, int j) const {
    return KEEPS && ((alike[i / 4 * KEEPS] >> (i % 4 * kCols + j)) & 1u);
  }
  // v, or -v of a positive.
  __device__ __forceinline__ float with_sign(float v, int i, int j) const { return SIGNED && is_alike(i, j) ? -v : v; }
  // The same, new to the compiler: it would keep an earlier sweep's logits in registers, and spill.
  __device__ __forceinline__ Logits anew() const {
    Logits copy = *this;
    forget(copy.scale);
    forget(copy.left_out[1]);
    return copy;
  }
};

// The column that the diagonal crosses in the tile's first row, counted from the tile's own; far off where it does not
// cross the tile.
__device__ __forceinline__ int diagonal_place(const Panel& p, const TilePlace& tile) {
  constexpr int kFar = -2 * kTile;
  if (p.pairs.diagonal == kNoDiagonal) return kFar;
  const int64_t place = p.pairs.first_row + tile.row0() + p.pairs.diagonal - (p.pairs.first_column + tile.col0());
  return place > -kTile && place < kTile ? static_cast<int>(place) : kFar;
}

// A bit for each of the eight columns of one row that is left out: outside of the panel, on the diagonal, or named.
__device__ __forceinline__ uint32_t left_out_of_row(const Panel& p, const TilePlace& tile, const ThreadPlace& mine,
                                                    int row, int diagonal) {
  uint32_t bits = row < tile.rows ? 0u : (1u << kCols) - 1;
#pragma unroll
  for (int j = 0; j < kCols; ++j) bits |= mine.col + j < tile.cols ? 0u : 1u << j;
  const int local = diagonal + row - mine.col;
  if (local >= 0 && local < kCols) bits |= 1u << local;
  if (row < tile.rows)
    for (int64_t k = 0; k < p.pairs.columns_count; ++k) {
      const int64_t column = p.pairs.columns[(tile.row0() + row) * p.pairs.columns_count + k];
      const int64_t place = column - p.pairs.first_column - tile.col0() - mine.col;
      if (place >= 0 && place < kCols) bits |= 1u << static_cast<int>(place);
    }
  return bits;
}

// Marks the columns that their bias leaves out, in all of the thread's rows.
__device__ __forceinline__ void leave_out_by_bias(const TilePlace& tile, const ThreadPlace& mine, const PairsMemory& m,
                                                  uint32_t (&left_out)[2]) {
  uint32_t bits = 0u;
#pragma unroll
  for (int j = 0; j < kCols; ++j)
    if (mine.col + j < tile.cols && m.col_bias[mine.col + j] == -__builtin_inff()) bits |= 1u << j;
  left_out[0] |= bits * 0x01010101u, left_out[1] |= bits * 0x01010101u;
}

// Marks what the ids leave out, and what they make alike.
template <bool SIGNED, bool KEEPS>
__device__ __forceinline__ void sort_by_ids(const Panel& p, const uint32_t (&bits)[2], Logits<SIGNED, KEEPS>& logits) {
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    if (KEEPS) logits.alike[k * KEEPS] = bits[k];
    if (p.pairs.equal_ids == kAlikeAlone)
      logits.left_out[k] = ~bits[k];
    else if (!SIGNED && p.pairs.equal_ids != kAlikeCount)
      logits.left_out[k] = bits[k];
  }
}

// Marks what does not count. Scores outside of the panel are 0 already; ZEROS
// says so again, for without it ptxas 13.0 spills 180 bytes in the kernels of sums and weights, and with it some in all
// others. IDS: pairs have ids, which leave out or, if SIGNED, make positives; KEEPS: they have targets by them.
template <bool IDS, bool SIGNED, bool KEEPS, bool ZEROS>
__device__ __forceinline__ Logits<SIGNED, KEEPS> find_logits(const Panel& p, const TilePlace& tile,
                                                             const ThreadPlace& mine, Scores& s,
                                                             const Alike<IDS>& alike, PairsMemory& m) {
  Logits<SIGNED, KEEPS> logits = {p.params[0],           p.params[1], {0u, 0u}, p.pairs.col_bias != nullptr,
                                  m.col_bias + mine.col, {}};
  if (IDS) sort_by_ids(p, alike.bits, logits);
  if (logits.biased) {
    const int col = static_cast<int>(threadIdx.x);
    if (col < tile.cols) m.col_bias[col] = p.pairs.col_bias[tile.col0() + col];
    __syncthreads();
  }
  if (SIGNED && logits.biased) leave_out_by_bias(tile, mine, m, logits.left_out);
  const int diagonal = diagonal_place(p, tile);
  const bool whole = tile.rows == kTile && tile.cols == kTile;
  // the usual tile: all of it counts, but for ids
  if (whole && diagonal < -kTile && p.pairs.columns_count == 0) return logits;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = mine.row + i * kRowStep;
    logits.left_out[i / 4] |= left_out_of_row(p, tile, mine, row, diagonal) << (i % 4 * kCols);
#pragma unroll
    for (int j = 0; ZEROS && j < kCols; ++j)
      if (row >= tile.rows || mine.col + j >= tile.cols) s.score[i][j] = 0.0f;
  }
  return logits;
}

}  // namespace cuda
}  // namespace ck
