// The CPU's pass over one panel of scores, included by one source file per instruction set inside its own namespace.
//
// A panel is cut into stripes of kStripe rows and each stripe into chunks of kChunk
// columns, small enough to stay in a core's cache between the two sweeps:
//   sweep 1  the maximum of every row and column of z = scale * score + bias, excluded pairs at -inf;
//   sweep 2  exponentials against a reference, their sums by row and column, and the weights.
// Stripes do not depend on the number of threads, and their partial results are merged in order: results are
// bitwise reproducible.

// The part of a panel that one call of the sweeps works on.
struct Chunk {
  int64_t row0, rows, col0, cols;
};

// Rows are read where they lie; the few in which a pair is excluded are copied, with that pair's logit at -inf.
static void find_sources(const Panel& p, const Chunk& c, Scratch& s) {
  const float scale = p.params[0], bias = p.params[1];
  for (int64_t i = 0; i < c.rows; ++i) {
    const float* score = p.scores + (c.row0 + i) * p.stride + c.col0;
    float* z = s.z + i * kChunk;
    s.rows[i] = {score, scale, bias};
    for (int64_t k = 0; k < p.exclude_count; ++k) {
      const int64_t excluded = p.exclude[(c.row0 + i) * p.exclude_count + k] - p.first_column - c.col0;
      if (excluded < 0 || excluded >= c.cols) continue;
      if (s.rows[i].source == score) {
#pragma omp simd
        for (int64_t j = 0; j < c.cols; ++j) z[j] = score[j] * scale + bias;
        s.rows[i] = {z, 1.0f, 0.0f};
      }
      z[excluded] = -__builtin_inff();
    }
  }
}

// row_reference and col_reference become the chunk's maxima (NaN is passed over here and kept by the sums).
static void find_maxima(const Chunk& c, Scratch& s) {
  for (int64_t j = 0; j < c.cols; ++j) s.col_reference[j] = -__builtin_inff();
  for (int64_t i = 0; i < c.rows; ++i) {
    const RowSource row = s.rows[i];
    float* __restrict col = s.col_reference;
    float best = -__builtin_inff();
#pragma omp simd reduction(max : best)
    for (int64_t j = 0; j < c.cols; ++j) {
      const float z = row.source[j] * row.scale + row.bias;
      best = z > best ? z : best;
      col[j] = z > col[j] ? z : col[j];
    }
    s.row_reference[i] = best;
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

static void make_finite(float* reference, int64_t n) {
  for (int64_t i = 0; i < n; ++i) reference[i] = finite_reference(reference[i]);
}

static void refer_gains(const float* gain, const float* normalizer, const float* reference, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = refer_gain(gain[i], normalizer[i], reference[i]);
}

static inline void store_weight(float* out, int64_t j, float w) { out[j] = w; }
static inline void store_weight(uint16_t* out, int64_t j, float w) { out[j] = to_bfloat16(w); }

// Sweep 2 of the exponential term. COMMON: one reference for the whole chunk (row_reference[0]), one exponential.
// ROW, COL: which directions take part. SUMS: row_sum, col_sum are wanted. Out: void for a reduce panel.
template <bool COMMON, bool ROW, bool COL, bool SUMS, typename Out>
static void sweep_exponential(const Panel& p, const Chunk& c, Scratch& s, ParamSums& params) {
  constexpr bool kWeights = !std::is_same<Out, void>::value;
  using Store = typename std::conditional<kWeights, Out, float>::type;
  const float scale = p.params[0];
  const float* __restrict col_reference = s.col_reference;
  const float* __restrict col_gain = s.col_gain;
  float* __restrict col_sum = s.col_sum;
  if (SUMS && COL)
    for (int64_t j = 0; j < c.cols; ++j) col_sum[j] = 0.0f;
  for (int64_t i = 0; i < c.rows; ++i) {
    const RowSource source = s.rows[i];
    const float* score = p.scores + (c.row0 + i) * p.stride + c.col0;
    Store* out = kWeights ? static_cast<Store*>(p.weights) + (c.row0 + i) * p.weights_stride + c.col0 : nullptr;
    const float row_reference = s.row_reference[i];
    const float row_gain = kWeights && ROW ? s.row_gain[i] : 0.0f;
    float sum = 0.0f, dscale = 0.0f, dbias = 0.0f;
    // `out` may be `score` itself, element by element: no restrict here.
#pragma omp simd reduction(+ : sum, dscale, dbias)
    for (int64_t j = 0; j < c.cols; ++j) {
      const float z = source.source[j] * source.scale + source.bias;
      float w = 0.0f;
      if (COMMON) {
        const float e = exp_term(z - row_reference);
        if (SUMS && ROW) sum += e;
        if (SUMS && COL) col_sum[j] += e;
        if (kWeights) w = e * (COL ? (ROW ? row_gain + col_gain[j] : col_gain[j]) : row_gain);
      } else {
        if (ROW) {
          const float e = exp_term(z - row_reference);
          if (SUMS) sum += e;
          if (kWeights) w += e * row_gain;
        }
        if (COL) {
          const float e = exp_term(z - col_reference[j]);
          if (SUMS) col_sum[j] += e;
          if (kWeights) w += e * col_gain[j];
        }
      }
      if (kWeights) {
        dscale += w * score[j];
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
  const float scale = p.params[0];
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
        dscale += w * score[j];
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

// Chooses the references of one chunk and, for a weight panel, the gains that go with them. True: a common reference.
static bool choose_references(const Panel& p, const Chunk& c, Scratch& s, bool row, bool col, bool sums) {
  const bool weights = p.weights != nullptr;
  Range normalizers;
  if (weights && row) normalizers.add(p.row.normalizer + c.row0, c.rows);
  if (weights && col) normalizers.add(p.col.normalizer + c.col0, c.cols);
  if (sums) {
    make_finite(s.row_reference, c.rows);
    make_finite(s.col_reference, c.cols);
  } else {
    if (row) copy(p.row.normalizer + c.row0, c.rows, s.row_reference);
    if (col) copy(p.col.normalizer + c.col0, c.cols, s.col_reference);
  }
  Range references;
  if (row) references.add(s.row_reference, c.rows);
  if (col) references.add(s.col_reference, c.cols);
  const bool common = share_reference(references.low, references.high, normalizers.low);
  if (common) {
    fill(s.row_reference, c.rows, references.high);
    fill(s.col_reference, c.cols, references.high);
  }
  if (weights && row) refer_gains(p.row.gain + c.row0, p.row.normalizer + c.row0, s.row_reference, s.row_gain, c.rows);
  if (weights && col) refer_gains(p.col.gain + c.col0, p.col.normalizer + c.col0, s.col_reference, s.col_gain, c.cols);
  return common;
}

static void merge_states(float* __restrict reference, float* __restrict sum, const float* __restrict other_reference,
                         const float* __restrict other_sum, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) merge_exponential(reference[i], sum[i], other_reference[i], other_sum[i]);
}

static ParamSums run_stripe(const Panel& p, int64_t stripe, Scratch& s, const Buffers& buffers) {
  const bool exponential = p.term == PairTerm::kExponential;
  const bool sums = p.row.sum != nullptr || p.col.sum != nullptr;
  const bool row = exponential && (p.row.sum || p.row.normalizer);
  const bool col = exponential && (p.col.sum || p.col.normalizer);
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
      common = choose_references(p, c, s, row, col, sums);
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
      merge_states(p.row.reference + c.row0, p.row.sum + c.row0, s.row_reference, s.row_sum, c.rows);
    if (buffers.col_sum) {
      copy(s.col_reference, c.cols, buffers.col_reference + stripe * p.cols + c.col0);
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
          merge_states(p.col.reference + j, p.col.sum + j, buffers.col_reference + stripe * p.cols + j,
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
