"""The sigmoid term: w_ij = r_i sigmoid(z_ij); the rows' sums of softplus(z_ij)."""

from __future__ import annotations

import triton
import triton.language as tl

from .pair_terms import INTERPRETED, LOG2_E, NEVER, PairTerm, exp2, multiply_add, reciprocal
from .pairs import keep_alike, offsets, turn_alike

__all__ = ["FACTORS", "SIGMOID", "sigmoid_from", "softplus_from", "sum_by_products"]


@triton.jit
def _artanh_series(t):
    """2 artanh(t) / t for t in [0, 1/3], to 2e-7."""
    q = t * t
    p = q * (2.0 / 11.0) + 2.0 / 9.0
    p = p * q + 2.0 / 7.0
    p = p * q + 2.0 / 5.0
    p = p * q + 2.0 / 3.0
    return p * q + 2.0


@triton.jit
def _log1p_unit(e):
    """log(1 + e) for e in [0, 1], as 2 artanh(e / (2 + e)): relative error below 4e-7 also where e is tiny."""
    t = e / (2.0 + e)
    return t * _artanh_series(t)


#: Factors 1 + e of at most 2 whose product is far from overflowing.
FACTORS = tl.constexpr(64)


@triton.jit
def _join(a, b):
    """(1 + a) (1 + b) - 1, to the last digits also where both are tiny."""
    return multiply_add(a, b, a + b)


@triton.jit
def _log1p(u):
    """log(1 + u) for u >= 0."""
    return tl.where(u < 1.0, _log1p_unit(tl.minimum(u, 1.0)), tl.log(1.0 + u))


@triton.jit
def sum_by_products(e, FACTORS: tl.constexpr):
    """sum_j log(1 + e_ij) [M] for e in [0, 1]: of FACTORS of them at a time, the logarithm of their product."""
    factors: tl.constexpr = min(e.shape[1], FACTORS)
    parts = tl.reshape(e, [e.shape[0], e.shape[1] // factors, factors])
    return tl.sum(_log1p(tl.reduce(parts, 2, _join)), 1)


@triton.jit
def _sum_log1p(e, FACTORS: tl.constexpr):
    if INTERPRETED:  # whose reductions by a function of ours take minutes; a small one is tested
        return tl.sum(_log1p_unit(e), 1)
    else:  # noqa: RET505 (the compiler would see both)
        return sum_by_products(e, FACTORS)


@triton.jit
def softplus_from(z, e):
    """log(1 + e^z) from e = exp(-|z|)."""
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL) + _log1p_unit(e)


@triton.jit
def sigmoid_from(z, e):
    """1 / (1 + e^-z) from e = exp(-|z|)."""
    return tl.where(z >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _refer(row, col, scale, bias, factor, ROW: tl.constexpr, COL: tl.constexpr):
    return True, (0.0, 0.0, 0.0, 1.0, row[2] * factor, col[2])


@triton.jit
def _line(scale, bias, shift):
    return 0.0, 0.0, 1.0


@triton.jit
def _refer_gain(side, shift):
    return side[2]


@triton.jit
def _usual(
    scores, pairs, of_cols, ids, limits, referred, scale, bias,
    ROW: tl.constexpr, COL: tl.constexpr, WEIGHTS: tl.constexpr, STATISTICS: tl.constexpr,
):  # fmt: skip
    """In units of log 2; the logarithms of 1 + e are one of their product, a row's part of the tile at a time."""
    z = scores * (scale * LOG2_E) + offsets(bias * LOG2_E, pairs, of_cols)
    z = turn_alike(z, NEVER / 10, scores, of_cols, pairs, ids)
    z = keep_alike(z, NEVER, pairs, ids)
    rows = tl.zeros([scores.shape[0]], tl.float32)
    cols = tl.zeros([scores.shape[1]], tl.float32)
    row_sum = rows
    w = z
    if STATISTICS:
        e = exp2(-tl.abs(z))
        row_sum = tl.sum(tl.maximum(z, 0.0), 1) * (1.0 / LOG2_E) + _sum_log1p(e, FACTORS)
    if WEIGHTS:  # another exponential takes less than to choose by z's sign
        w = reciprocal(1.0 + exp2(-z)) * referred[4][:, None]
        w = turn_alike(w, NEVER / 10, scores, of_cols, pairs, ids)
    return w, rows, row_sum, cols, cols


@triton.jit
def _fair(row_sum, col_sum, rows, cols, ROW: tl.constexpr, COL: tl.constexpr):
    return True


@triton.jit
def _tile(z, by_col, row, col, ROW: tl.constexpr, COL: tl.constexpr, WEIGHTS: tl.constexpr, STATISTICS: tl.constexpr):
    e = tl.exp(-tl.abs(z))
    w = tl.zeros([1, 1], tl.float32)
    rows = tl.zeros([z.shape[0]], tl.float32)
    cols = tl.zeros([z.shape[1]], tl.float32)
    row_sum = rows
    if WEIGHTS:
        w = sigmoid_from(z, e) * row[2][:, None]
    if STATISTICS:
        row_sum = tl.sum(softplus_from(z, e), 1)
    return w, rows, row_sum, cols, cols


@triton.jit
def _alike(values, z, of_cols, pairs, ids, OF_WEIGHTS: tl.constexpr):
    values = turn_alike(values, -float("inf"), z, of_cols, pairs, ids)
    if not OF_WEIGHTS:
        values = keep_alike(values, -float("inf"), pairs, ids)
    return values


@triton.jit
def _merge(shift, total, other_shift, other_total):
    return shift, total + other_total


@triton.jit
def _merge_all(shift, total):
    return tl.max(shift, 0), tl.sum(total, 0)


SIGMOID = PairTerm(_refer, _line, _refer_gain, _usual, _tile, _alike, _merge, _merge_all, _fair)
