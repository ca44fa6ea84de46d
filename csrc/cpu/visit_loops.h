// The CPU's two visits to a whole matrix whose normalisers are its own, included by one source file per instruction set
// inside its own namespace. One exponential per score serves both: the first visit leaves it in the weight's place,
//   e_ij = exp(z_ij - shift_i)   with one shift for all rows of a stripe where columns take part,
// and keeps sums of e and of e * (score - center) by row and by column; the second multiplies it by what the rows and
// the columns weigh. A stripe without such a shift keeps nothing, and its weights have exponentials of their own.

// The exponentials of one chunk with their sums, against s.row_shift.
template <bool COL>
static __attribute__((noinline)) void keep_exponentials(const Panel& p, const Chunk& c, Scratch& s) {
  const float center = p.params[2];
  float* __restrict col_sum = s.col_sum;
  float* __restrict col_moment = s.col_moment;
  if (COL) fill(col_sum, c.cols, 0.0f), fill(col_moment, c.cols, 0.0f);
  for (int64_t i = 0; i < c.rows; ++i) {
    const RowSource source = s.rows[i];
    const float* score = p.scores + (c.row0 + i) * p.stride;
    float* out = static_cast<float*>(p.weights) + (c.row0 + i) * p.weights_stride;
    const float shift = s.row_shift[i];
    float sum = 0.0f, moment = 0.0f;
    // `out` may be `score` itself, element by element: no restrict here.
#pragma omp simd reduction(+ : sum, moment)
    for (int64_t j = 0; j < c.cols; ++j) {
      const float e = exp_term(source.source[j] * source.scale + source.bias - shift);
      const float part = e * (score[j] - center);
      sum += e;
      moment += part;
      if (COL) {
        col_sum[j] += e;
        col_moment[j] += part;
      }
      out[j] = e;
    }
    s.row_sum[i] = sum;
    s.row_moment[i] = moment;
  }
}

// The first visit to one stripe: its rows' and its columns' states, and its exponentials.
template <class Term>
static void keep_stripe(const Panel& p, const Chunk& c, int64_t stripe, Scratch& s, const Buffers& buffers) {
  find_sources<Term>(p, c, s);
  find_maxima<Limits::kNone>(p, c, s);
  const bool common = choose_shifts<Term, true, false>(p, c, s), kept = p.weights && (common || !Term::kCol);
  ParamSums none;
  if (kept)
    keep_exponentials<Term::kCol>(p, c, s);
  else
    common ? sweep<typename Term::WithCommonShift, true, void>(p, c, s, none) : sweep<Term, true, void>(p, c, s, none);
  copy(s.row_shift, c.rows, buffers.row_shift + c.row0);
  copy(s.row_sum, c.rows, buffers.row_sum + c.row0);
  if (kept) copy(s.row_moment, c.rows, buffers.row_moment + c.row0);
  buffers.kept[stripe] = kept;
  if (!Term::kCol) return;
  const int64_t first = stripe * p.cols;
  copy(s.col_shift, c.cols, buffers.col_shift + first);
  copy(s.col_sum, c.cols, buffers.col_sum + first);
  if (kept) copy(s.col_moment, c.cols, buffers.col_moment + first);
}

static double dot(const float* a, const float* b, int64_t n) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// The second visit to one stripe that kept its exponentials.
template <bool COL>
static ParamSums weigh_stripe(const Panel& p, const Chunk& c, int64_t stripe, Scratch& s, const Buffers& buffers) {
  const float* shift = buffers.row_shift + c.row0;
  const int64_t first = stripe * p.cols;
  ParamSums params;
  refer_gains(p.row, c.row0, shift, s.row_gain, c.rows);
  params.dscale = dot(s.row_gain, buffers.row_moment + c.row0, c.rows);
  params.dbias = dot(s.row_gain, buffers.row_sum + c.row0, c.rows);
  if (COL) {
    refer_gains(p.col, 0, buffers.col_shift + first, s.col_gain, c.cols);
    params.dscale += dot(s.col_gain, buffers.col_moment + first, c.cols);
    params.dbias += dot(s.col_gain, buffers.col_sum + first, c.cols);
  }
  const float factor = p.factor ? *p.factor : p.params[0];
  const float* __restrict col_gain = s.col_gain;
  for (int64_t i = 0; i < c.rows; ++i) {
    float* __restrict out = static_cast<float*>(p.weights) + (c.row0 + i) * p.weights_stride;
    const float row_gain = s.row_gain[i];
#pragma omp simd
    for (int64_t j = 0; j < c.cols; ++j) out[j] *= (COL ? row_gain + col_gain[j] : row_gain) * factor;
  }
  return params;
}

// Both visits, of a matrix whose chunks are its stripes.
template <class Term>
static void visit(const Panel& p, bool first, const Buffers& buffers) {
  for_stripes<Term>(p, buffers, [&](int64_t stripe, Scratch& s) {
    const Chunk c = {stripe * kStripe, smaller(kStripe, p.rows - stripe * kStripe), 0, p.cols};
    if (first) return keep_stripe<Term>(p, c, stripe, s, buffers), ParamSums();
    if (buffers.kept[stripe]) return weigh_stripe<Term::kCol>(p, c, stripe, s, buffers);
    return run_stripe<Term, false, float>(p, stripe, s, buffers);
  });
}

static void visit_matrix(const Panel& p, bool first, bool columns, const Buffers& buffers) {
  columns ? visit<Exponential<false, true, true>>(p, first, buffers)
          : visit<Exponential<false, true, false>>(p, first, buffers);
}

// The sums of the scores of every row's id [rows], but for those of its own column.
static void alike_run(const Matrix& m, double* sums) {
  for (int64_t i = 0; i < m.rows; ++i) {
    const int64_t id = m.pairs.row_ids[i], own = m.pairs.diagonal == kNoDiagonal ? -1 : i + m.pairs.diagonal;
    const int64_t* __restrict ids = m.pairs.col_ids;
    const float* __restrict score = m.scores + i * m.cols;
    double sum = 0.0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < m.cols; ++j) sum += ids[j] == id && j != own ? static_cast<double>(score[j]) : 0.0;
    sums[i] = sum;
  }
}
