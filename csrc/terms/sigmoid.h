// The sigmoid term: w_ij = r_i sigmoid(z_ij); state: the row's sum of softplus(z_ij). Needs elementary.h.

// The sigmoid loss of a negative pair and its derivative by z, from e = exp(-|z|).
CK_INLINE float softplus_from(float z, float e) { return (z > 0.0f ? z : 0.0f) + log1p_unit(e); }
CK_INLINE float sigmoid_from(float z, float e) { return quotient(z >= 0.0f ? 1.0f : e, 1.0f + e); }

// The term as the loops over pairs see it.
struct Sigmoid {
  static constexpr bool kHasShift = false, kRow = true, kCol = false;
  static constexpr bool kSigned = true;  // pairs of equal ids are positives: -z in the place of z, and -w of w
  static constexpr bool kTargets = false;
  using WithCommonShift = Sigmoid;

  // exp(-|z|), of which both the pair's loss and its weight are made.
  CK_INLINE float row_score(float z, float) { return exp_term(z > 0.0f ? -z : z); }
  CK_INLINE float col_score(float, float, float) { return 0.0f; }
  CK_INLINE float row_part(float z, float row_score) { return softplus_from(z, row_score); }

  CK_INLINE float weight(float z, float row_score, float, float row_gain, float) {
    return row_gain * sigmoid_from(z, row_score);
  }

  CK_INLINE void merge(float*, float* sum, const float*, const float* other_sum, int64_t i) { sum[i] += other_sum[i]; }
};
