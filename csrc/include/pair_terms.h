// The pair terms: what happens to one score. Plain functions of floats, compiled by g++ (vectorised, once per
// instruction set) and by nvcc.
//
// Whoever includes this file on the CPU does so inside a namespace of its own instruction set: with external linkage
// the linker would keep a single copy of each function, possibly one the machine cannot execute.
#ifndef CK_PAIR_TERMS_H
#define CK_PAIR_TERMS_H

#ifdef __CUDACC__
#define CK_INLINE __host__ __device__ __forceinline__
#else
#define CK_INLINE static inline __attribute__((always_inline))
#endif

#endif  // the functions themselves are included once per namespace

// e^x to 1.5 units in the last place for x in [-87.33, 88.72]; 0 below, inf above, NaN for NaN.
// Range reduction x = n ln 2 + r with Cody and Waite's two-part constant, then the degree-5 polynomial of Cephes' expf.
CK_INLINE float exp_term(float x) {
#ifdef __CUDA_ARCH__
  return expf(x);
#else
  constexpr float kLowest = -87.33654f;   // log of the smallest normal number: no subnormals come out
  constexpr float kHighest = 88.72283f;   // log of the largest number
  constexpr float kRound = 12582912.0f;   // 1.5 * 2^23: adding it rounds to an integer, kept in the low mantissa bits
  const float clamped = x < kLowest ? kLowest : (x > kHighest ? kHighest : x);
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
  // 2^n in two factors, because n = 128 alone is not a float
  int bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  const int exponent = bits - 0x4B400000;
  const int half = exponent >> 1;
  const int first_bits = (half + 127) << 23;
  const int second_bits = (exponent - half + 127) << 23;
  float first, second;
  __builtin_memcpy(&first, &first_bits, sizeof first);
  __builtin_memcpy(&second, &second_bits, sizeof second);
  const float value = (p * first) * second;
  return x < kLowest ? 0.0f : (x > kHighest ? __builtin_inff() : value);
#endif
}

// log(1 + e) for e in [0, 1], as 2 artanh(e / (2 + e)): relative error below 4e-7 also where e is tiny.
CK_INLINE float log1p_unit(float e) {
  const float t = e / (2.0f + e);
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

// The sigmoid loss of a negative pair and its derivative by z, from e = exp(-|z|).
CK_INLINE float softplus_from(float z, float e) { return (z > 0.0f ? z : 0.0f) + log1p_unit(e); }
CK_INLINE float sigmoid_from(float z, float e) { return (z >= 0.0f ? 1.0f : e) / (1.0f + e); }

// One step of the (maximum, sum) monoid: sum of exponentials relative to a reference that may rise.
CK_INLINE void merge_exponential(float& reference, float& sum, float other_reference, float other_sum) {
  if (!(other_sum != 0.0f)) return;  // an empty part; NaN is not empty
  if (!(sum != 0.0f)) {
    reference = other_reference;
    sum = other_sum;
  } else if (other_reference > reference) {
    sum = sum * exp_term(reference - other_reference) + other_sum;
    reference = other_reference;
  } else {
    sum = sum + other_sum * exp_term(other_reference - reference);
  }
}
