// Noise that depends on nothing but (seed, row, column): Philox4x32-10 (Salmon, Moraes, Dror, Shaw, SC 2011), and from
// its words Gumbel(0, 1). contrastive_kernels/draws/philox.py defines what comes out. Needs inline.h; included as
// elementary.h is.

// The high half of a 32-bit product.
CK_INLINE uint32_t multiply_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}

// The four words of the counter (group, row, 0, 0): those of columns 4 group ... 4 group + 3.
CK_INLINE void philox_words(uint32_t group, uint32_t row, uint32_t key0, uint32_t key1, uint32_t& w0, uint32_t& w1,
                            uint32_t& w2, uint32_t& w3) {
  uint32_t c0 = group, c1 = row, c2 = 0, c3 = 0;
#ifdef __clang__
#pragma clang loop unroll(full)
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = multiply_high(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
    const uint32_t high1 = multiply_high(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
    c0 = high1 ^ c1 ^ key0;
    c1 = low1;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  w0 = c0, w1 = c1, w2 = c2, w3 = c3;
}

// v in (0, 1) from a word.
CK_INLINE float uniform_from(uint32_t word) {
  const float v = (static_cast<float>(word) + 0.5f) * 0x1p-32f;
  return v < 1.0f - 0x1p-24f ? v : 1.0f - 0x1p-24f;
}

// 2 artanh t for |t| <= 0.172, to one unit in the last place.
CK_INLINE float twice_artanh(float t) {
  const float q = t * t;
  float p = 1.0f / 11.0f;
  p = p * q + 1.0f / 9.0f;
  p = p * q + 1.0f / 7.0f;
  p = p * q + 1.0f / 5.0f;
  p = p * q + 1.0f / 3.0f;
  return 2.0f * t + 2.0f * t * q * p;
}

// log x for a positive normal x, as exponent * ln 2 + 2 artanh((m - 1) / (m + 1)) with m in [1/sqrt 2, sqrt 2).
CK_INLINE float log_term(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  const uint32_t shifted = bits - 0x3F3504F3u;  // of 1/sqrt 2: the exponent counts from there
  const int32_t exponent = static_cast<int32_t>(shifted) >> 23;
  const uint32_t mantissa = (shifted & 0x007FFFFFu) + 0x3F3504F3u;
  float m;
  __builtin_memcpy(&m, &mantissa, sizeof m);
  const float e = static_cast<float>(exponent);
  return e * 0.693359375f + (twice_artanh((m - 1.0f) / (m + 1.0f)) + e * -2.12194440e-4f);
}

// Gumbel(0, 1) noise from a word: -log(-log(1 - v)). A small v, a large noise, has a series of its own.
CK_INLINE float gumbel_from(uint32_t word) {
  const float v = uniform_from(word);
  const float exponential = v < 0.25f ? twice_artanh(v / (2.0f - v)) : -log_term(1.0f - v);
  return -log_term(exponential);
}
