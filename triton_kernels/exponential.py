"""The exponential term: w_ij = r_i exp(z_ij - a_i) + c_j exp(z_ij - b_j); sums of exponentials by rows and columns."""

from __future__ import annotations

import triton
import triton.language as tl

from .pair_terms import PairTerm, exp

__all__ = ["EXPONENTIAL"]

_INF = tl.constexpr(float("inf"))
#: One exponential per score serves rows and columns while every shift lies this close to a common one: what then
#: underflows is below e^(40 - 87) of its row's and its column's largest term.
_SPREAD = tl.constexpr(40.0)


@triton.jit
def _finite_maximum(v):
    """The largest of some numbers, +inf passed over; NaN may be passed over too."""
    return tl.max(tl.where(v == _INF, -_INF, v), 0)


@triton.jit
def _finite_minimum(v):
    """The smallest of some numbers, -inf passed over; NaN may be passed over too."""
    return tl.min(tl.where(v == -_INF, _INF, v), 0)


@triton.jit
def _finite(shift):
    """A shift that exponentials can be taken against: the maximum of nothing (-inf) gives 0."""
    return tl.where(shift == -_INF, 0.0, shift)


@triton.jit
def _referred_gain(side, shift):
    """gain * e^(shift - normaliser), what multiplies an exponential taken against `shift`.

    The normaliser's two numbers are never added: where they are large their sum has lost the second one. A rest of +inf
    says that there are no negatives, and gives zero.
    """
    own_shift, rest, gain = side
    return tl.where(rest == _INF, 0.0, gain * exp((shift - own_shift) - rest))


@triton.jit
def _common_shift(
    z, row, col, ROW: tl.constexpr, COL: tl.constexpr, WEIGHTS: tl.constexpr, STATISTICS: tl.constexpr
):  # fmt: skip
    """The largest normaliser, or the largest logit where there are none; NaN is passed over and kept by the sums."""
    normalizer_high = -_INF
    low = _INF
    if WEIGHTS and ROW:
        normalizer = row[0] + row[1]
        normalizer_high = tl.maximum(normalizer_high, _finite_maximum(normalizer))
        low = tl.minimum(low, tl.min(normalizer, 0))
    if WEIGHTS and COL:
        normalizer = col[0] + col[1]
        normalizer_high = tl.maximum(normalizer_high, _finite_maximum(normalizer))
        low = tl.minimum(low, tl.min(normalizer, 0))
    high = normalizer_high
    if STATISTICS:
        if ROW:
            maxima = tl.max(z, 1)
            high = tl.maximum(high, tl.max(maxima, 0))
            low = tl.minimum(low, _finite_minimum(maxima))
        if COL:
            maxima = tl.max(z, 0)
            high = tl.maximum(high, tl.max(maxima, 0))
            low = tl.minimum(low, _finite_minimum(maxima))
    shift = normalizer_high if WEIGHTS else high
    # nothing at all to refer to: +inf - -inf is not narrow, and -inf - inf would be
    return (high - low <= _SPREAD) & (high > -_INF) & (shift > -_INF), shift


@triton.jit
def _common_tile(
    z, shift, row, col, ROW: tl.constexpr, COL: tl.constexpr, WEIGHTS: tl.constexpr, STATISTICS: tl.constexpr
):  # fmt: skip
    e = exp(z - shift)
    w = tl.zeros([1, 1], tl.float32)
    rows = tl.zeros([z.shape[0]], tl.float32)
    cols = tl.zeros([z.shape[1]], tl.float32)
    row_sum = rows
    col_sum = cols
    if WEIGHTS:
        gain = tl.zeros([1, 1], tl.float32)
        if ROW:
            gain = gain + _referred_gain(row, shift)[:, None]
        if COL:
            gain = gain + _referred_gain(col, shift)[None, :]
        w = e * gain
    if STATISTICS and ROW:
        row_sum = tl.sum(e, 1)
    if STATISTICS and COL:
        col_sum = tl.sum(e, 0)
    return w, rows + shift, row_sum, cols + shift, col_sum


@triton.jit
def _tile(z, row, col, ROW: tl.constexpr, COL: tl.constexpr, WEIGHTS: tl.constexpr, STATISTICS: tl.constexpr):
    w = tl.zeros([1, 1], tl.float32)
    row_shift = tl.zeros([z.shape[0]], tl.float32)
    col_shift = tl.zeros([z.shape[1]], tl.float32)
    row_sum = row_shift
    col_sum = col_shift
    if WEIGHTS and ROW:
        shift, rest, gain = row
        w = w + exp((z - shift[:, None]) - rest[:, None]) * gain[:, None]
    if WEIGHTS and COL:
        shift, rest, gain = col
        w = w + exp((z - shift[None, :]) - rest[None, :]) * gain[None, :]
    if STATISTICS and ROW:
        row_shift = _finite(tl.max(z, 1))
        row_sum = tl.sum(tl.exp(z - row_shift[:, None]), 1)
    if STATISTICS and COL:
        col_shift = _finite(tl.max(z, 0))
        col_sum = tl.sum(tl.exp(z - col_shift[None, :]), 0)
    return w, row_shift, row_sum, col_shift, col_sum


@triton.jit
def _merge(shift, total, other_shift, other_total):
    """Sums relative to the higher shift. A sum of 0 is an empty part, whatever its shift; NaN is not."""
    mine = tl.where(total == 0, -_INF, shift)
    theirs = tl.where(other_total == 0, -_INF, other_shift)
    higher = tl.maximum(mine, theirs)
    kept = tl.where(total == 0, 0.0, total * tl.exp(mine - higher))
    added = tl.where(other_total == 0, 0.0, other_total * tl.exp(theirs - higher))
    return higher, kept + added


EXPONENTIAL = PairTerm(_common_shift, _common_tile, _tile, _merge)
