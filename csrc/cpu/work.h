// One call's whole matrix with what is made of it, for the sources of the functions on matrices that stay in a cache.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>

#include "../include/api.h"
#include "../include/check.h"
#include "isa.h"

// (Without a name that other files could share: the linker must not choose among copies of a function.)
namespace ck {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Scores that are worth a team of threads.
constexpr int64_t kTeamScores = 32768;

// Memory that a thread keeps from one call to the next: fresh pages take longer than a small matrix.
template <typename T>
class Kept {
 public:
  T* get(int64_t n) {
    if (n > size_) {
      size_ = 0;
      data_.reset();
      data_.reset(new T[n]);
      size_ = n;
    }
    return data_.get();
  }

 private:
  std::unique_ptr<T[]> data_;
  int64_t size_ = 0;
};

struct Memory {
  Kept<Scratch> scratch;
  Kept<ParamSums> params;
  Kept<float> partials, vectors, targets;
  Kept<bool> kept;
  Kept<double> weights, sums;
  Kept<int64_t> columns, positives;
};

thread_local Memory memory;

// The vectors of the rows, or of the columns.
struct SideVectors {
  int64_t n = 0;
  float *shift = nullptr, *sum = nullptr;                         // [n] state
  float *normalizer_shift = nullptr, *normalizer_rest = nullptr;  // [n]
  float* gain = nullptr;                                          // [n]

  // The state of nothing.
  void clear() {
    for (int64_t i = 0; i < n; ++i) shift[i] = -std::numeric_limits<float>::infinity(), sum[i] = 0.0f;
  }
};

// log(1 + e^z) and its derivative, from one exponential.
struct Softplus {
  double value, sigmoid;

  explicit Softplus(double z) {
    const double e = std::exp(-std::fabs(z));
    value = (z > 0.0 ? z : z <= 0.0 ? 0.0 : z) + std::log1p(e);
    sigmoid = (z >= 0.0 ? 1.0 : e) / (1.0 + e);
  }
};

double gain_of(const float* gain, double share, int64_t i) { return gain ? gain[i] : share; }

// One call's matrix with what is made of it.
struct Work {
  const Matrix& m;
  float params[3];                          // scale, bias, center
  float factor;                             // what dL/dz is multiplied by in the weights' place
  const int64_t* positives = nullptr;       // [rows] their columns, -1 for none; null: no row has one
  float *dots = nullptr, *z_pos = nullptr;  // [rows] the positives' scores and logits, 0 where there is none
  float* moment = nullptr;                  // [rows] sums of exponentials times scores, which two visits share
  double* dz_pos = nullptr;                 // [rows] the positives' weights
  SideVectors row, col;
  Pairs pairs;

  explicit Work(const Matrix& matrix, bool centered)
      : m(matrix), params{m.scale, m.bias, 0.0f}, factor(m.unscaled ? 1.0f : m.scale), pairs(m.pairs) {
    float* next = memory.vectors.get(8 * m.rows + 5 * m.cols);
    for (SideVectors* side : {&row, &col}) {
      side->n = side == &row ? m.rows : m.cols;
      for (float** vector : {&side->shift, &side->sum, &side->normalizer_shift, &side->normalizer_rest, &side->gain}) {
        *vector = next;
        next += side->n;
      }
    }
    dots = next, z_pos = next + m.rows, moment = next + 2 * m.rows;
    dz_pos = memory.weights.get(m.rows);
    for (int64_t i = 0; i < m.rows; ++i) dots[i] = z_pos[i] = 0.0f, dz_pos[i] = 0.0;
    find_positives();
    leave_positives_out();
    if (positives) chosen_isa().gather_run(m, positives, dots, z_pos);
    if (centered && positives) params[2] = mean_dot();
  }

  // Where the positive of each row lies.
  void find_positives() {
    positives = m.positives;
    if (positives || m.offset == kNoDiagonal) return;
    int64_t* columns = memory.positives.get(m.rows);
    for (int64_t i = 0; i < m.rows; ++i) columns[i] = i + m.offset;
    positives = columns;
  }

  // The positives join the pairs that are left out: as the diagonal or as columns where these are free.
  void leave_positives_out() {
    if (!positives) return;
    if (!m.positives && pairs.diagonal == kNoDiagonal) {
      pairs.diagonal = m.offset;
      return;
    }
    const int64_t before = pairs.columns_count, count = before + 1;
    const int64_t* all = positives;
    if (before > 0) {
      int64_t* columns = memory.columns.get(m.rows * count);
      for (int64_t i = 0; i < m.rows; ++i) {
        for (int64_t k = 0; k < before; ++k) columns[i * count + k] = pairs.columns[i * before + k];
        columns[i * count + before] = positives[i];
      }
      all = columns;
    }
    pairs.columns = all, pairs.columns_count = count;
  }

  float mean_dot() const {
    double sum = 0.0;
    for (int64_t i = 0; i < m.rows; ++i) sum += dots[i];
    return static_cast<float>(m.rows ? sum / static_cast<double>(m.rows) : 0.0);
  }

  // The whole matrix as a panel of which nothing is wanted yet.
  Panel panel(PairTerm term) const {
    Panel p;
    p.term = term;
    p.scores = const_cast<float*>(m.scores);  // a panel's weights may lie there, and only they are written
    p.rows = m.rows, p.cols = m.cols, p.stride = m.cols;
    p.params = params;
    p.factor = &factor;
    p.pairs = pairs;
    p.weights_stride = m.cols;
    return p;
  }

  void run(Panel& p) const { chosen_isa().run_panel(p, buffers(p, p.col.sum ? 2 : 0)); }

  // One of the two visits that share their exponentials; `columns`: they take part.
  void visit(Panel& p, bool first, bool columns) const {
    Buffers b = buffers(p, columns ? 3 : 0);
    b.row_shift = row.shift, b.row_sum = row.sum, b.row_moment = moment;
    b.col_moment = columns ? b.col_sum + stripes() * p.cols : nullptr;
    b.kept = memory.kept.get(stripes());
    p.weights = m.weights;
    chosen_isa().visit_matrix(p, first, columns, b);
  }

  int64_t stripes() const { return (m.rows + kStripe - 1) / kStripe; }

  // The panel's team, and memory with so many vectors of every stripe's columns.
  Buffers buffers(Panel& p, int64_t of_columns) const {
    const int64_t most = p.rows * p.cols < kTeamScores ? 1 : stripes() < m.threads ? stripes() : m.threads;
    p.threads = static_cast<int>(most > 1 ? most : 1);
    float* const partials = of_columns ? memory.partials.get(of_columns * stripes() * p.cols) : nullptr;
    return {memory.scratch.get(p.threads), memory.params.get(stripes()), partials,
            partials ? partials + stripes() * p.cols : nullptr};
  }

  // Puts the positives' weights where they are wanted, and adds their part of the gradients of scale and bias.
  // `symmetric`: that of the mirrored pair lies in the same place.
  void place_positives(bool symmetric) const {
    if (m.positive_weights) std::fill_n(m.positive_weights, m.rows, 0.0f);
    for (int64_t i = 0; positives && i < m.rows; ++i) {
      const int64_t p = positives[i];
      if (p < 0) continue;
      const double both = symmetric ? dz_pos[i] + dz_pos[p] : dz_pos[i];
      const float weight = static_cast<float>(both * factor);
      if (m.positive_weights) m.positive_weights[i] = weight;
      m.weights[i * m.cols + p] = m.positive_weights ? 0.0f : weight;
      m.out[1] += dz_pos[i] * (static_cast<double>(dots[i]) - params[2]);
      m.out[2] += dz_pos[i];
    }
  }
};

void use_state(Side& side, SideVectors& v) {
  v.clear();
  side.shift = v.shift, side.sum = v.sum;
}

void use_weights(Side& side, const SideVectors& v) {
  side.normalizer_shift = v.normalizer_shift, side.normalizer_rest = v.normalizer_rest, side.gain = v.gain;
}

void check_matrix(const Matrix& m) {
  check(m.rows >= 0 && m.cols >= 0 && m.threads >= 1, "matrix: sizes must be non-negative, threads at least 1");
  check(m.rows == 0 || m.cols == 0 || m.scores, "matrix: scores must not be null");
  check(m.out, "matrix: out must not be null");
  check(!m.positive_weights || m.weights, "matrix: positive_weights come with weights");
  check(!m.pairs.row_scale && !m.pairs.col_scale, "matrix: no scales by row");
  check(m.pairs.columns_count == 0 || m.pairs.columns, "matrix: columns must not be null");
  for (int64_t i = 0; m.positives && i < m.rows; ++i)
    check(m.positives[i] >= -1 && m.positives[i] < m.cols, "matrix: a positive lies in no column");
  if (!m.positives && m.offset != kNoDiagonal)
    check(m.offset >= 0 && m.rows + m.offset <= m.cols, "matrix: a positive lies in no column");
}

}  // namespace
}  // namespace ck
