// Matrix products in bfloat16 with float32 sums, where the machine multiplies them (AVX512_BF16). torch's round to
// bfloat16 on the way out.
//
// Both operands are packed, in blocks of depth kDepth: up to kRows rows of the one, kCols columns of the other, in
// pairs along the depth, as vdpbf16ps takes them. The kernel keeps their sums in registers. A thread packs all that it
// multiplies itself: packed by one and read by another, it would go from core to core at each product.
#include <immintrin.h>

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "../include/inline.h"
#include "isa.h"

namespace ck {
namespace avx512bf16 {

constexpr int64_t kRows = kProductRows, kCols = kProductWidth, kDepth = kProductDepth;

// Depths that are fetched ahead of being packed.
constexpr int64_t kAhead = 16;

// All of the sixteen. (The plain intrinsics of what follows make gcc 12 warn of what they leave undefined.)
constexpr __mmask16 kAll = 0xFFFF;

static_assert(kRows == 14, "blocks are unrolled, and listed, up to 14 rows");

CK_INLINE int64_t at_most(int64_t n, int64_t most) { return n < most ? n : most; }

// A mask of the first so many, of at most `Most`.
template <int Most>
CK_INLINE uint32_t first_of(int64_t count) {
  return count >= Most ? 0xFFFFFFFFu >> (32 - Most) : count <= 0 ? 0u : (1u << count) - 1u;
}

// Sixteen neighbours in bfloat16, which float32 is rounded to; and thirty-two. Zeros where the mask has none.
CK_INLINE __m256i sixteen(const float* from, __mmask16 mask) {
  return (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, from));
}
CK_INLINE __m256i sixteen(const uint16_t* from, __mmask16 mask) { return _mm256_maskz_loadu_epi16(mask, from); }
CK_INLINE __m512i thirty_two(const float* from, __mmask32 mask) {
  const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from);
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), from + 16), low);
}
CK_INLINE __m512i thirty_two(const uint16_t* from, __mmask32 mask) { return _mm512_maskz_loadu_epi16(mask, from); }

// Sixteen pairs of their low halves and their high ones.
CK_INLINE __m512i sixteen_pairs(__m256i low, __m256i high) {
  const __m512i lows = _mm512_maskz_cvtepu16_epi32(kAll, low), highs = _mm512_maskz_cvtepu16_epi32(kAll, high);
  return _mm512_or_si512(lows, _mm512_maskz_slli_epi32(kAll, highs, 16));
}

// Sixteen lines of sixteen words become columns.
CK_INLINE void transpose(__m512i (&v)[16]) {
  __m512i t[16], u[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_maskz_unpacklo_epi32(kAll, v[i], v[i + 1]);
    t[i + 1] = _mm512_maskz_unpackhi_epi32(kAll, v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int half = 0; half < 2; ++half) {
      u[i + 2 * half] = _mm512_maskz_unpacklo_epi64(0xFF, t[i + half], t[i + half + 2]);
      u[i + 2 * half + 1] = _mm512_maskz_unpackhi_epi64(0xFF, t[i + half], t[i + half + 2]);
    }
  // u[4 g + c] has column 4 q + c of lines 4 g ... 4 g + 3 in its quarter q
  for (int c = 0; c < 4; ++c) {
    const __m512i even_low = _mm512_maskz_shuffle_i32x4(kAll, u[c], u[4 + c], 0x88);
    const __m512i even_high = _mm512_maskz_shuffle_i32x4(kAll, u[8 + c], u[12 + c], 0x88);
    const __m512i odd_low = _mm512_maskz_shuffle_i32x4(kAll, u[c], u[4 + c], 0xDD);
    const __m512i odd_high = _mm512_maskz_shuffle_i32x4(kAll, u[8 + c], u[12 + c], 0xDD);
    v[c] = _mm512_maskz_shuffle_i32x4(kAll, even_low, even_high, 0x88);
    v[4 + c] = _mm512_maskz_shuffle_i32x4(kAll, odd_low, odd_high, 0x88);
    v[8 + c] = _mm512_maskz_shuffle_i32x4(kAll, even_low, even_high, 0xDD);
    v[12 + c] = _mm512_maskz_shuffle_i32x4(kAll, odd_low, odd_high, 0xDD);
  }
}

// How lines of an operand are packed: in blocks of `width` lines, the last one of `last_width`, along the depth, as
// out[block][pair][line], with zeros behind the last line and the last depth.
struct Packing {
  int64_t lines, depth, width, last_width;

  int64_t pairs() const { return (depth + 1) / 2; }
  int64_t width_of(int64_t block) const { return lines - block > width ? width : last_width; }
};

// Neighbours in memory are the lines. All blocks advance together: a line of the cache serves more than one.
template <typename T>
CK_INLINE void pack_neighbouring_lines(const T* first, int64_t depth_stride, const Packing& p, uint32_t* out) {
  for (int64_t k = 0; k < p.depth; k += 2) {
    const T* const low = first + k * depth_stride;
    if (p.lines > p.width)  // the processor does not foresee lines that lie far from one another
      for (const int64_t ahead : {kAhead, kAhead + 1})
        _mm_prefetch(reinterpret_cast<const char*>(low + ahead * depth_stride), _MM_HINT_T0);
    for (int64_t block = 0; block < p.lines; block += p.width) {
      const int64_t width = p.width_of(block);
      uint32_t* const to = out + block * p.pairs() + k / 2 * width;
      for (int64_t line = 0; line < width; line += 16) {
        const T* const from = low + block + line;
        const __mmask16 there = first_of<16>(p.lines - block - line);
        const __m256i high = k + 1 < p.depth ? sixteen(from + depth_stride, there) : _mm256_setzero_si256();
        _mm512_mask_storeu_epi32(to + line, first_of<16>(width - line), sixteen_pairs(sixteen(from, there), high));
      }
    }
  }
}

// Neighbours in memory are the depths.
template <typename T>
CK_INLINE void pack_neighbouring_depths(const T* first, int64_t line_stride, const Packing& p, uint32_t* out) {
  for (int64_t block = 0; block < p.lines; block += p.width) {
    const int64_t width = p.width_of(block), lines = at_most(p.lines - block, width);
    const T* const from = first + block * line_stride;
    uint32_t* const to = out + block * p.pairs();
    for (int64_t line = 0; line < width; line += 16)
      for (int64_t k = 0; k < p.pairs(); k += 16) {
        const __mmask32 there = first_of<32>(p.depth - 2 * k);
        __m512i v[16];
        for (int i = 0; i < 16; ++i)
          v[i] = line + i < lines ? thirty_two(from + (line + i) * line_stride + 2 * k, there) : _mm512_setzero_si512();
        transpose(v);
        for (int i = 0; i < 16 && k + i < p.pairs(); ++i)
          _mm512_mask_storeu_epi32(to + (k + i) * width + line, first_of<16>(width - line), v[i]);
      }
  }
}

template <typename T>
CK_INLINE void pack_from(const T* data, const Operand& from, int64_t line, int64_t k, const Packing& p, uint32_t* out) {
  const T* const first = data + line * from.line_stride + k * from.depth_stride;
  if (from.line_stride == 1)
    pack_neighbouring_lines(first, from.depth_stride, p, out);
  else
    pack_neighbouring_depths(first, from.line_stride, p, out);
}

// Packs an operand from this line and this depth on.
CK_INLINE void pack(const Operand& from, int64_t line, int64_t k, const Packing& p, uint32_t* out) {
  if (from.dtype == Dtype::kBFloat16)
    pack_from(static_cast<const uint16_t*>(from.data), from, line, k, p, out);
  else
    pack_from(static_cast<const float*>(from.data), from, line, k, p, out);
}

CK_INLINE __m512bh as_pairs(__m512i bits) { return (__m512bh)bits; }

// out[Rows][kCols] (+)= a bT of packed blocks.
template <int Rows>
static void multiply_block(const uint32_t* __restrict a, const uint32_t* __restrict b, int64_t pairs, bool add,
                           float* __restrict out, int64_t stride) {
  __m512 sums[Rows][2];
#pragma GCC unroll 14
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < 2; ++j) sums[i][j] = add ? _mm512_loadu_ps(out + i * stride + 16 * j) : _mm512_setzero_ps();
  for (int64_t k = 0; k < pairs; ++k, a += Rows, b += kCols) {
    const __m512bh b0 = as_pairs(_mm512_loadu_si512(b)), b1 = as_pairs(_mm512_loadu_si512(b + 16));
#pragma GCC unroll 14
    for (int i = 0; i < Rows; ++i) {
      const __m512bh value = as_pairs(_mm512_set1_epi32(static_cast<int>(a[i])));
      sums[i][0] = _mm512_dpbf16_ps(sums[i][0], value, b0);
      sums[i][1] = _mm512_dpbf16_ps(sums[i][1], value, b1);
    }
  }
#pragma GCC unroll 14
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < 2; ++j) _mm512_storeu_ps(out + i * stride + 16 * j, sums[i][j]);
}

using Block = void (*)(const uint32_t*, const uint32_t*, int64_t, bool, float*, int64_t);
constexpr Block kBlocks[kRows] = {multiply_block<1>,  multiply_block<2>,  multiply_block<3>,  multiply_block<4>,
                                  multiply_block<5>,  multiply_block<6>,  multiply_block<7>,  multiply_block<8>,
                                  multiply_block<9>,  multiply_block<10>, multiply_block<11>, multiply_block<12>,
                                  multiply_block<13>, multiply_block<14>};

// The same at the right edge, `cols` of it, by way of a block of its own: a sum does not depend on where it lies.
static void multiply_edge(const uint32_t* a, const uint32_t* b, int64_t pairs, bool add, float* out, int64_t stride,
                          int64_t rows, int64_t cols) {
  alignas(64) float block[kRows * kCols] = {};
  for (int64_t i = 0; add && i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) block[i * kCols + j] = out[i * stride + j];
  kBlocks[rows - 1](a, b, pairs, add, block, kCols);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) out[i * stride + j] = block[i * kCols + j];
}

// sums[j] += value * y[j0 + j, k] of the entries of row i, for so many columns.
static void add_entries(const Product& p, const ProductPlan& plan, int64_t i, int64_t j0, int64_t cols, float* sums) {
  for (int64_t e = plan.row_start[i]; e < plan.row_start[i + 1]; ++e) {
    const uint16_t* const y = static_cast<const uint16_t*>(p.y.data) + plan.depths[e] * p.y.depth_stride + j0;
    const __m512 value = _mm512_set1_ps(plan.values[e]);
    for (int64_t j = 0; j < cols; j += 16) {
      const __mmask16 there = first_of<16>(cols - j);
      const __m512i wide = _mm512_maskz_slli_epi32(kAll, _mm512_maskz_cvtepu16_epi32(kAll, sixteen(y + j, there)), 16);
      const __m512 sum = _mm512_fmadd_ps(value, _mm512_castsi512_ps(wide), _mm512_maskz_loadu_ps(there, sums + j));
      _mm512_mask_storeu_ps(sums + j, there, sum);
    }
  }
}

static void round_row(const float* sums, int64_t cols, uint16_t* out) {
  for (int64_t j = 0; j < cols; j += 32) {
    const __mmask32 there = first_of<32>(cols - j);
    _mm512_mask_storeu_epi16(out + j, there, thirty_two(sums + j, there));
  }
}

// Rows first ... last - 1, columns begin ... end - 1 of the result, in one thread. `own_sums`: where its sums lie, if
// not in the result.
static void multiply_part(const Product& p, const ProductPlan& plan, int64_t first, int64_t last, int64_t begin,
                          int64_t end, uint32_t* packed, float* own_sums) {
  uint32_t* const packed_cols = packed + plan.of_rows;
  const int64_t stride = own_sums ? kProductCols : p.stride, group = plan.group * plan.height;
  for (int64_t j0 = begin; j0 < end; j0 += kProductCols) {
    const int64_t cols = at_most(end - j0, kProductCols);
    for (int64_t k0 = 0; k0 < p.depth; k0 += kDepth) {
      const int64_t depth = at_most(p.depth - k0, kDepth), pairs = (depth + 1) / 2;
      const bool add = p.add || k0 > 0, done = k0 + depth == p.depth;
      pack(p.y, j0, k0, {cols, depth, kCols, kCols}, packed_cols);
      for (int64_t i = first; i < last; i += plan.height) {
        const int64_t rows = at_most(last - i, plan.height);
        float* sums = own_sums;
        if (!own_sums)
          sums = static_cast<float*>(p.out) + i * stride + j0;
        else if (p.depth > kDepth)
          sums += (i - first) * stride;
        if ((i - first) % group == 0) {
          const int64_t lines = at_most(last - i, group), rest = lines % plan.height;
          pack(p.x, i, k0, {lines, depth, plan.height, rest ? rest : plan.height}, packed);
        }
        const uint32_t* const packed_rows = packed + (i - first) % group * pairs;
        for (int64_t j = 0; j < cols; j += kCols) {
          if (own_sums || cols - j >= kCols)  // whose rows are whole blocks
            kBlocks[rows - 1](packed_rows, packed_cols + j * pairs, pairs, add, sums + j, stride);
          else
            multiply_edge(packed_rows, packed_cols + j * pairs, pairs, add, sums + j, stride, rows, cols - j);
        }
        for (int64_t row = 0; done && row < rows; ++row) {
          if (plan.row_start) add_entries(p, plan, i + row, j0, cols, sums + row * stride);
          if (own_sums) round_row(sums + row * stride, cols, static_cast<uint16_t*>(p.out) + (i + row) * p.stride + j0);
        }
      }
    }
  }
}

void multiply(const Product& p, const ProductPlan& plan) {
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t part = 0; part < plan.row_parts * plan.col_parts; ++part) {
#ifdef _OPENMP
    const int64_t thread = omp_get_thread_num();
#else
    const int64_t thread = 0;
#endif
    const int64_t first = part / plan.col_parts * plan.rows, begin = part % plan.col_parts * plan.cols;
    multiply_part(p, plan, first, first + at_most(p.rows - first, plan.rows), begin,
                  begin + at_most(p.cols - begin, plan.cols), plan.packed + thread * plan.of_thread,
                  plan.sums ? plan.sums + thread * plan.of_sums : nullptr);
  }
}

}  // namespace avx512bf16
}  // namespace ck
