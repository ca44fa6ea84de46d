// The supervised contrastive loss of a whole matrix of scores at once; see matrix.cpp.
#include "work.h"

namespace ck {
namespace {

// The vectors of the losses by labels.
struct Labels {
  const float* share;   // [rows] 1 / k_i, 0 without positives
  const double* sum;    // [rows] of the positives' scores
  float* target;        // [rows] zeros,
  float* target_alike;  // [rows] and what comes off the positives' weights
};

// The mean over the rows that have some of the mean score of their positives.
float mean_positive(const Labels& labels, int64_t rows) {
  double total = 0.0, count = 0.0;
  for (int64_t i = 0; i < rows; ++i) {
    total += labels.share[i] > 0.0f ? labels.sum[i] * labels.share[i] : 0.0;
    count += labels.share[i] > 0.0f ? 1.0 : 0.0;
  }
  return static_cast<float>(count > 0.0 ? total / count : 0.0);
}

// Of rows with their states: sum of gain * (a - mean_p z_p), of a row with one positive gain * softplus(n - z_p).
// Leaves the vectors of the weights, and those of the positives that are outside of the log-sum.
double label_losses(const Work& w, const Labels& labels, SideVectors& v) {
  double value = 0.0;
  for (int64_t i = 0; i < v.n; ++i) {
    const float share = labels.share[i], z_pos = w.z_pos[i];
    const double gain = gain_of(w.m.gain, w.m.share, i), rest = std::log(static_cast<double>(v.sum[i]));
    const bool none = v.sum[i] == 0.0f && z_pos == z_pos, single = share == 1.0f;
    double weight = gain;
    if (single) {
      const Softplus loss(none ? -kInfinity : (v.shift[i] - static_cast<double>(z_pos)) + rest);
      value += gain * loss.value;
      weight = gain * loss.sigmoid;
      w.dz_pos[i] = -weight;
    } else if (share > 0.0f) {
      const double mean = static_cast<double>(w.params[0]) * (labels.sum[i] * share) + w.params[1];
      value += gain * ((v.shift[i] - mean) + rest);
    }
    labels.target[i] = 0.0f;
    labels.target_alike[i] = single ? 0.0f : static_cast<float>(gain * share);
    v.gain[i] = static_cast<float>(weight);
    v.normalizer_shift[i] = none ? 0.0f : v.shift[i];
    v.normalizer_rest[i] = static_cast<float>(none ? kInfinity : rest);
  }
  return value;
}

}  // namespace

void label_matrix(const Matrix& m, const float* share, bool symmetric) {
  check_matrix(m);
  check(m.rows == 0 || share, "label_matrix: share must not be null");
  check(m.pairs.row_ids && m.pairs.col_ids && m.pairs.equal_ids == kAlikeCount,
        "label_matrix: pairs of equal ids count");
  check(!symmetric || m.rows == m.cols, "label_matrix: the matrix must be square");
  check(m.weights, "label_matrix: weights must not be null");
  m.out[0] = m.out[1] = m.out[2] = 0.0;
  Work w(m, false);
  float* const targets = memory.targets.get(2 * m.rows);
  double* const sums = memory.sums.get(m.rows);
  chosen_isa().alike_run(m, sums);
  const Labels labels = {share, sums, targets, targets + m.rows};
  w.params[2] = mean_positive(labels, m.rows);
  Panel statistics = w.panel(PairTerm::kExponential);
  use_state(statistics.row, w.row);
  w.run(statistics);
  m.out[0] = label_losses(w, labels, w.row);
  Panel p = w.panel(PairTerm::kExponential);
  for (Side* side : {&p.row, &p.col}) {
    if (side == &p.col && !symmetric) break;
    use_weights(*side, w.row);
    side->target = labels.target, side->target_alike = labels.target_alike;
  }
  p.weights = m.weights;
  p.dparams = m.out + 1;
  w.run(p);
  if (symmetric) m.out[1] *= 0.5, m.out[2] *= 0.5;  // each pair was counted from both of its ends
  w.place_positives(symmetric);
}

}  // namespace ck
