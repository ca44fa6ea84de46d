"""The exponential term: w_ij = r_i exp(z_ij - a_i) + c_j exp(z_ij - b_j); sums of exponentials by rows and columns.

A usual tile has one shift, and one exponential serves rows and columns: exp(z - shift) = 2^(slope * score - offset) is
one multiply-add, rounded once, relative to the difference and not to the logit. The gains take the rest.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pair_terms import LOG2_E, NEVER, PairTerm, exp, exp2, multiply_add
from .pairs import below, leave_out_alike, offsets, with_columns

__all__ = ["EXPONENTIAL", "referred_gain"]

_INF = tl.constexpr(float("inf"))
#: Normalisers of a usual tile lie this close to the largest one: what then underflows of a row is below e^(40 - 87) of
#: its weights.
_SPREAD = tl.constexpr(40.0)
#: The smallest normal number. A gain that is referred to a far lower shift keeps its digits down to here.
_TINY = tl.constexpr(2.0**-126)
#: Sums against a usual tile's shift are at least this: what underflowed was below 128 * 2^-126 / 1e-25 of it, and the
#: shift lies within e^58 of the row's largest term.
_SMALLEST_SUM = tl.constexpr(1e-25)
_LARGEST_SUM = tl.constexpr(1e37)


@triton.jit
def _line(scale, bias, shift):
    """(slope, offset, unit): exp(z - shift) = unit * 2^(slope * score - offset), z = scale * score + bias.

    Slope and offset are float32, so that the multiply-add is exact up to its own rounding; what their rounding takes
    from a large offset is in `unit`. The slope's error is relative to z - shift, for the offset is made with it too.
    """
    slope = scale * LOG2_E
    error = (slope.to(tl.float64) - scale.to(tl.float64) * LOG2_E).to(tl.float32)
    ratio = (error / scale).to(tl.float64) + LOG2_E  # slope / scale
    exact = (shift.to(tl.float64) - bias.to(tl.float64)) * ratio
    offset = exact.to(tl.float32)
    return slope, offset, tl.exp2((offset.to(tl.float64) - exact).to(tl.float32))


@triton.jit
def _highest_and_lowest(side, high, low):
    """The largest and the smallest normaliser of a side and the numbers given; +inf and NaN are passed over."""
    normalizer = side[0] + side[1]
    high = tl.maximum(high, tl.max(tl.where(normalizer == _INF, -_INF, normalizer), 0))
    return high, tl.minimum(low, tl.min(normalizer, 0))


@triton.jit
def _finite(shift):
    """A shift that exponentials can be taken against: the maximum of nothing (-inf) gives 0."""
    return tl.where(shift == -_INF, 0.0, shift)


@triton.jit
def referred_gain(side, shift):
    """gain * e^(shift - normaliser), what multiplies an exponential taken against `shift`.

    The normaliser's two numbers are never added: where they are large their sum has lost the second one. A rest of +inf
    says that there are no negatives, and gives zero.
    """
    own_shift, rest, gain = side
    return tl.where(rest == _INF, 0.0, gain * exp((shift - own_shift) - rest))


@triton.jit
def _refer_gain(side, shift):
    """The same, and infinite where digits would be lost.

    The normaliser lies so far from the shift that exponentials might underflow, or the referred gain is subnormal.
    """
    own_shift, rest, gain = side
    referred = referred_gain(side, shift)
    far = (tl.abs((shift - own_shift) - rest) > _SPREAD) | (tl.abs(referred) < _TINY)
    return tl.where(far & (rest != _INF) & (gain != 0), _INF, referred)


@triton.jit
def _refer(row, col, scale, bias, factor, ROW: tl.constexpr, COL: tl.constexpr):
    """The largest normaliser is the shift, if the others are near; gains are referred to it."""
    high = -_INF
    low = _INF
    if ROW:
        high, low = _highest_and_lowest(row, high, low)
    if COL:
        high, low = _highest_and_lowest(col, high, low)
    # nothing at all to refer to: +inf - -inf is not narrow
    usual = (high - low <= _SPREAD) & (high > -_INF)
    slope, offset, unit = _line(scale, bias, high)
    unit *= factor
    row_gain = row[2]
    col_gain = col[2]
    if ROW:
        row_gain = referred_gain(row, high) * unit
    if COL:
        col_gain = referred_gain(col, high) * unit
    return usual, (high, slope, offset, unit / factor, row_gain, col_gain)


@triton.jit
def _usual(
    scores, pairs, of_cols, ids, limits, referred, scale, bias,
    ROW: tl.constexpr, COL: tl.constexpr, WEIGHTS: tl.constexpr, STATISTICS: tl.constexpr,
):  # fmt: skip
    scores = leave_out_alike(scores, NEVER, pairs, ids)
    row_gain = tl.zeros([scores.shape[0]], tl.float32)
    col_gain = tl.zeros([scores.shape[1]], tl.float32)
    if WEIGHTS:
        shift, slope, offset, unit, row_gain, col_gain = referred
    else:
        highest = with_columns(scores, scale, pairs, of_cols)
        if ROW and COL:
            by_row = below(highest, NEVER, scores, scale, pairs, limits, True)
            highest = tl.maximum(by_row, below(highest, NEVER, scores, scale, pairs, limits, False))
        else:
            highest = below(highest, NEVER, scores, scale, pairs, limits, ROW)
        shift = tl.max(tl.max(highest, 1), 0) * scale + bias
        slope, offset, unit = _line(scale, bias, shift)
    e = exp2(multiply_add(scores, slope, offsets(-offset, pairs, of_cols)))
    rows = tl.zeros([scores.shape[0]], tl.float32)
    cols = tl.zeros([scores.shape[1]], tl.float32)
    row_sum = rows
    col_sum = cols
    by_row = below(e, 0.0, scores, scale, pairs, limits, True)  # (far above, it may be infinite)
    by_col = below(e, 0.0, scores, scale, pairs, limits, False)
    if STATISTICS and ROW:
        row_sum = tl.sum(by_row, 1) * unit
    if STATISTICS and COL:
        col_sum = tl.sum(by_col, 0) * unit
    w = e
    if not WEIGHTS:
        pass  # nobody weighs: what is kept is the exponential itself
    elif ROW and COL:
        if pairs[11] is None and pairs[12] is None and pairs[13] is None:
            w = e * (row_gain[:, None] + col_gain[None, :])
        else:
            w = by_row * row_gain[:, None] + by_col * col_gain[None, :]
    elif ROW:
        w = by_row * row_gain[:, None]
    elif COL:
        w = by_col * col_gain[None, :]
    return w, rows + shift, row_sum, cols + shift, col_sum


@triton.jit
def _fair(row_sum, col_sum, rows, cols, ROW: tl.constexpr, COL: tl.constexpr):
    """Whether no sum of a usual tile came near the end of float32's range; NaN is not fair.

    `rows`, `cols`: which of them count.
    """
    fair = True
    if ROW:
        low = tl.min(tl.where(rows, row_sum, 1.0), 0)
        fair = (low > _SMALLEST_SUM) & (tl.sum(row_sum, 0) < _LARGEST_SUM)
    if COL:
        low = tl.min(tl.where(cols, col_sum, 1.0), 0)
        fair = fair & (low > _SMALLEST_SUM) & (tl.sum(col_sum, 0) < _LARGEST_SUM)
    return fair


@triton.jit
def _tile(
    by_row, by_col, row, col, ROW: tl.constexpr, COL: tl.constexpr, WEIGHTS: tl.constexpr, STATISTICS: tl.constexpr
):
    w = tl.zeros([1, 1], tl.float32)
    row_shift = tl.zeros([by_row.shape[0]], tl.float32)
    col_shift = tl.zeros([by_col.shape[1]], tl.float32)
    row_sum = row_shift
    col_sum = col_shift
    if WEIGHTS and ROW:
        shift, rest, gain = row
        w = w + exp((by_row - shift[:, None]) - rest[:, None]) * gain[:, None]
    if WEIGHTS and COL:
        shift, rest, gain = col
        w = w + exp((by_col - shift[None, :]) - rest[None, :]) * gain[None, :]
    if STATISTICS and ROW:
        row_shift = _finite(tl.max(by_row, 1))
        row_sum = tl.sum(tl.exp(by_row - row_shift[:, None]), 1)
    if STATISTICS and COL:
        col_shift = _finite(tl.max(by_col, 0))
        col_sum = tl.sum(tl.exp(by_col - col_shift[None, :]), 0)
    return w, row_shift, row_sum, col_shift, col_sum


@triton.jit
def _alike(values, z, of_cols, pairs, ids, OF_WEIGHTS: tl.constexpr):
    if OF_WEIGHTS:  # those of z = -inf are 0 already
        return values
    else:  # noqa: RET505 (the compiler would see both)
        return leave_out_alike(values, -_INF, pairs, ids)


@triton.jit
def _merge(shift, total, other_shift, other_total):
    """Sums relative to the higher shift. A sum of 0 is an empty part, whatever its shift; NaN is not."""
    mine = tl.where(total == 0, -_INF, shift)
    theirs = tl.where(other_total == 0, -_INF, other_shift)
    higher = tl.maximum(mine, theirs)
    kept = tl.where(total == 0, 0.0, total * tl.exp(mine - higher))
    added = tl.where(other_total == 0, 0.0, other_total * tl.exp(theirs - higher))
    return higher, kept + added


@triton.jit
def _merge_all(shift, total):
    """The same of the first dimension's."""
    shift = tl.where(total == 0, -_INF, shift)
    highest = tl.max(shift, 0)
    return highest, tl.sum(tl.where(total == 0, 0.0, total * tl.exp(shift - highest[None, :])), 0)


EXPONENTIAL = PairTerm(_refer, _line, _refer_gain, _usual, _tile, _alike, _merge, _merge_all, _fair)
