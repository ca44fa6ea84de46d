"""The pair terms: what happens to one tile of scores, in registers. They know neither pointers nor the tile's place.

Logits z are [M, N]. Statistics are pairs (reference, sum): for rows [M] and for columns [N]. ROW and COL say which
sides take part, WEIGHTS and STATISTICS what is wanted; the rest is zero and vanishes in the compiler.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

__all__ = ["EXPONENTIAL", "SIGMOID", "PairTerm"]

_INF = tl.constexpr(float("inf"))
#: One exponential per score serves rows and columns while every reference lies this close to a common one: what then
#: underflows is below e^(40 - 87) of its row's and its column's largest term.
_SPREAD = tl.constexpr(40.0)
#: Exponents saturate below infinity: a stale normaliser times a gain of 0 must stay 0.
_LARGEST_EXPONENT = tl.constexpr(88.37)


class PairTerm(NamedTuple):
    """The members that the kernels call; each a function under triton.jit."""

    #: (z, row normalizer, col normalizer, ROW, COL, WEIGHTS, STATISTICS) -> (whether one reference serves all of a tile
    #: in which every pair counts, that reference)
    common_reference: Any
    #: (z, reference, row normalizer, row gain, col normalizer, col gain, flags) -> w, row reference, row sum, col
    #: reference, col sum: a tile that one reference serves
    common_tile: Any
    #: the same without a reference: any tile, with z = -inf where a pair does not count
    tile: Any
    #: (reference, sum, reference, sum) -> reference, sum
    merge: Any

    @property
    def cache_key(self) -> str:
        """What a compiled kernel depends on; without it Triton's disk cache outlives an edit of a member."""
        return "-".join(member.cache_key for member in self)


@triton.jit
def _exp(x):
    """e^x, saturating below infinity; NaN stays NaN."""
    return tl.exp(tl.minimum(x, _LARGEST_EXPONENT, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _finite_maximum(v):
    """The largest of some numbers, +inf passed over; NaN may be passed over too."""
    return tl.max(tl.where(v == _INF, -_INF, v), 0)


@triton.jit
def _finite_minimum(v):
    """The smallest of some numbers, -inf passed over; NaN may be passed over too."""
    return tl.min(tl.where(v == -_INF, _INF, v), 0)


@triton.jit
def _finite(reference):
    """A reference that exponentials can be taken against: the maximum of nothing (-inf) gives 0."""
    return tl.where(reference == -_INF, 0.0, reference)


@triton.jit
def _referred_gain(gain, normalizer, reference):
    """gain * e^(reference - normalizer), what multiplies an exponential taken against `reference`.

    A normaliser of +inf says that there are no negatives, and gives zero.
    """
    return tl.where(normalizer == _INF, 0.0, gain * _exp(reference - normalizer))


@triton.jit
def _exponential_common_reference(
    z, row_normalizer, col_normalizer,
    ROW: tl.constexpr, COL: tl.constexpr, WEIGHTS: tl.constexpr, STATISTICS: tl.constexpr,
):  # fmt: skip
    """The largest normaliser, or the largest logit where there are none; NaN is passed over and kept by the sums."""
    normalizer_high = -_INF
    low = _INF
    if WEIGHTS and ROW:
        normalizer_high = tl.maximum(normalizer_high, _finite_maximum(row_normalizer))
        low = tl.minimum(low, tl.min(row_normalizer, 0))
    if WEIGHTS and COL:
        normalizer_high = tl.maximum(normalizer_high, _finite_maximum(col_normalizer))
        low = tl.minimum(low, tl.min(col_normalizer, 0))
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
    reference = normalizer_high if WEIGHTS else high
    # nothing at all to refer to: +inf - -inf is not narrow, and -inf - inf would be
    return (high - low <= _SPREAD) & (high > -_INF) & (reference > -_INF), reference


@triton.jit
def _exponential_common_tile(
    z, reference, row_normalizer, row_gain, col_normalizer, col_gain,
    ROW: tl.constexpr, COL: tl.constexpr, WEIGHTS: tl.constexpr, STATISTICS: tl.constexpr,
):  # fmt: skip
    e = _exp(z - reference)
    w = tl.zeros([1, 1], tl.float32)
    rows = tl.zeros([z.shape[0]], tl.float32)
    cols = tl.zeros([z.shape[1]], tl.float32)
    row_sum = rows
    col_sum = cols
    if WEIGHTS:
        gain = tl.zeros([1, 1], tl.float32)
        if ROW:
            gain = gain + _referred_gain(row_gain, row_normalizer, reference)[:, None]
        if COL:
            gain = gain + _referred_gain(col_gain, col_normalizer, reference)[None, :]
        w = e * gain
    if STATISTICS and ROW:
        row_sum = tl.sum(e, 1)
    if STATISTICS and COL:
        col_sum = tl.sum(e, 0)
    return w, rows + reference, row_sum, cols + reference, col_sum


@triton.jit
def _exponential_tile(
    z, row_normalizer, row_gain, col_normalizer, col_gain,
    ROW: tl.constexpr, COL: tl.constexpr, WEIGHTS: tl.constexpr, STATISTICS: tl.constexpr,
):  # fmt: skip
    w = tl.zeros([1, 1], tl.float32)
    row_reference = tl.zeros([z.shape[0]], tl.float32)
    col_reference = tl.zeros([z.shape[1]], tl.float32)
    row_sum = row_reference
    col_sum = col_reference
    if WEIGHTS and ROW:
        w = w + _exp(z - row_normalizer[:, None]) * row_gain[:, None]
    if WEIGHTS and COL:
        w = w + _exp(z - col_normalizer[None, :]) * col_gain[None, :]
    if STATISTICS and ROW:
        row_reference = _finite(tl.max(z, 1))
        row_sum = tl.sum(tl.exp(z - row_reference[:, None]), 1)
    if STATISTICS and COL:
        col_reference = _finite(tl.max(z, 0))
        col_sum = tl.sum(tl.exp(z - col_reference[None, :]), 0)
    return w, row_reference, row_sum, col_reference, col_sum


@triton.jit
def _exponential_merge(reference, total, other_reference, other_total):
    """Sums relative to the higher reference. A sum of 0 is an empty part, whatever its reference; NaN is not."""
    mine = tl.where(total == 0, -_INF, reference)
    theirs = tl.where(other_total == 0, -_INF, other_reference)
    higher = tl.maximum(mine, theirs)
    kept = tl.where(total == 0, 0.0, total * tl.exp(mine - higher))
    added = tl.where(other_total == 0, 0.0, other_total * tl.exp(theirs - higher))
    return higher, kept + added


@triton.jit
def _log1p_unit(e):
    """log(1 + e) for e in [0, 1], as 2 artanh(e / (2 + e)): relative error below 4e-7 also where e is tiny."""
    t = e / (2.0 + e)
    q = t * t
    p = q * (1.0 / 15.0) + 1.0 / 13.0
    p = p * q + 1.0 / 11.0
    p = p * q + 1.0 / 9.0
    p = p * q + 1.0 / 7.0
    p = p * q + 1.0 / 5.0
    p = p * q + 1.0 / 3.0
    p = p * q + 1.0
    return 2.0 * t * p


@triton.jit
def _softplus_from(z, e):
    """log(1 + e^z) from e = exp(-|z|)."""
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL) + _log1p_unit(e)


@triton.jit
def _sigmoid_from(z, e):
    """1 / (1 + e^-z) from e = exp(-|z|)."""
    return tl.where(z >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _sigmoid_common_reference(
    z, row_normalizer, col_normalizer,
    ROW: tl.constexpr, COL: tl.constexpr, WEIGHTS: tl.constexpr, STATISTICS: tl.constexpr,
):  # fmt: skip
    return tl.full([], True, tl.int1), 0.0


@triton.jit
def _sigmoid_common_tile(
    z, reference, row_normalizer, row_gain, col_normalizer, col_gain,
    ROW: tl.constexpr, COL: tl.constexpr, WEIGHTS: tl.constexpr, STATISTICS: tl.constexpr,
):  # fmt: skip
    return _sigmoid_tile(z, row_normalizer, row_gain, col_normalizer, col_gain, ROW, COL, WEIGHTS, STATISTICS)


@triton.jit
def _sigmoid_tile(
    z, row_normalizer, row_gain, col_normalizer, col_gain,
    ROW: tl.constexpr, COL: tl.constexpr, WEIGHTS: tl.constexpr, STATISTICS: tl.constexpr,
):  # fmt: skip
    e = tl.exp(-tl.abs(z))
    w = tl.zeros([1, 1], tl.float32)
    rows = tl.zeros([z.shape[0]], tl.float32)
    cols = tl.zeros([z.shape[1]], tl.float32)
    row_sum = rows
    if WEIGHTS:
        w = _sigmoid_from(z, e) * row_gain[:, None]
    if STATISTICS:
        row_sum = tl.sum(_softplus_from(z, e), 1)
    return w, rows, row_sum, cols, cols


@triton.jit
def _plain_merge(reference, total, other_reference, other_total):
    return reference, total + other_total


#: w_ij = r_i exp(z_ij - a_i) + c_j exp(z_ij - b_j); sums of exponentials against a reference, by rows and columns.
EXPONENTIAL = PairTerm(_exponential_common_reference, _exponential_common_tile, _exponential_tile, _exponential_merge)
#: w_ij = r_i sigmoid(z_ij); the rows' sums of softplus(z_ij).
SIGMOID = PairTerm(_sigmoid_common_reference, _sigmoid_common_tile, _sigmoid_tile, _plain_merge)
