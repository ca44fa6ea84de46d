// Runs whole matrices with their positives in heap buffers of exactly the right size, against plain loops in double.
// Built with the sanitizers by tests/backends/test_sanitizers.py; rounds.h has its arguments.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "../../csrc/include/api.h"
#include "rounds.h"

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// A heap buffer whose end is the allocation's end.
template <typename T>
struct Buffer {
  std::unique_ptr<T[]> data;
  int64_t size;
  explicit Buffer(int64_t n) : data(new T[n]()), size(n) {}
  T* get() { return size ? data.get() : nullptr; }
  T& operator[](int64_t i) { return data[i]; }
};

// One way to call the two functions.
struct Variant {
  bool columns_too, symmetric, relative, positives_given, biased, gains, in_place, beside;
  int64_t excluded, threads;
};

struct Case {
  Variant v;
  int64_t rows, cols;
  Buffer<float> scores, weights, col_bias, gain, col_gain, row_normalizer, col_normalizer, row_state, col_state, dots,
      positive_weights;
  Buffer<int64_t> positives, columns;
  Buffer<double> out;
  std::vector<int64_t> where;
  std::vector<double> z, z_pos, score;  // z: negatives, others at -inf

  Case(const Variant& variant, int64_t r, int64_t c)
      : v(variant),
        rows(r),
        cols(c),
        scores(r * c),
        weights(variant.in_place ? 0 : r * c),
        col_bias(variant.biased ? c : 0),
        gain(variant.gains ? r : 0),
        col_gain(variant.gains ? c : 0),
        row_normalizer(2 * r),
        col_normalizer(2 * c),
        row_state(2 * r),
        col_state(2 * c),
        dots(r),
        positive_weights(variant.beside ? r : 0),
        positives(variant.positives_given ? r : 0),
        columns(r * variant.excluded),
        out(3) {}

  double row_gain_of(int64_t i) { return v.gains ? gain[i] : 0.25; }
  double col_gain_of(int64_t j) { return v.gains ? col_gain[j] : 0.25; }
};

void fill(Case& c, std::mt19937& random) {
  std::uniform_real_distribution<float> unit(-1.0f, 1.0f);
  for (int64_t i = 0; i < c.scores.size; ++i) c.scores[i] = 2.0f * unit(random);
  for (int64_t i = 0; c.v.symmetric && i < c.rows; ++i)
    for (int64_t j = 0; j < i; ++j) c.scores[i * c.cols + j] = c.scores[j * c.cols + i];
  for (int64_t j = 0; j < c.col_bias.size; ++j) c.col_bias[j] = unit(random);
  for (int64_t i = 0; i < c.columns.size; ++i) c.columns[i] = static_cast<int64_t>(random() % (c.cols + 1)) - 1;
  for (Buffer<float>* each : {&c.gain, &c.col_gain, &c.row_normalizer, &c.col_normalizer})
    for (int64_t i = 0; i < each->size; ++i) (*each)[i] = unit(random);
  c.where.resize(c.rows), c.z_pos.resize(c.rows), c.z.resize(c.rows * c.cols);
  c.score.assign(c.scores.get(), c.scores.get() + c.rows * c.cols);
  for (int64_t i = 0; i < c.rows; ++i) {
    c.where[i] = c.v.symmetric ? (i + c.rows / 2) % c.rows : c.v.positives_given ? (7 * i + 3) % c.cols : i;
    if (c.v.positives_given) c.positives[i] = c.where[i];
    for (int64_t j = 0; j < c.cols; ++j) {
      const double z = 1.5 * c.score[i * c.cols + j] + 0.5 + (c.v.biased ? c.col_bias[j] : 0.0f);
      const bool out = j == c.where[i] || (c.v.symmetric && j == i);
      c.z[i * c.cols + j] = out ? -kInfinity : z;
      if (j == c.where[i]) c.z_pos[i] = z;
    }
    for (int64_t k = 0; k < c.v.excluded; ++k) {
      const int64_t j = c.columns[i * c.v.excluded + k];
      if (j >= 0) c.z[i * c.cols + j] = -kInfinity;
    }
  }
}

ck::Matrix make_matrix(Case& c) {
  ck::Matrix m;
  m.scores = c.scores.get(), m.weights = c.v.in_place ? c.scores.get() : c.weights.get();
  m.positive_weights = c.positive_weights.get();
  m.rows = c.rows, m.cols = c.cols;
  if (c.v.symmetric) m.pairs.diagonal = 0;
  m.pairs.columns = c.columns.get(), m.pairs.columns_count = c.v.excluded;
  m.pairs.col_bias = c.col_bias.get();
  m.positives = c.positives.get(), m.offset = 0;
  m.scale = 1.5f, m.bias = 0.5f;
  m.gain = c.gain.get(), m.share = 0.25;
  m.out = c.out.get(), m.threads = static_cast<int>(c.v.threads);
  return m;
}

double softplus(double z) { return std::max(z, 0.0) + std::log1p(std::exp(-std::fabs(z))); }
double sigmoid(double z) { return 1.0 / (1.0 + std::exp(-z)); }

// The log-sum-exp of n values `step` apart.
double log_sum_exp(const double* z, int64_t n, int64_t step) {
  double top = -kInfinity, sum = 0.0;
  for (int64_t k = 0; k < n; ++k) top = std::max(top, z[k * step]);
  if (top == -kInfinity) return top;
  for (int64_t k = 0; k < n; ++k) sum += std::exp(z[k * step] - top);
  return top + std::log(sum);
}

// What a call should give: dL/dz of each pair from its row's and from its column's side, and the value.
struct Expected {
  double value = 0.0;
  std::vector<double> by_row, by_col;  // [rows, cols]
  explicit Expected(const Case& c) : by_row(c.rows * c.cols), by_col(c.rows * c.cols) {}
};

Expected softmax(Case& c) {
  Expected e(c);
  for (int64_t i = 0; i < c.rows; ++i) {
    const double n = log_sum_exp(&c.z[i * c.cols], c.cols, 1), weight = c.row_gain_of(i) * sigmoid(n - c.z_pos[i]);
    e.value += c.row_gain_of(i) * softplus(n - c.z_pos[i]);
    for (int64_t j = 0; j < c.cols && n > -kInfinity; ++j)
      e.by_row[i * c.cols + j] = weight * std::exp(c.z[i * c.cols + j] - n);
    e.by_row[i * c.cols + c.where[i]] = -weight;
  }
  for (int64_t j = 0; c.v.columns_too && j < c.cols; ++j) {
    const double n = log_sum_exp(&c.z[j], c.rows, c.cols), weight = c.row_gain_of(j) * sigmoid(n - c.z_pos[j]);
    e.value += c.row_gain_of(j) * softplus(n - c.z_pos[j]);
    for (int64_t i = 0; i < c.rows && n > -kInfinity; ++i)
      e.by_col[i * c.cols + j] = weight * std::exp(c.z[i * c.cols + j] - n);
    e.by_col[j * c.cols + j] = -weight;
  }
  return e;
}

Expected sigmoids(Case& c) {
  Expected e(c);
  for (int64_t i = 0; i < c.rows; ++i) {
    for (int64_t j = 0; j < c.cols; ++j) {
      e.value += c.row_gain_of(i) * softplus(c.z[i * c.cols + j]);
      e.by_row[i * c.cols + j] = c.row_gain_of(i) * sigmoid(c.z[i * c.cols + j]);
    }
    e.value += c.row_gain_of(i) * softplus(-c.z_pos[i]);
    e.by_row[i * c.cols + c.where[i]] = -c.row_gain_of(i) * sigmoid(-c.z_pos[i]);
  }
  return e;
}

Expected exponentials(Case& c) {
  Expected e(c);
  for (int64_t i = 0; i < c.rows; ++i)
    for (int64_t j = 0; j < c.cols; ++j) {
      const int64_t at = i * c.cols + j;
      const double row = c.row_normalizer[i] + (c.v.relative ? c.z_pos[i] : c.row_normalizer[c.rows + i]);
      e.by_row[at] += c.row_gain_of(i) * std::exp(c.z[at] - row);
      e.value += c.row_gain_of(i) * std::exp(c.z[at] - row);
      if (c.v.relative) e.by_row[i * c.cols + c.where[i]] -= c.row_gain_of(i) * std::exp(c.z[at] - row);
      if (!c.v.columns_too) continue;
      const double col = c.col_normalizer[j] + (c.v.relative ? c.z_pos[j] : c.col_normalizer[c.cols + j]);
      e.by_col[at] += c.col_gain_of(j) * std::exp(c.z[at] - col);
      e.value += c.col_gain_of(j) * std::exp(c.z[at] - col);
      if (c.v.relative) e.by_col[j * c.cols + j] -= c.col_gain_of(j) * std::exp(c.z[at] - col);
    }
  return e;
}

void expect(const Case& c, const char* call, const char* what, double got, double expected, double size) {
  if (std::fabs(got - expected) <= 4e-5 * size + 1e-12) return;
  std::printf("FAILED %s: %s, %s of a %lld x %lld matrix: got %.9g, expected %.9g\n", ck::instruction_set(), call, what,
              static_cast<long long>(c.rows), static_cast<long long>(c.cols), got, expected);
  std::printf(
      "  columns %d symmetric %d relative %d given %d biased %d gains %d in_place %d beside %d excluded %d "
      "threads %d\n",
      c.v.columns_too, c.v.symmetric, c.v.relative, c.v.positives_given, c.v.biased, c.v.gains, c.v.in_place,
      c.v.beside, static_cast<int>(c.v.excluded), static_cast<int>(c.v.threads));
  std::exit(1);
}

void check(Case& c, const char* call, const Expected& e, double least = 0.0) {
  double dscale = 0.0, dbias = 0.0, size = 1.0;
  for (int64_t i = 0; i < c.rows; ++i)
    for (int64_t j = 0; j < c.cols; ++j) {
      const int64_t at = i * c.cols + j;
      const double one = e.by_row[at] + e.by_col[at], mirrored = c.v.symmetric ? e.by_row[j * c.cols + i] : 0.0;
      const double parts = std::fabs(e.by_row[at]) + std::fabs(e.by_col[at]) + std::fabs(mirrored);
      double got = c.v.in_place ? c.scores[at] : c.weights[at];
      if (c.v.beside && j == c.where[i]) {
        if (c.positive_weights[i] != 0.0f) expect(c, call, "place of a positive", got, 0.0, 0.0);
        got += c.positive_weights[i];
      }
      expect(c, call, "weight", got, 1.5 * (one + mirrored), least + 1.5 * parts * (j == c.where[i] ? 10.0 : 1.0));
      dscale += one * c.score[at], dbias += one, size += 4.0 * parts;
    }
  expect(c, call, "value", c.out[0], e.value, size + std::fabs(e.value));
  expect(c, call, "dscale", c.out[1], dscale, size);
  expect(c, call, "dbias", c.out[2], dbias, size);
}

// The same with lifts, a buffer for their gradients, and weights that are not scaled; capped: with ceilings of the
// rows, above which a pair does not count.
void run_lifted(const Variant& v, int64_t rows, int64_t cols, std::mt19937& random, bool capped) {
  Case c(v, rows, cols);
  fill(c, random);
  Buffer<float> lift(rows), dlift(rows), ceiling(capped ? rows : 0);
  for (int64_t i = 0; i < rows; ++i) {
    lift[i] = 0.25f * static_cast<float>(i % 5), c.z_pos[i] += lift[i];
    if (capped) ceiling[i] = 0.5f * static_cast<float>(i % 4) - 0.6f;
    for (int64_t j = 0; capped && j < cols; ++j)
      if (1.5f * c.scores[i * cols + j] > ceiling[i]) c.z[i * cols + j] = -kInfinity;
  }
  const Expected expected = softmax(c);
  ck::Matrix m = make_matrix(c);
  m.lift = lift.get(), m.dlift = dlift.get(), m.unscaled = true;
  m.pairs.row_ceiling = ceiling.get();
  ck::softmax_matrix(m, false, false, true);
  float* const weights = c.v.in_place ? c.scores.get() : c.weights.get();
  for (int64_t k = 0; k < rows * cols; ++k) weights[k] *= 1.5f;
  for (int64_t i = 0; i < c.positive_weights.size; ++i) c.positive_weights[i] *= 1.5f;
  check(c, "lifted softmax", expected);
  for (int64_t i = 0; i < rows; ++i) {
    const double want = expected.by_row[i * cols + c.where[i]];
    expect(c, "lifted softmax", "dlift", dlift[i], want, 1.0);
  }
}

// The loss by labels, of three classes; a row alone in its class has no positive.
Expected labels_of(const Case& c, const Buffer<int64_t>& row_ids, const Buffer<int64_t>& col_ids, Buffer<float>& share,
                   Buffer<int64_t>& single) {
  Expected e(c);
  for (int64_t i = 0; i < c.rows; ++i) {
    std::vector<double> z(c.cols);
    double mean = 0.0;
    int64_t count = 0;
    single[i] = -1;
    const double gain = c.v.gains ? c.gain.data[i] : 0.25;
    for (int64_t j = 0; j < c.cols; ++j) {
      const bool own = c.v.symmetric && j == i;
      z[j] = own ? -kInfinity : 1.5 * c.score[i * c.cols + j] + 0.5;
      if (!own && row_ids.data[i] == col_ids.data[j]) mean += z[j], ++count, single[i] = j;
    }
    if (count != 1) single[i] = -1;
    share[i] = count ? 1.0f / static_cast<float>(count) : 0.0f;
    if (!count) continue;
    const double a = log_sum_exp(z.data(), c.cols, 1);
    e.value += gain * (a - mean / static_cast<double>(count));
    for (int64_t j = 0; j < c.cols; ++j) {
      const bool alike = z[j] > -kInfinity && row_ids.data[i] == col_ids.data[j];
      const double target = alike ? 1.0 / static_cast<double>(count) : 0.0;
      e.by_row[i * c.cols + j] = gain * (std::exp(z[j] - a) - target);
    }
  }
  return e;
}

void run_labels(const Variant& v, int64_t rows, int64_t cols, std::mt19937& random) {
  Case c(v, rows, cols);
  fill(c, random);
  Buffer<int64_t> row_ids(rows), col_ids(cols), single(rows);
  Buffer<float> share(rows);
  for (int64_t i = 0; i < rows; ++i) row_ids[i] = i == rows - 1 ? -7 : i % 3;
  for (int64_t j = 0; j < cols; ++j) col_ids[j] = v.symmetric ? row_ids[j] : j % 3;
  const Expected expected = labels_of(c, row_ids, col_ids, share, single);
  for (int64_t i = 0; i < rows; ++i)  // no positives: no weights
    if (v.gains && share[i] == 0.0f) c.gain[i] = 0.0f;
  if (!v.gains) return;
  ck::Matrix m = make_matrix(c);
  m.pairs.row_ids = row_ids.get(), m.pairs.col_ids = col_ids.get(), m.pairs.equal_ids = ck::kAlikeCount;
  m.positives = single.get();
  c.where.assign(single.get(), single.get() + rows);
  ck::label_matrix(m, share.get(), v.symmetric);
  check(c, "labels", expected, 0.1);  // differences of a softmax and a share
}

bool run_case(const Variant& v, int64_t rows, int64_t cols, std::mt19937& random) {
  const bool square = rows == cols && !v.positives_given;
  if ((v.columns_too && !square) || (!v.positives_given && rows > cols)) return false;
  if (v.symmetric && (rows != cols || rows % 2 || !v.positives_given || v.columns_too || v.biased || v.excluded))
    return false;
  {
    Case c(v, rows, cols);
    fill(c, random);
    const Expected expected = softmax(c);
    ck::softmax_matrix(make_matrix(c), v.columns_too, v.symmetric, true);
    check(c, "softmax", expected);
  }
  if (!v.columns_too && !v.symmetric)
    for (const bool capped : {false, true}) run_lifted(v, rows, cols, random, capped);
  if (!v.biased && !v.excluded) run_labels(v, rows, cols, random);
  if (v.symmetric) return true;
  for (const bool sigmoid : {false, true}) {
    if (sigmoid && (v.columns_too || v.relative)) continue;
    Case c(v, rows, cols);
    fill(c, random);
    const Expected expected = sigmoid ? sigmoids(c) : exponentials(c);
    ck::GivenSide row = {sigmoid ? nullptr : c.row_normalizer.get(), c.gain.get(), c.row_state.get()}, col;
    if (v.columns_too) col = {c.col_normalizer.get(), c.col_gain.get(), c.col_state.get()};
    const auto term = sigmoid ? ck::PairTerm::kSigmoid : ck::PairTerm::kExponential;
    ck::weighted_matrix(make_matrix(c), term, row, col, v.relative, c.dots.get());
    check(c, sigmoid ? "sigmoid" : "exponential", expected);
    for (int64_t i = 0; i < rows; ++i) expect(c, "any", "dot", c.dots[i], c.score[i * cols + c.where[i]], 0.0);
  }
  return true;
}

int64_t run_instruction_set(unsigned seed) {
  std::mt19937 random(seed);
  int64_t matrices = 0;
  for (const int64_t rows : {1, 2, 8, 31, 32, 33, 66, 182})
    for (const int64_t cols : {rows, rows + 1, rows + 40})
      for (int bits = 0; bits < 256; ++bits)
        for (const int64_t excluded : {0, 1, 3}) {
          if ((rows > 40 && bits % 5 != excluded) || (bits + rows + excluded + seed) % options.every != 0) continue;
          const Variant v = {(bits & 1) != 0,  (bits & 2) != 0,
                             (bits & 4) != 0,  (bits & 8) != 0,
                             (bits & 16) != 0, (bits & 32) != 0,
                             (bits & 64) != 0, (bits & 128) != 0,
                             excluded,         static_cast<int64_t>(random() % 3 + 1)};
          matrices += run_case(v, rows, cols, random);
        }
  return matrices;
}

}  // namespace

int main(int argc, char** argv) {
  read_options(argc, argv);
  for (const char* name : {"baseline", "avx2", "avx512"}) {
    try {
      ck::set_instruction_set(name);
    } catch (const std::invalid_argument&) {
      std::printf("%s: not on this machine\n", name);
      continue;
    }
    const int64_t matrices = run_rounds(run_instruction_set);
    std::printf("%s: %lld matrices are right\n", name, static_cast<long long>(matrices));
  }
  return 0;
}
