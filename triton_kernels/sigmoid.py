"""The sigmoid term: w_ij = r_i sigmoid(z_ij); the rows' sums of softplus(z_ij)."""

from __future__ import annotations

import triton
import triton.language as tl

from .pair_terms import LOG2_E, PairTerm, exp2, reciprocal

__all__ = ["SIGMOID", "sigmoid_from", "softplus_from"]


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


@triton.jit
def softplus_from(z, e):
    """log(1 + e^z) from e = exp(-|z|)."""
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL) + _log1p_unit(e)


@triton.jit
def sigmoid_from(z, e):
    """1 / (1 + e^-z) from e = exp(-|z|)."""
    return tl.where(z >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _refer(row, col, scale, bias, center, factor, ROW: tl.constexpr, COL: tl.constexpr):
    return True, (0.0, 0.0, 0.0, 1.0, row[2] * factor, col[2])


@triton.jit
def _line(scale, bias, center, shift):
    return 0.0, 0.0, 1.0


@triton.jit
def _refer_gain(side, shift):
    return side[2]


@triton.jit
def _usual(
    scores, col_bias, referred, scale, bias, center,
    ROW: tl.constexpr, COL: tl.constexpr, WEIGHTS: tl.constexpr, STATISTICS: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """In units of log 2; one reciprocal serves the sigmoid's quotient 1 / (1 + e) and the logarithm's e / (2 + e)."""
    offset = (bias + scale * center) * LOG2_E
    if BIASED:
        z = scores * (scale * LOG2_E) + (col_bias * LOG2_E + offset)[None, :]
    else:
        z = scores * (scale * LOG2_E) + offset
    e = exp2(-tl.abs(z))
    one, two = 1.0 + e, 2.0 + e
    rows = tl.zeros([scores.shape[0]], tl.float32)
    cols = tl.zeros([scores.shape[1]], tl.float32)
    row_sum = rows
    w = e
    if STATISTICS:
        product = reciprocal(one * two)
        t = e * (product * one)
        quotient = product * two
        soft = t * _artanh_series(t)
        row_sum = tl.sum(tl.maximum(z, 0.0) * (1.0 / LOG2_E) + soft, 1)
    else:
        quotient = reciprocal(one)
    if WEIGHTS:
        w = tl.where(z >= 0, quotient, e * quotient) * referred[4][:, None]
    return w, rows, row_sum, cols, cols


@triton.jit
def _fair(row_sum, col_sum, rows, cols, ROW: tl.constexpr, COL: tl.constexpr):
    return True


@triton.jit
def _tile(z, row, col, ROW: tl.constexpr, COL: tl.constexpr, WEIGHTS: tl.constexpr, STATISTICS: tl.constexpr):
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
def _merge(shift, total, other_shift, other_total):
    return shift, total + other_total


@triton.jit
def _merge_all(shift, total):
    return tl.max(shift, 0), tl.sum(total, 0)


SIGMOID = PairTerm(_refer, _line, _refer_gain, _usual, _tile, _merge, _merge_all, _fair)
