// The CPU's pass over a panel whose rows and columns have scales of their own, included by one source file per
// instruction set inside its own namespace. A score has two logits,
//   row_scale_i * score + bias among its row's, and col_scale_j * score + bias among its column's,
// and so two exponentials; its weight is the sum of both sides' by the score:
//   row_scale_i * dL/d(row's logit) + col_scale_j * dL/d(column's logit).

static void add(const float* __restrict from, int64_t n, float* __restrict to) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] += from[i];
}

// Rows are read where they lie; those of which pairs are left out are copied, with -inf in the place of their scores.
static void find_scores(const Panel& p, const Chunk& c, Scratch& s) {
  const int64_t stride = copy_stride(c.cols);
  for (int64_t i = 0; i < c.rows; ++i) {
    const RowSource lies = {p.scores + (c.row0 + i) * p.stride + c.col0, 1.0f, 0.0f};
    s.rows[i] = find_source<false>(p.pairs, lies, c.row0 + i, c.col0, c.cols, -__builtin_inff(), s.z + i * stride);
  }
}

// A score's logit, -inf for one that is left out, whatever the sign of the scale.
CK_INLINE float logit_of(float score, float scale, float bias) {
  return score == -__builtin_inff() ? score : score * scale + bias;
}

// row_shift and col_shift become the chunk's maxima of the logits within their LIMITS, as find_maxima's.
template <Limits LIMITS>
static void find_scaled_maxima(const Panel& p, const Chunk& c, Scratch& s) {
  constexpr bool kCapped = LIMITS != Limits::kNone, kGuided = LIMITS == Limits::kGuide;
  const float bias = p.params[1];
  const float* __restrict col_scale = p.pairs.col_scale + c.col0;
  const float* __restrict col_ceiling = s.col_ceiling;
  const float* __restrict col_limit = s.col_threshold;
  float* __restrict col = s.col_shift;
  fill(col, c.cols, -__builtin_inff());
  for (int64_t i = 0; i < c.rows; ++i) {
    const float* __restrict score = s.rows[i].source;
    const float* guide = kGuided ? guide_of(p, c, i) : nullptr;
    const float scale = p.pairs.row_scale[c.row0 + i], ceiling = kCapped ? row_ceiling(p, c.row0 + i) : kNoCeiling;
    const float limit = kGuided ? row_threshold(p, c.row0 + i) : kNoCeiling;
    float best = -__builtin_inff();
#pragma omp simd reduction(max : best)
    for (int64_t j = 0; j < c.cols; ++j) {
      float by_row = logit_of(score[j], scale, bias), by_col = logit_of(score[j], col_scale[j], bias);
      if (kCapped) {
        by_row = score[j] * scale > ceiling ? -__builtin_inff() : by_row;
        by_col = score[j] * col_scale[j] > col_ceiling[j] ? -__builtin_inff() : by_col;
      }
      if (kGuided) {
        by_row = guide[j] > limit ? -__builtin_inff() : by_row;
        by_col = guide[j] > col_limit[j] ? -__builtin_inff() : by_col;
      }
      best = by_row > best ? by_row : best;
      col[j] = by_col > col[j] ? by_col : col[j];
    }
    s.row_shift[i] = best;
  }
}

// The sums of a reduce panel (Out: void), or the weights with their parts of the scales' gradients. TARGETS, IDS,
// LIMITS: as in sweep.
template <typename Out, bool TARGETS, bool IDS, Limits LIMITS>
static __attribute__((noinline)) void sweep_scaled(const Panel& p, const Chunk& c, Scratch& s) {
  constexpr bool kWeights = !std::is_same<Out, void>::value;
  constexpr bool kCapped = LIMITS != Limits::kNone, kGuided = LIMITS == Limits::kGuide;
  using Store = typename std::conditional<kWeights, Out, float>::type;
  const float factor = p.factor ? *p.factor : p.params[0], bias = p.params[1], center = p.params[2];
  const float* __restrict col_scale = p.pairs.col_scale + c.col0;
  const float* __restrict col_shift = s.col_shift;
  const float* __restrict col_gain = s.col_gain;
  const float* __restrict col_ceiling = s.col_ceiling;
  const float* __restrict col_limit = s.col_threshold;
  float* __restrict col_sum = kWeights ? s.col_moment : s.col_sum;
  fill(col_sum, c.cols, 0.0f);
  for (int64_t i = 0; i < c.rows; ++i) {
    const float *source = s.rows[i].source, *score = p.scores + (c.row0 + i) * p.stride + c.col0;
    const int64_t id = IDS ? p.pairs.row_ids[c.row0 + i] : 0, *ids = IDS ? p.pairs.col_ids + c.col0 : nullptr;
    Store* out = kWeights ? static_cast<Store*>(p.weights) + (c.row0 + i) * p.weights_stride + c.col0 : nullptr;
    const float row_scale = p.pairs.row_scale[c.row0 + i], row_shift = s.row_shift[i];
    const float row_gain = kWeights ? s.row_gain[i] : 0.0f;
    const float ceiling = kCapped ? row_ceiling(p, c.row0 + i) : kNoCeiling;
    const float* guide = kGuided ? guide_of(p, c, i) : nullptr;
    const float limit = kGuided ? row_threshold(p, c.row0 + i) : kNoCeiling;
    const Targets targets = TARGETS ? Targets(p, c, i) : Targets();
    float sum = 0.0f;
    // `out` may be `score` itself, element by element: no restrict here.
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < c.cols; ++j) {
      const float by_row = logit_of(source[j], row_scale, bias), by_col = logit_of(source[j], col_scale[j], bias);
      float of_row = exp_term(by_row - row_shift), of_col = exp_term(by_col - col_shift[j]);
      if (kCapped) {
        of_row = source[j] * row_scale > ceiling ? 0.0f : of_row;
        of_col = source[j] * col_scale[j] > col_ceiling[j] ? 0.0f : of_col;
      }
      if (kGuided) {
        of_row = guide[j] > limit ? 0.0f : of_row;
        of_col = guide[j] > col_limit[j] ? 0.0f : of_col;
      }
      if (kWeights) {
        of_row *= row_gain, of_col *= col_gain[j];
        if (TARGETS) {
          const bool alike = IDS && ids[j] == id, out_of_it = source[j] == -__builtin_inff();
          of_row = out_of_it ? 0.0f : of_row - (alike ? targets.row_alike : targets.row);
          of_col = out_of_it ? 0.0f : of_col - (alike ? targets.col_alike[j] : targets.col[j]);
        }
        const float centered = score[j] - center;
        store_weight(out, j, (of_row * row_scale + of_col * col_scale[j]) * factor);
        of_row *= centered, of_col *= centered;
      }
      sum += of_row;
      col_sum[j] += of_col;
    }
    (kWeights ? s.row_moment : s.row_sum)[i] = sum;
  }
}

// The shifts of a chunk of weights, which are the normalisers, and the gains that go with them.
static void choose_scaled_shifts(const Panel& p, const Chunk& c, Scratch& s) {
  Range unused;
  round_normalizers(p.row, c.row0, s.row_shift, c.rows, unused);
  round_normalizers(p.col, c.col0, s.col_shift, c.cols, unused);
  refer_gains(p.row, c.row0, s.row_shift, s.row_gain, c.rows);
  refer_gains(p.col, c.col0, s.col_shift, s.col_gain, c.cols);
}

template <typename Out, bool TARGETS, bool IDS, Limits LIMITS>
static void run_scaled_chunk(const Panel& p, const Chunk& c, Scratch& s) {
  find_scores(p, c, s);
  if (LIMITS != Limits::kNone) find_limits(p, c, s);
  if constexpr (std::is_same<Out, void>::value) {
    find_scaled_maxima<LIMITS>(p, c, s);
    make_finite(s.row_shift, c.rows);
    make_finite(s.col_shift, c.cols);
  } else {
    choose_scaled_shifts(p, c, s);
  }
  sweep_scaled<Out, TARGETS, IDS, LIMITS>(p, c, s);
}

template <typename Out, bool TARGETS, bool IDS, Limits LIMITS>
static void run_scaled_stripes(const Panel& p, const Buffers& buffers) {
  using Term = Exponential<false, true, true>;
  for_stripes<Term>(p, buffers, [&](int64_t stripe, Scratch& s) {
    Chunk c = {stripe * kStripe, smaller(kStripe, p.rows - stripe * kStripe), 0, 0};
    for (; c.col0 < p.cols; c.col0 += kChunk) {
      c.cols = smaller(kChunk, p.cols - c.col0);
      const int64_t first = stripe * p.cols + c.col0;
      run_scaled_chunk<Out, TARGETS, IDS, LIMITS>(p, c, s);
      if (p.row.sum) merge_states<Term>(p.row.shift + c.row0, p.row.sum + c.row0, s.row_shift, s.row_sum, c.rows);
      if (p.col.sum)
        copy(s.col_shift, c.cols, buffers.col_shift + first), copy(s.col_sum, c.cols, buffers.col_sum + first);
      if (p.row.dscale) add(s.row_moment, c.rows, p.row.dscale + c.row0);
      if (p.col.dscale) copy(s.col_moment, c.cols, buffers.col_moment + first);
    }
    return ParamSums();
  });
  const int64_t stripes = (p.rows + kStripe - 1) / kStripe;
  for (int64_t stripe = 0; p.col.dscale && stripe < stripes; ++stripe)  // in order
    add(buffers.col_moment + stripe * p.cols, p.cols, p.col.dscale);
}

template <typename Out>
static void run_scaled_weights(const Panel& p, const Buffers& buffers) {
  if (p.pairs.guide) return run_scaled_stripes<Out, false, false, Limits::kGuide>(p, buffers);
  if (p.pairs.row_ceiling || p.pairs.col_ceiling)
    return run_scaled_stripes<Out, false, false, Limits::kCeilings>(p, buffers);
  if (!p.row.target) return run_scaled_stripes<Out, false, false, Limits::kNone>(p, buffers);
  p.pairs.row_ids ? run_scaled_stripes<Out, true, true, Limits::kNone>(p, buffers)
                  : run_scaled_stripes<Out, true, false, Limits::kNone>(p, buffers);
}

void run_scaled(const Panel& p, const Buffers& buffers) {
  if (!p.weights && p.pairs.guide) return run_scaled_stripes<void, false, false, Limits::kGuide>(p, buffers);
  if (!p.weights)
    return p.pairs.row_ceiling || p.pairs.col_ceiling
               ? run_scaled_stripes<void, false, false, Limits::kCeilings>(p, buffers)
               : run_scaled_stripes<void, false, false, Limits::kNone>(p, buffers);
  p.weights_dtype == Dtype::kFloat32 ? run_scaled_weights<float>(p, buffers) : run_scaled_weights<uint16_t>(p, buffers);
}
