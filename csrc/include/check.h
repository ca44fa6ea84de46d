// Checks of the library's own arguments: they guard against wrong calls from the Python side, not user input.
#pragma once

#include <stdexcept>
#include <string>

#include "api.h"

namespace ck {

inline void check(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(std::string("contrastive_kernels: ") + what);
}

// Of a panel that has weights.
inline void check_targets(const Panel& p) {
  if (!p.row.target && !p.col.target) return;
  check(p.term == PairTerm::kExponential && !p.row.sum && !p.col.sum, "weight_panel: no targets with sums");
  for (const Side* side : {&p.row, &p.col})
    check(!side->gain == !side->target && !side->target == !side->target_alike,
          "weight_panel: targets of every side with a gain, or of none");
}

// Whether a pair may be left out of its row's part and not of its column's.
inline bool is_capped(const Pairs& pairs) { return pairs.row_ceiling || pairs.col_ceiling || pairs.guide; }

// Ceilings and guides are the exponential term's, and go without targets.
inline void check_ceilings(const Panel& p) {
  const bool thresholds = p.pairs.row_threshold || p.pairs.col_threshold;
  check(!p.pairs.guide || p.pairs.guide_stride >= p.cols, "panel: the guide's stride must be at least cols");
  check(p.pairs.guide || !thresholds || p.rows == 0 || p.cols == 0, "panel: thresholds need a guide's scores");
  if (!is_capped(p.pairs)) return;
  check(p.term == PairTerm::kExponential && !p.row.target && !p.col.target, "panel: ceilings with targets or signs");
}

// Scales by row and column are the exponential term's, and both sides take part.
inline void check_scales(const Panel& p) {
  if (!p.pairs.row_scale && !p.pairs.col_scale)
    return check(!p.row.dscale && !p.col.dscale, "panel: gradients of scales that are not there");
  check(p.pairs.row_scale && p.pairs.col_scale, "panel: scales of rows need scales of columns");
  check(p.term == PairTerm::kExponential && !p.dparams, "panel: scales by row with signs or one scale's gradient");
  const bool sums = p.row.sum && p.col.sum, gains = p.row.gain && p.col.gain;
  check(p.weights ? gains && !p.row.sum && !p.col.sum : sums, "panel: with scales by row, both sides' sums or weights");
}

}  // namespace ck
