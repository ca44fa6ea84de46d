// The CPU's pass over one panel of scores, included by one source file per instruction set inside its own namespace.
//
// A panel is cut into stripes of kStripe rows and each stripe into chunks of kChunk
// columns, small enough to stay in a core's cache between the two sweeps:
//   sweep 1  the maximum of every row and column of z = scale * score + bias, excluded pairs at -inf;
//   sweep 2  each pair's part of the sums by row and column, exponentials against a shift, and the weights.
// What a pair's parts are is the term's to say (csrc/terms); one without a shift has no sweep 1.
// Stripes do not depend on the number of threads, and their partial results are merged in order: results are
// bitwise reproducible.

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The part of a panel that one call of the sweeps works on.
struct Chunk {
  int64_t row0, rows, col0, cols;
};

// From one row's copy to the next one's: not a power of two, whose rows would share the lines of a cache.
static int64_t copy_stride(int64_t cols) { return smaller((cols + 15) / 16 * 16 + 16, kChunk); }

// Rows are read where they lie; those of whose pairs something is said are copied.
template <class Term>
static void find_sources(const Panel& p, const Chunk& c, Scratch& s) {
  const int64_t stride = copy_stride(c.cols);
  for (int64_t i = 0; i < c.rows; ++i) {
    const RowSource lies = {p.scores + (c.row0 + i) * p.stride + c.col0, p.params[0], p.params[1]};
    s.rows[i] =
        find_source<Term::kSigned>(p.pairs, lies, c.row0 + i, c.col0, c.cols, -__builtin_inff(), s.z + i * stride);
  }
}

// The ceiling of a side that has none.
constexpr float kNoCeiling = __builtin_inff();

static float row_ceiling(const Panel& p, int64_t row) {
  return p.pairs.row_ceiling ? p.pairs.row_ceiling[row] : kNoCeiling;
}

static float row_threshold(const Panel& p, int64_t row) {
  return p.pairs.row_threshold ? p.pairs.row_threshold[row] : kNoCeiling;
}

// A guide's scores of one row of a chunk.
static const float* guide_of(const Panel& p, const Chunk& c, int64_t i) {
  return p.pairs.guide + (c.row0 + i) * p.pairs.guide_stride + c.col0;
}

// row_shift and col_shift become the chunk's maxima (NaN is passed over here and kept by the sums), of the pairs within
// their LIMITS.
template <Limits LIMITS>
static void find_maxima(const Panel& p, const Chunk& c, Scratch& s) {
  constexpr bool kCapped = LIMITS != Limits::kNone, kGuided = LIMITS == Limits::kGuide;
  for (int64_t j = 0; j < c.cols; ++j) s.col_shift[j] = -__builtin_inff();
  for (int64_t i = 0; i < c.rows; ++i) {
    const RowSource row = s.rows[i];
    float* __restrict col = s.col_shift;
    const float* __restrict col_ceiling = s.col_ceiling;
    const float* __restrict col_limit = s.col_threshold;
    const float* score = p.scores + (c.row0 + i) * p.stride + c.col0;
    const float* guide = kGuided ? guide_of(p, c, i) : nullptr;
    const float scale = p.params[0], ceiling = kCapped ? row_ceiling(p, c.row0 + i) : kNoCeiling;
    const float limit = kGuided ? row_threshold(p, c.row0 + i) : kNoCeiling;
    float best = -__builtin_inff();
#pragma omp simd reduction(max : best)
    for (int64_t j = 0; j < c.cols; ++j) {
      const float z = row.source[j] * row.scale + row.bias;
      const float scaled = kCapped ? score[j] * scale : z;
      float by_row = kCapped && scaled > ceiling ? -__builtin_inff() : z;
      float by_col = kCapped && scaled > col_ceiling[j] ? -__builtin_inff() : z;
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

// The smallest and the largest of some numbers, NaN passed over.
struct Range {
  float low = __builtin_inff(), high = -__builtin_inff();
};

static void extend(Range& range, const float* v, int64_t n) {
  float low = range.low, high = range.high;
#pragma omp simd reduction(min : low) reduction(max : high)
  for (int64_t i = 0; i < n; ++i) {
    low = v[i] < low ? v[i] : low;
    high = v[i] > high ? v[i] : high;
  }
  range = {low, high};
}

static void copy(const float* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

static void fill(float* to, int64_t n, float value) {
  for (int64_t i = 0; i < n; ++i) to[i] = value;
}

static void make_finite(float* shift, int64_t n) {
  for (int64_t i = 0; i < n; ++i) shift[i] = finite_shift(shift[i]);
}

// The same where gains follow: a row of nothing that shares no shift gets its normaliser. Against 0 the gain might
// overflow, and infinity times nothing is NaN.
static void make_finite(float* shift, const float* normalizer, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float otherwise = normalizer[i] - normalizer[i] == 0.0f ? normalizer[i] : 0.0f;
    shift[i] = shift[i] == -__builtin_inff() ? otherwise : shift[i];
  }
}

// The ceilings or thresholds of a chunk's columns; null: they have none.
static void find_limits(const float* of_cols, const Chunk& c, float* limit) {
  if (of_cols)
    copy(of_cols + c.col0, c.cols, limit);
  else
    fill(limit, c.cols, kNoCeiling);
}

static void find_limits(const Panel& p, const Chunk& c, Scratch& s) {
  find_limits(p.pairs.col_ceiling, c, s.col_ceiling);
  if (p.pairs.guide) find_limits(p.pairs.col_threshold, c, s.col_threshold);
}

// The range of shifts, a row of nothing as 0.
static void extend_finite(Range& range, const float* shift, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float v = finite_shift(shift[i]);
    range.low = v < range.low ? v : range.low;
    range.high = v > range.high ? v : range.high;
  }
}

static void refer_gains(const Side& side, int64_t first, const float* shift, float* out, int64_t n) {
  const float* __restrict gain = side.gain + first;
  const float* __restrict normalizer_shift = side.normalizer_shift + first;
  const float* __restrict normalizer_rest = side.normalizer_rest + first;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = refer_gain(gain[i], normalizer_shift[i], normalizer_rest[i], shift[i]);
}

// The normalisers, rounded, and the range of all.
static void round_normalizers(const Side& side, int64_t first, float* out, int64_t n, Range& all) {
  const float* __restrict shift = side.normalizer_shift + first;
  const float* __restrict rest = side.normalizer_rest + first;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = normalizer_as_shift(shift[i], rest[i]);
  extend(all, out, n);
}

static inline void store_weight(float* out, int64_t j, float w) { out[j] = w; }
static inline void store_weight(uint16_t* out, int64_t j, float w) { out[j] = to_bfloat16(w); }

// What comes off the weights of one row of a chunk: its own targets, and its columns'.
struct Targets {
  float row = 0.0f, row_alike = 0.0f;
  const float *col = nullptr, *col_alike = nullptr;

  Targets() = default;
  Targets(const Panel& p, const Chunk& c, int64_t i) {
    if (p.row.target) row = p.row.target[c.row0 + i], row_alike = p.row.target_alike[c.row0 + i];
    if (p.col.target) col = p.col.target + c.col0, col_alike = p.col.target_alike + c.col0;
  }
};

// Sweep 2: the pairs' parts of row_sum and col_sum, where SUMS wants them, and the weights. Out: void for a reduce
// panel. IDS: pairs of equal ids are the term's positives, or have targets of their own. LIMITS: pairs above those of
// rows and columns are left out of these.
template <class Term, bool SUMS, typename Out, bool IDS = false, Limits LIMITS = Limits::kNone>
static __attribute__((noinline)) void sweep(const Panel& p, const Chunk& c, Scratch& s, ParamSums& params) {
  constexpr bool kWeights = !std::is_same<Out, void>::value;
  using Store = typename std::conditional<kWeights, Out, float>::type;
  constexpr bool kCapped = LIMITS != Limits::kNone, kGuided = LIMITS == Limits::kGuide;
  using Weights = typename WeightsOf<Term, kCapped>::Type;
  const float factor = p.factor ? *p.factor : p.params[0], center = p.params[2];
  const float* __restrict col_shift = s.col_shift;
  const float* __restrict col_gain = s.col_gain;
  const float* __restrict col_ceiling = s.col_ceiling;
  const float* __restrict col_limit = s.col_threshold;
  float* __restrict col_sum = s.col_sum;
  if (SUMS && Term::kCol) fill(col_sum, c.cols, 0.0f);
  for (int64_t i = 0; i < c.rows; ++i) {
    const RowSource source = s.rows[i];
    const float* score = p.scores + (c.row0 + i) * p.stride + c.col0;
    const int64_t id = IDS ? p.pairs.row_ids[c.row0 + i] : 0, *ids = IDS ? p.pairs.col_ids + c.col0 : nullptr;
    Store* out = kWeights ? static_cast<Store*>(p.weights) + (c.row0 + i) * p.weights_stride + c.col0 : nullptr;
    const float row_shift = Term::kHasShift ? s.row_shift[i] : 0.0f;
    const float row_gain = kWeights && Term::kRow ? s.row_gain[i] : 0.0f;
    const Targets targets = Term::kTargets ? Targets(p, c, i) : Targets();
    const float scale = p.params[0], ceiling = kCapped ? row_ceiling(p, c.row0 + i) : kNoCeiling;
    const float* guide = kGuided ? guide_of(p, c, i) : nullptr;
    const float limit = kGuided ? row_threshold(p, c.row0 + i) : kNoCeiling;
    float sum = 0.0f, dscale = 0.0f, dbias = 0.0f;
    // `out` may be `score` itself, element by element: no restrict here.
#pragma omp simd reduction(+ : sum, dscale, dbias)
    for (int64_t j = 0; j < c.cols; ++j) {
      const float z = source.source[j] * source.scale + source.bias;
      float row_score = Term::row_score(z, row_shift);
      float col_score = Term::col_score(z, row_score, Term::kHasShift && Term::kCol ? col_shift[j] : 0.0f);
      if (kCapped) {  // (what lies far above may be infinite)
        const float scaled = score[j] * scale;
        row_score = scaled > ceiling ? 0.0f : row_score;
        col_score = Term::kCol && scaled > col_ceiling[j] ? 0.0f : col_score;
      }
      if (kGuided) {
        row_score = guide[j] > limit ? 0.0f : row_score;
        col_score = Term::kCol && guide[j] > col_limit[j] ? 0.0f : col_score;
      }
      if (SUMS && Term::kRow) sum += Term::row_part(z, row_score);
      if (SUMS && Term::kCol) col_sum[j] += col_score;
      if (kWeights) {
        float w = Weights::weight(z, row_score, col_score, row_gain, Term::kCol ? col_gain[j] : 0.0f);
        if (Term::kSigned && IDS) w = ids[j] == id ? -w : w;
        if (Term::kTargets) {
          const bool alike = IDS && ids[j] == id;
          float less = Term::kRow ? (alike ? targets.row_alike : targets.row) : 0.0f;
          if (Term::kCol) less += IDS && alike ? targets.col_alike[j] : targets.col[j];
          w = z == -__builtin_inff() ? 0.0f : w - less;
        }
        dscale += w * (score[j] - center);
        dbias += w;
        store_weight(out, j, w * factor);
      }
    }
    if (SUMS && Term::kRow) s.row_sum[i] = sum;
    params.dscale += dscale;
    params.dbias += dbias;
  }
}

// Chooses the shifts of one chunk and, for a weight panel, the gains that go with them. True: a common shift.
template <class Term, bool SUMS, bool WEIGHTS>
static bool choose_shifts(const Panel& p, const Chunk& c, Scratch& s) {
  Range shifts, normalizers;
  if (WEIGHTS && Term::kRow) round_normalizers(p.row, c.row0, s.row_gain, c.rows, normalizers);
  if (WEIGHTS && Term::kCol) round_normalizers(p.col, c.col0, s.col_gain, c.cols, normalizers);
  if (Term::kRow) {
    if (!SUMS) copy(s.row_gain, c.rows, s.row_shift);
    SUMS ? extend_finite(shifts, s.row_shift, c.rows) : extend(shifts, s.row_shift, c.rows);
  }
  if (Term::kCol) {
    if (!SUMS) copy(s.col_gain, c.cols, s.col_shift);
    SUMS ? extend_finite(shifts, s.col_shift, c.cols) : extend(shifts, s.col_shift, c.cols);
  }
  const bool common = share_shift(shifts.low, shifts.high, normalizers.low);
  if (common) {
    fill(s.row_shift, c.rows, shifts.high);
    fill(s.col_shift, c.cols, shifts.high);
  } else if (SUMS) {
    if (Term::kRow) WEIGHTS ? make_finite(s.row_shift, s.row_gain, c.rows) : make_finite(s.row_shift, c.rows);
    if (Term::kCol) WEIGHTS ? make_finite(s.col_shift, s.col_gain, c.cols) : make_finite(s.col_shift, c.cols);
  }
  if (WEIGHTS && Term::kRow) refer_gains(p.row, c.row0, s.row_shift, s.row_gain, c.rows);
  if (WEIGHTS && Term::kCol) refer_gains(p.col, c.col0, s.col_shift, s.col_gain, c.cols);
  return common;
}

template <class Term, bool SUMS, typename Out, bool IDS, Limits LIMITS = Limits::kNone>
static void sweep_of(bool common, const Panel& p, const Chunk& c, Scratch& s, ParamSums& params) {
  if constexpr (Term::kHasShift)
    if (common) return sweep<typename Term::WithCommonShift, SUMS, Out, IDS, LIMITS>(p, c, s, params);
  sweep<Term, SUMS, Out, IDS, LIMITS>(p, c, s, params);
}

// Makes one chunk's sources, shifts and gains, and sweeps over it.
template <class Term, bool SUMS, typename Out>
static void run_chunk(const Panel& p, const Chunk& c, Scratch& s, ParamSums& params) {
  constexpr bool kWeights = !std::is_same<Out, void>::value;
  find_sources<Term>(p, c, s);
  bool common = false;
  const bool guided = p.pairs.guide != nullptr, capped = guided || p.pairs.row_ceiling || p.pairs.col_ceiling;
  if (capped) find_limits(p, c, s);
  if constexpr (Term::kHasShift) {
    if (SUMS && !capped) find_maxima<Limits::kNone>(p, c, s);
    if (SUMS && capped) guided ? find_maxima<Limits::kGuide>(p, c, s) : find_maxima<Limits::kCeilings>(p, c, s);
    common = choose_shifts<Term, SUMS, kWeights>(p, c, s);
  } else if constexpr (kWeights) {
    copy(p.row.gain + c.row0, c.rows, s.row_gain);
  }
  if constexpr ((Term::kSigned || Term::kTargets) && kWeights)
    if (p.pairs.row_ids) return sweep_of<Term, SUMS, Out, true>(common, p, c, s, params);
  if constexpr (Term::kHasShift && !Term::kTargets) {
    if (guided) return sweep_of<Term, SUMS, Out, false, Limits::kGuide>(common, p, c, s, params);
    if (capped) return sweep_of<Term, SUMS, Out, false, Limits::kCeilings>(common, p, c, s, params);
  }
  sweep_of<Term, SUMS, Out, false>(common, p, c, s, params);
}

template <class Term>
static void merge_states(float* __restrict shift, float* __restrict sum, const float* __restrict other_shift,
                         const float* __restrict other_sum, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) Term::merge(shift, sum, other_shift, other_sum, i);
}

template <class Term, bool SUMS, typename Out>
static ParamSums run_stripe(const Panel& p, int64_t stripe, Scratch& s, const Buffers& buffers) {
  ParamSums params;
  Chunk c;
  c.row0 = stripe * kStripe;
  c.rows = smaller(kStripe, p.rows - c.row0);
  for (c.col0 = 0; c.col0 < p.cols; c.col0 += kChunk) {
    c.cols = smaller(kChunk, p.cols - c.col0);
    run_chunk<Term, SUMS, Out>(p, c, s, params);
    if (p.row.sum) merge_states<Term>(p.row.shift + c.row0, p.row.sum + c.row0, s.row_shift, s.row_sum, c.rows);
    if (buffers.col_sum) {
      copy(s.col_shift, c.cols, buffers.col_shift + stripe * p.cols + c.col0);
      copy(s.col_sum, c.cols, buffers.col_sum + stripe * p.cols + c.col0);
    }
  }
  return params;
}

// Merges what the stripes left of the columns of one chunk, from the first stripe to the last.
template <class Term>
static void merge_columns(const Panel& p, int64_t col0, int64_t stripes, const Buffers& buffers) {
  for (int64_t stripe = 0; stripe < stripes; ++stripe)
    merge_states<Term>(p.col.shift + col0, p.col.sum + col0, buffers.col_shift + stripe * p.cols + col0,
                       buffers.col_sum + stripe * p.cols + col0, smaller(kChunk, p.cols - col0));
}

// The stripes of a panel, and then its columns' states. `run`: what a stripe gives to the parameters' gradients.
template <class Term, typename Run>
static void for_stripes(const Panel& p, const Buffers& buffers, const Run& run) {
  const int64_t stripes = (p.rows + kStripe - 1) / kStripe;
  const int64_t merged_cols = p.col.sum ? p.cols : 0;
#ifdef _OPENMP
  if (p.threads > 1) {
#pragma omp parallel num_threads(p.threads)
    {
      Scratch& scratch = buffers.scratch[omp_get_thread_num()];
#pragma omp for schedule(static)
      for (int64_t stripe = 0; stripe < stripes; ++stripe) buffers.params[stripe] = run(stripe, scratch);
#pragma omp for schedule(static)
      for (int64_t j = 0; j < merged_cols; j += kChunk) merge_columns<Term>(p, j, stripes, buffers);
    }
  } else  // a team of one takes as long as a small matrix
#endif
  {
    for (int64_t stripe = 0; stripe < stripes; ++stripe) buffers.params[stripe] = run(stripe, buffers.scratch[0]);
    for (int64_t j = 0; j < merged_cols; j += kChunk) merge_columns<Term>(p, j, stripes, buffers);
  }
  for (int64_t stripe = 0; p.dparams && stripe < stripes; ++stripe) {
    p.dparams[0] += buffers.params[stripe].dscale;
    p.dparams[1] += buffers.params[stripe].dbias;
  }
}

template <class Term, bool SUMS, typename Out>
static void run_stripes(const Panel& p, const Buffers& buffers) {
  for_stripes<Term>(p, buffers, [&](int64_t stripe, Scratch& scratch) {
    return run_stripe<Term, SUMS, Out>(p, stripe, scratch, buffers);
  });
}

template <class Term, typename Out>
static void run_weights(const Panel& p, const Buffers& buffers) {
  p.row.sum || p.col.sum ? run_stripes<Term, true, Out>(p, buffers) : run_stripes<Term, false, Out>(p, buffers);
}

template <class Term>
static void run_term(const Panel& p, const Buffers& buffers) {
  if (!p.weights) return run_stripes<Term, true, void>(p, buffers);
  p.weights_dtype == Dtype::kFloat32 ? run_weights<Term, float>(p, buffers) : run_weights<Term, uint16_t>(p, buffers);
}

// Weights with targets, which come without sums.
template <bool ROW, bool COL>
static void run_targets(const Panel& p, const Buffers& buffers) {
  using Term = Exponential<false, ROW, COL, true>;
  p.weights_dtype == Dtype::kFloat32 ? run_stripes<Term, false, float>(p, buffers)
                                     : run_stripes<Term, false, uint16_t>(p, buffers);
}

static void run_panel(const Panel& p, const Buffers& buffers) {
  if (p.term == PairTerm::kSigmoid) return run_term<Sigmoid>(p, buffers);
  const bool row = p.row.sum || p.row.gain, col = p.col.sum || p.col.gain;
  if (p.row.target || p.col.target) {
    if (row && col) return run_targets<true, true>(p, buffers);
    return row ? run_targets<true, false>(p, buffers) : run_targets<false, true>(p, buffers);
  }
  if (row && col) return run_term<Exponential<false, true, true>>(p, buffers);
  row ? run_term<Exponential<false, true, false>>(p, buffers) : run_term<Exponential<false, false, true>>(p, buffers);
}

// The scores of each row's positive, and its logit as the sweeps make it; untouched where there is none.
static void gather_run(const Matrix& m, const int64_t* positives, float* dots, float* z_pos) {
  for (int64_t i = 0; i < m.rows; ++i) {
    const int64_t j = positives[i];
    if (j < 0) continue;
    dots[i] = m.scores[i * m.cols + j];
    z_pos[i] = add_to_positive(m.pairs, j, dots[i] * m.scale + m.bias);
  }
}

static void exp_run(const float* x, float* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = exp_term(x[i]);
}
