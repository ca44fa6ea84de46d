// The exponential term: w_ij = r_i exp(z_ij - a_i) + c_j exp(z_ij - b_j); state: a shift and the sum of exp(z - shift),
// of rows and of columns. Needs elementary.h.

// One step of the (shift, sum) monoid: a sum of exponentials relative to a shift that may rise. A sum of 0 is an empty
// part, whatever its shift; a NaN is not empty. Branch-free, for loops over many of them.
CK_INLINE void merge_exponential(float& shift, float& sum, float other_shift, float other_sum) {
  const float mine = sum != 0.0f ? shift : -__builtin_inff();
  const float theirs = other_sum != 0.0f ? other_shift : -__builtin_inff();
  const float higher = mine > theirs ? mine : theirs;
  const float my_part = sum * exp_term(mine - higher);
  const float their_part = other_sum * exp_term(theirs - higher);
  sum = (sum != 0.0f ? my_part : 0.0f) + (other_sum != 0.0f ? their_part : 0.0f);
  shift = higher;
}

// One exponential per score serves rows and columns while every shift lies this close to a common one: what then
// underflows is below e^(40 - 87) of its row's and its column's largest term.
constexpr float kCommonShiftSpread = 40.0f;

// ... and while no gain's exponential against it comes near the largest number.
constexpr float kLargestGainExponent = 80.0f;

// Whether shifts from `low` to `high` can all be replaced by `high`. A gain must not saturate where the exponential it
// belongs to is small. An empty or infinite range is not narrow.
CK_INLINE bool share_shift(float low, float high, float lowest_normalizer) {
  return high - low <= kCommonShiftSpread && low <= high && !(high - lowest_normalizer > kLargestGainExponent);
}

// A shift that exponentials can be taken against: a row of nothing (-inf) gets 0, and keeps an empty sum.
CK_INLINE float finite_shift(float maximum) { return maximum == -__builtin_inff() ? 0.0f : maximum; }

// The shift of weights whose sums nobody wants: the normaliser, rounded, so that no exponent is large.
CK_INLINE float normalizer_as_shift(float normalizer_shift, float normalizer_rest) {
  const float rounded = normalizer_shift + normalizer_rest;
  return rounded - rounded == 0.0f ? rounded : normalizer_shift;
}

// gain * e^(shift - normalizer), the factor of an exponential taken against `shift`: exact where both are large, for
// their difference is. The exponential saturates, so that a gain of zero stays zero. A rest of +inf says that there are
// no negatives, and gives zero.
CK_INLINE float refer_gain(float gain, float normalizer_shift, float normalizer_rest, float shift) {
  const float factor = exp_term((shift - normalizer_shift) - normalizer_rest);
  return normalizer_rest == __builtin_inff() ? 0.0f : gain * factor;
}
