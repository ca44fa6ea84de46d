// The sigmoid term: w_ij = r_i sigmoid(z_ij); state: the row's sum of softplus(z_ij). Needs elementary.h.

// The sigmoid loss of a negative pair and its derivative by z, from e = exp(-|z|).
CK_INLINE float softplus_from(float z, float e) { return (z > 0.0f ? z : 0.0f) + log1p_unit(e); }
CK_INLINE float sigmoid_from(float z, float e) { return quotient(z >= 0.0f ? 1.0f : e, 1.0f + e); }
