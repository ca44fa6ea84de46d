// A whole matrix of scores at once, for matrices that stay in a cache: the loss's value, and the weights, the
// positives' in their places or beside them, so that the gradients are two products. One or two of the panel's passes,
// and between them what is O(N), in double.
#include "work.h"

namespace ck {
namespace {

// Of rows (or columns) with their states: sum of gain * softplus(n - z_pos), or of gain * (n - z_pos) where the
// denominator does not `include` the positive; z_pos with its lift. Leaves the vectors of the weights of their
// negatives, and adds to those of the positives. n = -inf, the log-sum of nothing, has loss and weights 0.
double softmax_losses(const Work& w, SideVectors& v, bool include) {
  double value = 0.0;
  for (int64_t i = 0; i < v.n; ++i) {
    const double z_pos = w.z_pos[i];
    const bool none = v.sum[i] == 0.0f && z_pos == z_pos;
    const double rest = std::log(static_cast<double>(v.sum[i])), lift = w.m.lift ? w.m.lift[i] : 0.0;
    const double margin = none ? -kInfinity : (v.shift[i] - z_pos) + (rest - lift);
    const Softplus loss(margin);
    const double gain = gain_of(w.m.gain, w.m.share, i);
    const double weight = include ? gain * loss.sigmoid : none ? 0.0 : gain;
    value += gain * (include ? loss.value : none ? 0.0 : margin);
    w.dz_pos[i] -= weight;
    v.gain[i] = static_cast<float>(weight);
    v.normalizer_shift[i] = none ? w.z_pos[i] : v.shift[i];
    v.normalizer_rest[i] = static_cast<float>(none ? kInfinity : rest);
  }
  return value;
}

// The given normalisers as those of the weights: two numbers each or, if they are relative, what is added to the
// positives' logits. A rest of +inf says that a row has no negatives.
void find_normalizers(const Work& w, const GivenSide& given, bool relative, SideVectors& v) {
  for (int64_t i = 0; i < v.n; ++i) {
    const float shift = relative ? w.z_pos[i] : given.normalizer[i];
    const float rest = relative ? given.normalizer[i] : given.normalizer[v.n + i];
    const double total = static_cast<double>(shift) + rest;
    const float rounded = static_cast<float>(total);
    const bool split = relative && std::isfinite(rounded);
    v.normalizer_shift[i] = split ? rounded : shift;
    v.normalizer_rest[i] = split ? static_cast<float>(total - rounded) : rest;
    v.gain[i] = static_cast<float>(gain_of(given.gain, w.m.share, i));
  }
}

// Of rows (or columns) with their states: sum of gain * exp(log-sum - normalizer), and the states as log-sums. What
// counts from the positives weighs them by the opposite.
double exponential_sums(const Work& w, const GivenSide& given, bool relative, const SideVectors& v) {
  double value = 0.0;
  for (int64_t i = 0; i < v.n; ++i) {
    const bool none = v.sum[i] == 0.0f;
    const double exponent = (static_cast<double>(v.shift[i]) - v.normalizer_shift[i]) - v.normalizer_rest[i];
    const double sum = none ? 0.0 : v.gain[i] * (v.sum[i] * std::exp(exponent));
    value += sum;
    if (relative) w.dz_pos[i] -= sum;
    if (!given.state) continue;
    given.state[i] = none ? 0.0f : v.shift[i];
    given.state[v.n + i] = static_cast<float>(none ? -kInfinity : std::log(static_cast<double>(v.sum[i])));
  }
  return value;
}

// Runs a panel with states, which has weights if they are wanted.
void run_with_weights(const Work& w, Panel& p) {
  const Matrix& m = w.m;
  if (m.weights) {
    p.weights = m.weights;
    p.dparams = m.out + 1;
  } else {
    p.row.gain = p.col.gain = nullptr;
  }
  w.run(p);
}

void sum_sigmoids(Work& w, const GivenSide& row) {
  const Matrix& m = w.m;
  Panel p = w.panel(PairTerm::kSigmoid);
  for (int64_t i = 0; i < m.rows; ++i)
    w.row.sum[i] = 0.0f, w.row.gain[i] = static_cast<float>(gain_of(row.gain, m.share, i));
  p.row.sum = w.row.sum, p.row.gain = w.row.gain;
  run_with_weights(w, p);
  for (int64_t i = 0; i < m.rows; ++i) {
    double sum = w.row.sum[i];
    const double gain = w.row.gain[i];
    if (w.positives && w.positives[i] >= 0) {
      const Softplus loss(-static_cast<double>(w.z_pos[i]));
      sum += loss.value;
      w.dz_pos[i] = -gain * loss.sigmoid;
    }
    m.out[0] += gain * sum;
    if (row.state) row.state[i] = static_cast<float>(sum);
  }
}

void sum_exponentials(Work& w, const GivenSide& row, const GivenSide& col, bool relative) {
  const Matrix& m = w.m;
  Panel p = w.panel(PairTerm::kExponential);
  use_state(p.row, w.row);
  find_normalizers(w, row, relative, w.row);
  use_weights(p.row, w.row);
  if (col.normalizer) {
    use_state(p.col, w.col);
    find_normalizers(w, col, relative, w.col);
    use_weights(p.col, w.col);
  }
  run_with_weights(w, p);
  m.out[0] += exponential_sums(w, row, relative, w.row);
  if (col.normalizer) m.out[0] += exponential_sums(w, col, relative, w.col);
}

}  // namespace

void softmax_matrix(const Matrix& m, bool both, bool symmetric, bool include) {
  check_matrix(m);
  check(m.positives || m.offset != kNoDiagonal, "softmax_matrix: every row must have a positive");
  for (int64_t i = 0; m.positives && i < m.rows; ++i)
    check(m.positives[i] >= 0, "softmax_matrix: every row must have a positive");
  check(!(both || symmetric) || m.rows == m.cols, "softmax_matrix: the matrix must be square");
  check(!both || (!symmetric && !m.positives && m.offset == 0), "softmax_matrix: columns have their rows' positives");
  check(!m.lift || !(both || symmetric), "softmax_matrix: rows alone have lifts");
  m.out[0] = m.out[1] = m.out[2] = 0.0;
  Work w(m, true);
  const bool columns = both || symmetric, capped = is_capped(m.pairs);
  const bool visited = m.cols <= kChunk && !capped;  // one exponential does not serve both sides of a pair then
  Panel statistics = w.panel(PairTerm::kExponential);
  use_state(statistics.row, w.row);
  if (both) use_state(statistics.col, w.col);
  visited ? w.visit(statistics, true, columns) : w.run(statistics);
  m.out[0] = softmax_losses(w, w.row, include);
  if (both) m.out[0] += softmax_losses(w, w.col, include);
  for (int64_t i = 0; m.dlift && i < m.rows; ++i) m.dlift[i] = static_cast<float>(w.dz_pos[i]);
  if (!m.weights) return;
  Panel p = w.panel(PairTerm::kExponential);
  use_weights(p.row, w.row);
  if (columns) use_weights(p.col, both ? w.col : w.row);
  p.weights = m.weights;
  p.dparams = m.out + 1;
  visited ? w.visit(p, false, columns) : w.run(p);
  if (symmetric) m.out[1] *= 0.5, m.out[2] *= 0.5;  // each pair was counted from both of its ends
  w.place_positives(symmetric);
}

void weighted_matrix(const Matrix& m, PairTerm term, const GivenSide& row, const GivenSide& col, bool relative,
                     float* dots) {
  check_matrix(m);
  check(term == PairTerm::kSigmoid ? !col.normalizer && !relative : row.normalizer || m.rows == 0,
        "weighted_matrix: the exponential term needs normalizers, the sigmoid term has none");
  check(!relative || m.positives || m.offset != kNoDiagonal, "weighted_matrix: relative to which positives?");
  check(!relative || !col.normalizer || (m.rows == m.cols && !m.positives && m.offset == 0),
        "weighted_matrix: columns have their rows' positives");
  m.out[0] = m.out[1] = m.out[2] = 0.0;
  Work w(m, relative);
  term == PairTerm::kSigmoid ? sum_sigmoids(w, row) : sum_exponentials(w, row, col, relative);
  if (m.weights) w.place_positives(false);
  for (int64_t i = 0; dots && i < m.rows; ++i) dots[i] = w.dots[i];
}

}  // namespace ck
