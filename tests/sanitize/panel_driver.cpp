// Runs the C++ pass over ragged panels in heap buffers of exactly the right size, against a plain loop in double.
// Built with the sanitizers by tests/backends/test_sanitizers.py; rounds.h has its arguments.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/include/api.h"
#include "rounds.h"

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// One way to call the pass.
struct Variant {
  ck::PairTerm term;
  bool row, col;          // directions that take part
  bool weights;           // a weight panel, else a reduce panel
  bool sums;              // the running sums are wanted (always in a reduce panel)
  bool bfloat16;          // the weights' type
  bool in_place;          // weights overwrite the scores (float32 only)
  bool wide;              // scores so far apart that rows and columns cannot share a shift
  bool dparams;           // the sums for the parameters' gradients are wanted
  bool diagonal, biased;  // left out; biases of columns
  bool capped, scaled;    // ceilings; scales by row and column
  bool guided;            // thresholds of a guide's scores
  int64_t excluded, padding;
  int threads;
};

// A heap buffer whose end is the allocation's end.
template <typename T>
struct Buffer {
  std::unique_ptr<T[]> data;
  int64_t size;
  explicit Buffer(int64_t n) : data(new T[n]()), size(n) {}
  T* get() { return data.get(); }
  T& operator[](int64_t i) { return data[i]; }
};

struct Case {
  Variant v;
  int64_t rows, cols, stride, weights_stride, first_row = 4, first_column = 7, diagonal = 5;
  Buffer<float> scores, params, row_shift, row_sum, col_shift, col_sum, row_norm, row_rest, row_gain, col_norm,
      col_rest, col_gain, col_bias, row_ceiling, col_ceiling, row_scale, col_scale, row_dscale, col_dscale, guide,
      row_threshold, col_threshold;
  Buffer<int64_t> columns;
  Buffer<float> weights32;
  Buffer<uint16_t> weights16;
  Buffer<double> dparams;
  std::vector<double> z, z_col, score;  // [rows * cols]; excluded pairs at -inf, among the rows' and the columns'

  Case(const Variant& variant, int64_t r, int64_t c)
      : v(variant),
        rows(r),
        cols(c),
        stride(c + variant.padding),
        weights_stride(variant.in_place ? stride : c + (7 - variant.padding)),
        scores((r - 1) * stride + c - (options.overrun ? 1 : 0)),
        params(3),
        row_shift(r),
        row_sum(r),
        col_shift(c),
        col_sum(c),
        row_norm(r),
        row_rest(r),
        row_gain(r),
        col_norm(c),
        col_rest(c),
        col_gain(c),
        col_bias(variant.biased ? c : 0),
        row_ceiling(variant.capped ? r : 0),
        col_ceiling(variant.capped ? c : 0),
        row_scale(variant.scaled ? r : 0),
        col_scale(variant.scaled ? c : 0),
        row_dscale(variant.scaled ? r : 0),
        col_dscale(variant.scaled ? c : 0),
        guide(variant.guided ? (r - 1) * (c + 3) + c : 0),
        row_threshold(variant.guided ? r : 0),
        col_threshold(variant.guided ? c : 0),
        columns(r * variant.excluded),
        weights32(variant.bfloat16 || variant.in_place ? 0 : (r - 1) * weights_stride + c),
        weights16(variant.bfloat16 ? (r - 1) * weights_stride + c : 0),
        dparams(2) {}
};

// A pair's logit by one side's scale, -inf above its ceiling, or where a guide's score is above the threshold.
double logit(const Case& c, float score, float scale, const Buffer<float>& ceilings, int64_t k, bool above) {
  const float scaled = score * scale;
  if (above || (c.v.capped && scaled > ceilings.data[k])) return -kInfinity;
  return static_cast<double>(score) * scale + c.params.data[1];
}

void fill(Case& c, std::mt19937& random) {
  std::uniform_real_distribution<float> unit(-1.0f, 1.0f);
  c.params[0] = c.v.wide ? 60.0f : 3.0f;
  c.params[1] = c.v.term == ck::PairTerm::kSigmoid ? -2.0f : 0.0f;
  c.params[2] = 0.25f;
  for (int64_t i = 0; i < c.scores.size; ++i) c.scores[i] = unit(random);
  for (int64_t j = 0; j < c.col_bias.size; ++j)
    c.col_bias[j] = j % 5 == 3 ? -static_cast<float>(kInfinity) : unit(random);
  for (Buffer<float>* ceilings : {&c.row_ceiling, &c.col_ceiling})
    for (int64_t k = 0; k < ceilings->size; ++k)
      (*ceilings)[k] = k % 7 == 3 ? static_cast<float>(kInfinity) : 0.7f * c.params[0] * unit(random);
  for (Buffer<float>* of_guide : {&c.guide, &c.row_threshold, &c.col_threshold})
    for (int64_t k = 0; k < of_guide->size; ++k) (*of_guide)[k] = unit(random);
  for (Buffer<float>* scales : {&c.row_scale, &c.col_scale})
    for (int64_t k = 0; k < scales->size; ++k) (*scales)[k] = k % 11 == 5 ? 0.0f : c.params[0] * unit(random);
  for (int64_t i = 0; i < c.rows; ++i)
    for (int64_t k = 0; k < c.v.excluded; ++k)  // some in the panel, some left and right of it
      c.columns[i * c.v.excluded + k] = c.first_column + static_cast<int64_t>(random() % (c.cols + 4)) - 2;
  for (std::vector<double>* each : {&c.z, &c.z_col, &c.score}) each->resize(c.rows * c.cols);
  for (int64_t i = 0; i < c.rows; ++i) {
    for (int64_t j = 0; j < c.cols; ++j) {
      const int64_t at = std::min(i * c.stride + j, c.scores.size - 1);
      if (c.v.wide) c.scores[at] += i % 2 == 0 ? 1.0f : -1.0f;
      c.score[i * c.cols + j] = c.scores[at];
      double &z = c.z[i * c.cols + j], &z_col = c.z_col[i * c.cols + j];
      const float* guide = c.v.guided ? &c.guide[i * (c.cols + 3) + j] : nullptr;
      z = logit(c, c.scores[at], c.v.scaled ? c.row_scale[i] : c.params[0], c.row_ceiling, i,
                guide && *guide > c.row_threshold[i]);
      z_col = logit(c, c.scores[at], c.v.scaled ? c.col_scale[j] : c.params[0], c.col_ceiling, j,
                    guide && *guide > c.col_threshold[j]);
      if (c.v.biased) z += c.col_bias[j], z_col += c.col_bias[j];
      if (c.v.diagonal && c.first_column + j == c.first_row + i + c.diagonal) z = z_col = -kInfinity;
    }
    for (int64_t k = 0; k < c.v.excluded; ++k) {
      const int64_t j = c.columns[i * c.v.excluded + k] - c.first_column;
      if (j >= 0 && j < c.cols) c.z[i * c.cols + j] = c.z_col[i * c.cols + j] = -kInfinity;
    }
  }
  for (int64_t i = 0; i < c.rows; ++i) c.row_gain[i] = unit(random);
  for (int64_t j = 0; j < c.cols; ++j) c.col_gain[j] = unit(random);
}

// log of the sum of exponentials of n values `step` apart, continued from a state (shift, sum).
double log_sum_exp(const double* z, int64_t n, int64_t step, double shift, double sum) {
  double top = sum > 0.0 ? shift : -kInfinity;
  for (int64_t k = 0; k < n; ++k) top = std::max(top, z[k * step]);
  if (top == -kInfinity) return top;
  double total = sum > 0.0 ? sum * std::exp(shift - top) : 0.0;
  for (int64_t k = 0; k < n; ++k) total += std::exp(z[k * step] - top);
  return top + std::log(total);
}

double softplus(double z) { return std::max(z, 0.0) + std::log1p(std::exp(-std::fabs(z))); }
double sigmoid(double z) { return 1.0 / (1.0 + std::exp(-z)); }

double from_bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

[[noreturn]] void fail(const Case& c, const char* what, double got, double expected) {
  std::printf("FAILED %s: %s of a %lld x %lld panel: got %.9g, expected %.9g\n", ck::instruction_set(), what,
              static_cast<long long>(c.rows), static_cast<long long>(c.cols), got, expected);
  std::printf("  term %d row %d col %d weights %d sums %d bfloat16 %d in_place %d wide %d diagonal %d biased %d\n",
              static_cast<int>(c.v.term), c.v.row, c.v.col, c.v.weights, c.v.sums, c.v.bfloat16, c.v.in_place, c.v.wide,
              c.v.diagonal, c.v.biased);
  std::printf("  excluded %lld threads %d capped %d scaled %d guided %d\n", static_cast<long long>(c.v.excluded),
              c.v.threads, c.v.capped, c.v.scaled, c.v.guided);
  std::exit(1);
}

// `scale`: the size of what was added up. The relative bound has room for the rounding of z itself (|z| up to 120, so
// 7e-6); the absolute one for what a shared shift lets underflow (e^-47 of the largest, times params).
void expect(const Case& c, const char* what, double got, double expected, double scale, double relative) {
  if (got == expected) return;  // both -inf, too
  if (!(std::fabs(got - expected) <= relative * scale + 1e-18)) fail(c, what, got, expected);
}

// Checks one side's running (shift, sum) against its states before.
void check_side(const Case& c, const char* what, Buffer<float>& shift, Buffer<float>& sum,
                const std::vector<double>& expected) {
  for (int64_t i = 0; i < sum.size; ++i) {
    const double got = sum[i] > 0.0f ? shift[i] + std::log(static_cast<double>(sum[i])) : -kInfinity;
    expect(c, what, got, expected[i], 1.0, 4e-5);
  }
}

// Checks the weights, their untouched padding, and the two sums for the parameters.
void check_weights(Case& c) {
  const bool exponential = c.v.term == ck::PairTerm::kExponential;
  double dscale = 0.0, dbias = 0.0, dscale_size = 0.0, dbias_size = 0.0;
  std::vector<double> of_rows(c.rows), of_cols(c.cols), row_size(c.rows, 1.0), col_size(c.cols, 1.0);
  for (int64_t i = 0; i < c.rows; ++i) {
    for (int64_t j = 0; j < c.cols; ++j) {
      const double z = c.z[i * c.cols + j], centered = c.score[i * c.cols + j] - c.params[2];
      double w = 0.0, size = 0.0;
      if (c.v.row) {
        const double part = c.row_gain[i] * (exponential ? std::exp(z - c.row_norm[i] - c.row_rest[i]) : sigmoid(z));
        const double scale = c.v.scaled ? c.row_scale[i] : 1.0;
        w += scale * part;
        size += std::fabs(scale * part);
        of_rows[i] += part * centered, row_size[i] += std::fabs(part * centered);
      }
      if (c.v.col) {
        const double part = c.col_gain[j] * std::exp(c.z_col[i * c.cols + j] - c.col_norm[j] - c.col_rest[j]);
        const double scale = c.v.scaled ? c.col_scale[j] : 1.0;
        w += scale * part;
        size += std::fabs(scale * part);
        of_cols[j] += part * centered, col_size[j] += std::fabs(part * centered);
      }
      const int64_t at = i * c.weights_stride + j;
      const double got =
          c.v.bfloat16 ? from_bfloat16(c.weights16[at]) : (c.v.in_place ? c.scores[at] : c.weights32[at]);
      expect(c, "weight", got, w * c.params[0], size * c.params[0], c.v.bfloat16 ? 0.0045 : 4e-5);
      dscale += w * centered;
      dscale_size += size * std::fabs(centered);
      dbias += w;
      dbias_size += size;
    }
    for (int64_t j = c.cols; j < c.weights_stride && i + 1 < c.rows && !c.v.in_place; ++j) {
      const int64_t at = i * c.weights_stride + j;
      expect(c, "padding", c.v.bfloat16 ? c.weights16[at] : c.weights32[at], 0.0, 0.0, 0.0);
    }
  }
  for (int64_t i = 0; i < c.row_dscale.size; ++i)
    expect(c, "row's dscale", c.row_dscale[i], of_rows[i] + 1.0, row_size[i], 4e-5);
  for (int64_t j = 0; j < c.col_dscale.size; ++j)
    expect(c, "column's dscale", c.col_dscale[j], of_cols[j] - 1.0, col_size[j], 4e-5);
  if (!c.v.dparams) return;
  expect(c, "dscale", c.dparams[0], dscale + 1.0, dscale_size, 4e-5);
  expect(c, "dbias", c.dparams[1], dbias + 2.0, dbias_size, 4e-5);
}

ck::Panel make_panel(Case& c) {
  ck::Panel p;
  p.term = c.v.term;
  p.scores = c.scores.get();
  p.rows = c.rows, p.cols = c.cols, p.stride = c.stride;
  p.params = c.params.get();
  p.pairs.columns = c.v.excluded ? c.columns.get() : nullptr;
  p.pairs.columns_count = c.v.excluded, p.pairs.first_row = c.first_row, p.pairs.first_column = c.first_column;
  if (c.v.diagonal) p.pairs.diagonal = c.diagonal;
  if (c.v.biased) p.pairs.col_bias = c.col_bias.get();
  if (c.v.capped) p.pairs.row_ceiling = c.row_ceiling.get(), p.pairs.col_ceiling = c.col_ceiling.get();
  if (c.v.scaled) p.pairs.row_scale = c.row_scale.get(), p.pairs.col_scale = c.col_scale.get();
  if (c.v.guided) p.pairs.row_threshold = c.row_threshold.get(), p.pairs.col_threshold = c.col_threshold.get();
  if (c.v.guided) p.pairs.guide = c.guide.get(), p.pairs.guide_stride = c.cols + 3;
  p.threads = c.v.threads;
  if (c.v.sums && c.v.row) p.row.sum = c.row_sum.get();
  if (c.v.sums && c.v.col) p.col.sum = c.col_sum.get();
  if (c.v.term == ck::PairTerm::kExponential) {
    if (p.row.sum) p.row.shift = c.row_shift.get();
    if (p.col.sum) p.col.shift = c.col_shift.get();
  }
  if (!c.v.weights) return p;
  if (c.v.row) p.row.gain = c.row_gain.get();
  if (c.v.col) p.col.gain = c.col_gain.get();
  if (c.v.term == ck::PairTerm::kExponential) {
    if (c.v.row) p.row.normalizer_shift = c.row_norm.get(), p.row.normalizer_rest = c.row_rest.get();
    if (c.v.col) p.col.normalizer_shift = c.col_norm.get(), p.col.normalizer_rest = c.col_rest.get();
  }
  p.weights =
      c.v.bfloat16 ? static_cast<void*>(c.weights16.get()) : (c.v.in_place ? c.scores.get() : c.weights32.get());
  p.weights_dtype = c.v.bfloat16 ? ck::Dtype::kBFloat16 : ck::Dtype::kFloat32;
  p.weights_stride = c.weights_stride;
  if (c.v.dparams) p.dparams = c.dparams.get();
  if (c.v.scaled) p.row.dscale = c.row_dscale.get(), p.col.dscale = c.col_dscale.get();
  return p;
}

// A log-normaliser as two numbers, not always near each other; a rest of +inf for the log-sum of nothing.
void split(double normalizer, int64_t i, float& shift, float& rest) {
  shift = normalizer == -kInfinity ? 0.0f : static_cast<float>(normalizer) - static_cast<float>(i % 3);
  rest = static_cast<float>(normalizer == -kInfinity ? kInfinity : normalizer - shift);
}

void run_case(const Variant& variant, int64_t rows, int64_t cols, std::mt19937& random) {
  Case c(variant, rows, cols);
  fill(c, random);
  const bool exponential = variant.term == ck::PairTerm::kExponential;
  c.dparams[0] = 1.0, c.dparams[1] = 2.0;  // what is there is added to
  std::fill_n(c.row_dscale.get(), c.row_dscale.size, 1.0f);
  std::fill_n(c.col_dscale.get(), c.col_dscale.size, -1.0f);
  std::vector<double> row_expected(rows), col_expected(cols);
  for (int64_t i = 0; i < rows; ++i) {
    if (i % 3 == 1) c.row_shift[i] = 2.0f, c.row_sum[i] = 0.5f;  // the others start empty
    const double* z = &c.z[i * cols];
    row_expected[i] = log_sum_exp(z, cols, 1, c.row_shift[i], c.row_sum[i]);
    split(row_expected[i], i, c.row_norm[i], c.row_rest[i]);
    if (exponential) continue;
    row_expected[i] = c.row_sum[i];
    for (int64_t j = 0; j < cols; ++j) row_expected[i] += softplus(z[j]);
  }
  for (int64_t j = 0; j < cols; ++j) {
    if (j % 3 == 1) c.col_shift[j] = 2.0f, c.col_sum[j] = 0.5f;
    col_expected[j] = log_sum_exp(&c.z_col[j], rows, cols, c.col_shift[j], c.col_sum[j]);
    split(col_expected[j], j, c.col_norm[j], c.col_rest[j]);
  }
  const ck::Panel panel = make_panel(c);
  variant.weights ? ck::weight_panel(panel) : ck::reduce_panel(panel);
  if (panel.row.sum && exponential) check_side(c, "row log-sum-exp", c.row_shift, c.row_sum, row_expected);
  if (panel.col.sum) check_side(c, "column log-sum-exp", c.col_shift, c.col_sum, col_expected);
  if (panel.row.sum && !exponential)
    for (int64_t i = 0; i < rows; ++i) expect(c, "row sum", c.row_sum[i], row_expected[i], row_expected[i], 4e-5);
  if (variant.weights) check_weights(c);
}

// One search of a ragged panel, against plain loops. The noise is the library's own, called column by column.
void run_search(ck::SearchTerm term, int64_t rows, int64_t cols, int64_t excluded, bool ids, std::mt19937& random) {
  std::uniform_real_distribution<float> unit(-1.0f, 1.0f);
  const int64_t stride = cols + 3, first_row = 11, first_column = 5;
  Buffer<float> scores((rows - 1) * stride + cols), params(3), best(rows), low(rows), high(rows);
  Buffer<int64_t> columns(rows * excluded), row_ids(rows), col_ids(cols), seed(1), column(rows), below(rows),
      above(rows);
  for (int64_t i = 0; i < scores.size; ++i) scores[i] = unit(random);
  for (int64_t i = 0; i < columns.size; ++i)
    columns[i] = first_column + static_cast<int64_t>(random() % (cols + 4)) - 2;
  for (int64_t j = 0; j < cols; ++j) col_ids[j] = static_cast<int64_t>(random() % 5);
  params[0] = 3.0f, params[1] = 0.5f, seed[0] = -1234567890123456789;
  for (int64_t i = 0; i < rows; ++i) {
    row_ids[i] = i % 5, low[i] = unit(random), high[i] = low[i] + 0.5f, column[i] = -1;
    best[i] = i % 3 == 1 ? 2.0f : -std::numeric_limits<float>::infinity();  // some have a candidate already
  }
  ck::SearchPanel p;
  p.term = term, p.scores = scores.get(), p.rows = rows, p.cols = cols, p.stride = stride, p.params = params.get();
  p.pairs.columns = columns.get(), p.pairs.columns_count = excluded;
  p.pairs.first_row = first_row, p.pairs.first_column = first_column;
  if (ids) p.pairs.row_ids = row_ids.get(), p.pairs.col_ids = col_ids.get(), p.pairs.diagonal = -5;
  p.seed = seed.get(), p.threads = static_cast<int>(random() % 3 + 1);
  p.best = best.get(), p.best_column = column.get(), p.low = low.get(), p.high = high.get();
  p.below = below.get(), p.above = above.get();
  const std::vector<float> start(best.get(), best.get() + rows);
  ck::search_panel(p);
  for (int64_t i = 0; i < rows; ++i) {
    std::vector<float> logits(cols, -std::numeric_limits<float>::infinity());
    float want = start[i];
    int64_t want_below = 0, want_above = 0;
    for (int64_t j = 0; j < cols; ++j) {
      bool out = ids && (row_ids[i] == col_ids[j] || first_column + j == first_row + i - 5);
      for (int64_t k = 0; k < excluded; ++k) out = out || columns[i * excluded + k] == first_column + j;
      if (out) continue;
      float z = std::fma(scores[i * stride + j], params[0], params[1]), noise;
      ck::gumbel_array(seed[0], first_row + i, first_column + j, &noise, 1);
      if (term == ck::SearchTerm::kGumbelMax) z += noise;
      want_below += z<low[i], want_above += z> high[i];
      logits[j] = z, want = std::max(want, z);
    }
    const bool rank = term == ck::SearchTerm::kRank;
    const auto near = [&](float value) { return value == want || std::fabs(value - want) < 1e-5f; };
    const int64_t found = column[i] - first_column;
    const bool named = column[i] == -1 ? near(start[i]) : found >= 0 && found < cols && near(logits[found]);
    const bool right = rank ? below[i] == want_below && above[i] == want_above : named && near(best[i]);
    if (right) continue;
    std::printf("FAILED %s: search %d of %lld x %lld, row %lld\n", ck::instruction_set(), static_cast<int>(term),
                static_cast<long long>(rows), static_cast<long long>(cols), static_cast<long long>(i));
    std::exit(1);
  }
}

int64_t run_searches(unsigned seed) {
  std::mt19937 random(seed + 2);
  int64_t panels = 0;
  for (const auto term : {ck::SearchTerm::kMaximum, ck::SearchTerm::kGumbelMax, ck::SearchTerm::kRank})
    for (const int64_t rows : {1, 3, 33})
      for (const int64_t cols : {1, 2, 5, 64, 127, 2048, 2051})
        for (const int64_t excluded : {0, 1, 3})
          for (const bool ids : {false, true}) {
            if (rows * cols > 20000 && (excluded != 1 || options.every > 1)) continue;
            run_search(term, rows, cols, excluded, ids, random);
            ++panels;
          }
  return panels;
}

// Every legal combination of what a panel can be asked for.
std::vector<Variant> all_variants() {
  std::vector<Variant> all;
  std::mt19937 random(2);
  for (const auto term : {ck::PairTerm::kExponential, ck::PairTerm::kSigmoid})
    for (const int sides : {1, 2, 3})  // row, column, both
      for (const bool weights : {false, true})
        for (const bool sums : {false, true})
          for (const int output : {0, 1, 2})  // float32, float32 in place, bfloat16
            for (const bool wide : {false, true})
              for (const int64_t excluded : {0, 1, 2}) {
                if (term == ck::PairTerm::kSigmoid && sides != 1) continue;
                if (!weights && (!sums || output != 0)) continue;
                const int64_t padding = random() % 2 ? 5 : 0;
                const int threads = static_cast<int>(random() % 3 + 1);
                const bool scaled = sides == 3 && weights != sums && random() % 3 == 0;
                const bool dparams = !scaled && random() % 4 != 0;
                const bool diagonal = random() % 3 == 0, biased = !scaled && random() % 3 == 0;
                const bool capped = term == ck::PairTerm::kExponential && random() % 4 == 0;
                const bool guided = term == ck::PairTerm::kExponential && random() % 4 == 0;
                all.push_back({term, (sides & 1) != 0, (sides & 2) != 0, weights, sums, output == 2, output == 1, wide,
                               dparams, diagonal, biased, capped, scaled, guided, excluded, padding, threads});
              }
  return all;
}

int64_t run_instruction_set(unsigned seed) {
  const int64_t sizes[] = {1, 2, 3, 15, 16, 17, 63, 64, 65, 257};
  std::vector<std::pair<int64_t, int64_t>> shapes = {{1, 513}, {3, 1030}, {130, 511}, {66, 512}};
  for (const int64_t rows : sizes)
    for (const int64_t cols : sizes) shapes.emplace_back(rows, cols);
  const std::vector<Variant> variants = all_variants();
  std::mt19937 random(seed);
  int64_t panels = 0;
  for (size_t k = 0; k < shapes.size(); ++k) {
    const auto [rows, cols] = shapes[k];
    // large panels take turns: each variant meets many of them
    const size_t step = (rows * cols < 300 ? 1 : 11) * options.every;
    for (size_t v = (k + seed) % step; v < variants.size(); v += step, ++panels)
      run_case(variants[v], rows, cols, random);
  }
  for (const int64_t n : sizes) {
    Buffer<float> x(n), out(n);
    for (int64_t i = 0; i < n; ++i) x[i] = -80.0f + 160.0f * static_cast<float>(i) / static_cast<float>(n);
    ck::exp_array(x.get(), out.get(), n);
    for (int64_t i = 0; i < n; ++i)
      if (std::fabs(out[i] / std::exp(static_cast<double>(x[i])) - 1.0) > 2e-7) {
        std::printf("FAILED %s: exp(%g) = %g\n", ck::instruction_set(), x[i], out[i]);
        std::exit(1);
      }
  }
  return panels;
}

}  // namespace

int main(int argc, char** argv) {
  read_options(argc, argv);
  int most = std::numeric_limits<int>::max();
  if (options.undefined) std::printf("%d\n", most + argc);
  for (const char* name : {"baseline", "avx2", "avx512"}) {
    try {
      ck::set_instruction_set(name);
    } catch (const std::invalid_argument&) {
      std::printf("%s: not on this machine\n", name);
      continue;
    }
    const int64_t panels = run_rounds([](unsigned seed) { return run_instruction_set(seed) + run_searches(seed); });
    std::printf("%s: %lld panels are right\n", name, static_cast<long long>(panels));
  }
  return 0;
}
