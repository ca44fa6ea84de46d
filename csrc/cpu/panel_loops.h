// The CPU's pass over one panel of scores, included by one source file per instruction set inside its own namespace.
//
// A panel is cut into stripes of kStripe rows and each stripe into chunks of kChunk
// columns, small enough to stay in a core's cache between the two sweeps:
//   sweep 1  the maximum of every row and column of z = scale * score + bias, excluded pairs at -inf;
//   sweep 2  exponentials against a shift, their sums by row and column, and the weights.
// Stripes do not depend on the number of threads, and their partial results are merged in order: results are
// bitwise reproducible.

// The part of a panel that one call of the sweeps works on.
struct Chunk {
  int64_t row0, rows, col0, cols;
};

// Rows are read where they lie; those of whose pairs something is said are copied.
static void find_sources(const Panel& p, const Chunk& c, Scratch& s) {
  for (int64_t i = 0; i < c.rows; ++i) {
    const RowSource lies = {p.scores + (c.row0 + i) * p.stride + c.col0, p.params[0], p.params[1]};
    s.rows[i] = find_source(p.pairs, lies, c.row0 + i, c.col0, c.cols, -__builtin_inff(), s.z + i * kChunk);
  }
}

// row_shift and col_shift become the chunk's maxima (NaN is passed over here and kept by the sums).
static void find_maxima(const Chunk& c, Scratch& s) {
  for (int64_t j = 0; j < c.cols; ++j) s.col_shift[j] = -__builtin_inff();
  for (int64_t i = 0; i < c.rows; ++i) {
    const RowSource row = s.rows[i];
    float* __restrict col = s.col_shift;
    float best = -__builtin_inff();
#pragma omp simd reduction(max : best)
    for (int64_t j = 0; j < c.cols; ++j) {
      const float z = row.source[j] * row.scale + row.bias;
      best = z > best ? z : best;
      col[j] = z > col[j] ? z : col[j];
    }
    s.row_shift[i] = best;
  }
}

// The smallest and the largest of some numbers, NaN passed over.
struct Range {
  float low = __builtin_inff(), high = -__builtin_inff();
  void add(const float* v, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      low = v[i] < low ? v[i] : low;
      high = v[i] > high ? v[i] : high;
    }
  }
};

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static void copy(const float* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

static void fill(float* to, int64_t n, float value) {
  for (int64_t i = 0; i < n; ++i) to[i] = value;
}

static void make_finite(float* shift, int64_t n) {
  for (int64_t i = 0; i < n; ++i) shift[i] = finite_shift(shift[i]);
}

static void refer_gains(const Side& side, int64_t first, const float* shift, float* out, int64_t n) {
  const float* __restrict gain = side.gain + first;
  const float* __restrict normalizer_shift = side.normalizer_shift + first;
  const float* __restrict normalizer_rest = side.normalizer_rest + first;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = refer_gain(gain[i], normalizer_shift[i], normalizer_rest[i], shift[i]);
}

// The normalisers, rounded.
static void round_normalizers(const Side& side, int64_t first, float* out, int64_t n) {
  const float* __restrict shift = side.normalizer_shift + first;
  const float* __restrict rest = side.normalizer_rest + first;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = normalizer_as_shift(shift[i], rest[i]);
}

static inline void store_weight(float* out, int64_t j, float w) { out[j] = w; }
static inline void store_weight(uint16_t* out, int64_t j, float w) { out[j] = to_bfloat16(w); }

// Sweep 2 of the exponential term. COMMON: one shift for the whole chunk (row_shift[0]), one exponential.
// ROW, COL: which directions take part. SUMS: row_sum, col_sum are wanted. Out: void for a reduce panel.
template <bool COMMON, bool ROW, bool COL, bool SUMS, typename Out>
static void sweep_exponential(const Panel& p, const Chunk& c, Scratch& s, ParamSums& params) {
  constexpr bool kWeights = !std::is_same<Out, void>::value;
  using Store = typename std::conditional<kWeights, Out, float>::type;
  const float scale = p.params[0], center = p.params[2];
  const float* __restrict col_shift = s.col_shift;
  const float* __restrict col_gain = s.col_gain;
  float* __restrict col_sum = s.col_sum;
  if (SUMS && COL)
    for (int64_t j = 0; j < c.cols; ++j) col_sum[j] = 0.0f;
  for (int64_t i = 0; i < c.rows; ++i) {
    const RowSource source = s.rows[i];
    const float* score = p.scores + (c.row0 + i) * p.stride + c.col0;
    Store* out = kWeights ? static_cast<Store*>(p.weights) + (c.row0 + i) * p.weights_stride + c.col0 : nullptr;
    const float row_shift = s.row_shift[i];
    const float row_gain = kWeights && ROW ? s.row_gain[i] : 0.0f;
    float sum = 0.0f, dscale = 0.0f, dbias = 0.0f;
    // `out` may be `score` itself, element by element: no restrict here.
#pragma omp simd reduction(+ : sum, dscale, dbias)
    for (int64_t j = 0; j < c.cols; ++j) {
      const float z = source.source[j] * source.scale + source.bias;
      float w = 0.0f;
      if (COMMON) {
        const float e = exp_term(z - row_shift);
        if (SUMS && ROW) sum += e;
        if (SUMS && COL) col_sum[j] += e;
        if (kWeights) w = e * (COL ? (ROW ? row_gain + col_gain[j] : col_gain[j]) : row_gain);
      } else {
        if (ROW) {
          const float e = exp_term(z - row_shift);
          if (SUMS) sum += e;
          if (kWeights) w += e * row_gain;
        }
        if (COL) {
          const float e = exp_term(z - col_shift[j]);
          if (SUMS) col_sum[j] += e;
          if (kWeights) w += e * col_gain[j];
        }
      }
      if (kWeights) {
        dscale += w * (score[j] - center);
        dbias += w;
        store_weight(out, j, w * scale);
      }
    }
    if (SUMS && ROW) s.row_sum[i] = sum;
    params.dscale += dscale;
    params.dbias += dbias;
  }
}

// The sigmoid term in one sweep: row sums of softplus(z), weights gain_i * sigmoid(z).
template <bool SUMS, typename Out>
static void sweep_sigmoid(const Panel& p, const Chunk& c, Scratch& s, ParamSums& params) {
  constexpr bool kWeights = !std::is_same<Out, void>::value;
  using Store = typename std::conditional<kWeights, Out, float>::type;
  const float scale = p.params[0], center = p.params[2];
  for (int64_t i = 0; i < c.rows; ++i) {
    const RowSource source = s.rows[i];
    const float* score = p.scores + (c.row0 + i) * p.stride + c.col0;
    Store* out = kWeights ? static_cast<Store*>(p.weights) + (c.row0 + i) * p.weights_stride + c.col0 : nullptr;
    const float gain = kWeights ? p.row.gain[c.row0 + i] : 0.0f;
    float sum = 0.0f, dscale = 0.0f, dbias = 0.0f;
#pragma omp simd reduction(+ : sum, dscale, dbias)
    for (int64_t j = 0; j < c.cols; ++j) {
      const float z = source.source[j] * source.scale + source.bias;
      const float e = exp_term(z > 0.0f ? -z : z);
      if (SUMS) sum += softplus_from(z, e);
      if (kWeights) {
        const float w = gain * sigmoid_from(z, e);
        dscale += w * (score[j] - center);
        dbias += w;
        store_weight(out, j, w * scale);
      }
    }
    if (SUMS) p.row.sum[c.row0 + i] += sum;
    params.dscale += dscale;
    params.dbias += dbias;
  }
}

template <bool COMMON, bool SUMS, typename Out>
static void sweep_directions(const Panel& p, const Chunk& c, Scratch& s, ParamSums& params, bool row, bool col) {
  if (row && col) return sweep_exponential<COMMON, true, true, SUMS, Out>(p, c, s, params);
  if (row) return sweep_exponential<COMMON, true, false, SUMS, Out>(p, c, s, params);
  sweep_exponential<COMMON, false, true, SUMS, Out>(p, c, s, params);
}

template <bool SUMS, typename Out>
static void sweep(const Panel& p, const Chunk& c, Scratch& s, ParamSums& params, bool row, bool col, bool common) {
  if (p.term == PairTerm::kSigmoid) return sweep_sigmoid<SUMS, Out>(p, c, s, params);
  if (common) return sweep_directions<true, SUMS, Out>(p, c, s, params, row, col);
  sweep_directions<false, SUMS, Out>(p, c, s, params, row, col);
}

// Chooses the shifts of one chunk and, for a weight panel, the gains that go with them. True: a common shift.
static bool choose_shifts(const Panel& p, const Chunk& c, Scratch& s, bool row, bool col, bool sums) {
  const bool weights = p.weights != nullptr;
  Range normalizers;
  if (weights && row) {
    round_normalizers(p.row, c.row0, s.row_gain, c.rows);
    normalizers.add(s.row_gain, c.rows);
  }
  if (weights && col) {
    round_normalizers(p.col, c.col0, s.col_gain, c.cols);
    normalizers.add(s.col_gain, c.cols);
  }
  if (sums) {
    make_finite(s.row_shift, c.rows);
    make_finite(s.col_shift, c.cols);
  } else {
    if (row) copy(s.row_gain, c.rows, s.row_shift);
    if (col) copy(s.col_gain, c.cols, s.col_shift);
  }
  Range shifts;
  if (row) shifts.add(s.row_shift, c.rows);
  if (col) shifts.add(s.col_shift, c.cols);
  const bool common = share_shift(shifts.low, shifts.high, normalizers.low);
  if (common) {
    fill(s.row_shift, c.rows, shifts.high);
    fill(s.col_shift, c.cols, shifts.high);
  }
  if (weights && row) refer_gains(p.row, c.row0, s.row_shift, s.row_gain, c.rows);
  if (weights && col) refer_gains(p.col, c.col0, s.col_shift, s.col_gain, c.cols);
  return common;
}

static void merge_states(float* __restrict shift, float* __restrict sum, const float* __restrict other_shift,
                         const float* __restrict other_sum, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) merge_exponential(shift[i], sum[i], other_shift[i], other_sum[i]);
}

static ParamSums run_stripe(const Panel& p, int64_t stripe, Scratch& s, const Buffers& buffers) {
  const bool exponential = p.term == PairTerm::kExponential;
  const bool sums = p.row.sum != nullptr || p.col.sum != nullptr;
  const bool row = exponential && (p.row.sum || p.row.gain);
  const bool col = exponential && (p.col.sum || p.col.gain);
  ParamSums params;
  Chunk c;
  c.row0 = stripe * kStripe;
  c.rows = smaller(kStripe, p.rows - c.row0);
  for (c.col0 = 0; c.col0 < p.cols; c.col0 += kChunk) {
    c.cols = smaller(kChunk, p.cols - c.col0);
    find_sources(p, c, s);
    bool common = false;
    if (exponential) {
      if (sums) find_maxima(c, s);
      common = choose_shifts(p, c, s, row, col, sums);
    }
    if (p.weights == nullptr)
      sweep<true, void>(p, c, s, params, row, col, common);
    else if (p.weights_dtype == Dtype::kFloat32)
      sums ? sweep<true, float>(p, c, s, params, row, col, common)
           : sweep<false, float>(p, c, s, params, row, col, common);
    else
      sums ? sweep<true, uint16_t>(p, c, s, params, row, col, common)
           : sweep<false, uint16_t>(p, c, s, params, row, col, common);
    if (exponential && p.row.sum)
      merge_states(p.row.shift + c.row0, p.row.sum + c.row0, s.row_shift, s.row_sum, c.rows);
    if (buffers.col_sum) {
      copy(s.col_shift, c.cols, buffers.col_shift + stripe * p.cols + c.col0);
      copy(s.col_sum, c.cols, buffers.col_sum + stripe * p.cols + c.col0);
    }
  }
  return params;
}

static void run_panel(const Panel& p, const Buffers& buffers) {
  const int64_t stripes = (p.rows + kStripe - 1) / kStripe;
#pragma omp parallel num_threads(p.threads)
  {
#ifdef _OPENMP
    Scratch& scratch = buffers.scratch[omp_get_thread_num()];
#else
    Scratch& scratch = buffers.scratch[0];
#endif
#pragma omp for schedule(static)
    for (int64_t stripe = 0; stripe < stripes; ++stripe)
      buffers.params[stripe] = run_stripe(p, stripe, scratch, buffers);
    if (buffers.col_sum) {
#pragma omp for schedule(static)
      for (int64_t j = 0; j < p.cols; j += kChunk)
        for (int64_t stripe = 0; stripe < stripes; ++stripe)
          merge_states(p.col.shift + j, p.col.sum + j, buffers.col_shift + stripe * p.cols + j,
                       buffers.col_sum + stripe * p.cols + j, smaller(kChunk, p.cols - j));
    }
  }
  for (int64_t stripe = 0; p.dparams && stripe < stripes; ++stripe) {
    p.dparams[0] += buffers.params[stripe].dscale;
    p.dparams[1] += buffers.params[stripe].dbias;
  }
}

static void exp_run(const float* x, float* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = exp_term(x[i]);
}
