// Elementary functions of floats, with which the pair terms are made; compiled by g++ (vectorised, once per instruction
// set) and by nvcc. Needs inline.h.
//
// Whoever includes this file or a term on the CPU does so inside a namespace of its own instruction set: with external
// linkage the linker would keep a single copy of each function, possibly one the machine cannot execute.

// e^x to 1.5 units in the last place for x in [-87.33, 88.37]; 0 below -87.7, constant (2.4e38) above, NaN for NaN.
// Range reduction x = n ln 2 + r with Cody and Waite's two-part constant, then the degree-5 polynomial of Cephes' expf.
CK_INLINE float exp_term(float x) {
#ifdef __CUDA_ARCH__
  return expf(x > 88.37f ? 88.37f : x);  // this order keeps NaN
#else
  constexpr float kLowest = -88.0f;      // n = -127, whose power of two below is exactly 0
  constexpr float kHighest = 88.37f;     // n = 127, the largest power of two
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low mantissa bits
  const float above = kLowest > x ? kLowest : x;  // this order keeps NaN
  const float clamped = kHighest < above ? kHighest : above;
  const float shifted = clamped * 1.44269504088896341f + kRound;
  const float n = shifted - kRound;
  const float r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  unsigned bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3F800000u;  // n + 127 moves to the exponent, all else of kRound is shifted out
  float power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return p * power;
#endif
}

// a / b for b in [1, 4], where the device's short division has 2 units in the last place.
CK_INLINE float quotient(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdividef(a, b);
#else
  return a / b;
#endif
}

// log(1 + e) for e in [0, 1], as 2 artanh(e / (2 + e)): relative error below 4e-7 also where e is tiny.
CK_INLINE float log1p_unit(float e) {
  const float t = quotient(e, 2.0f + e);
  const float q = t * t;
  float p = 1.0f / 15.0f;
  p = p * q + 1.0f / 13.0f;
  p = p * q + 1.0f / 11.0f;
  p = p * q + 1.0f / 9.0f;
  p = p * q + 1.0f / 7.0f;
  p = p * q + 1.0f / 5.0f;
  p = p * q + 1.0f / 3.0f;
  p = p * q + 1.0f;
  return 2.0f * t * p;
}
