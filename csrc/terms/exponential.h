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

// The term as the loops over pairs see it. COMMON: rows and columns share one shift, and one exponential serves both.
// ROW, COL: the sides that take part. TARGETS: they have targets, which come off the weights.
template <bool COMMON, bool ROW, bool COL, bool TARGETS = false>
struct Exponential {
  static constexpr bool kHasShift = true, kRow = ROW, kCol = COL;
  static constexpr bool kSigned = false;  // pairs of equal ids are left out
  static constexpr bool kTargets = TARGETS;
  using WithCommonShift = Exponential<true, ROW, COL, TARGETS>;

  // A pair's exponentials, which are its parts of the row's and the column's sums.
  CK_INLINE float row_score(float z, float row_shift) { return COMMON || ROW ? exp_term(z - row_shift) : 0.0f; }
  CK_INLINE float col_score(float z, float row_score, float col_shift) {
    return COMMON ? row_score : COL ? exp_term(z - col_shift) : 0.0f;
  }
  CK_INLINE float row_part(float, float row_score) { return row_score; }

  CK_INLINE float weight(float, float row_score, float col_score, float row_gain, float col_gain) {
    if constexpr (!COL) return row_score * row_gain;
    if constexpr (!ROW) return col_score * col_gain;
    return COMMON ? row_score * (row_gain + col_gain) : row_score * row_gain + col_score * col_gain;
  }

  CK_INLINE void merge(float* shift, float* sum, const float* other_shift, const float* other_sum, int64_t i) {
    merge_exponential(shift[i], sum[i], other_shift[i], other_sum[i]);
  }
};

// What may leave a pair out of its row's part and not of its column's: nothing; ceilings of scores; these and
// thresholds of a guide's scores.
enum class Limits { kNone, kCeilings, kGuide };

// Whose weights a term has: with ceilings, rows and columns may share a shift and no exponential.
template <class Term, bool CAPPED>
struct WeightsOf {
  using Type = Term;
};
template <bool COMMON, bool ROW, bool COL>
struct WeightsOf<Exponential<COMMON, ROW, COL>, true> {
  using Type = Exponential<false, ROW, COL>;
};
