"""The sigmoid term: w_ij = r_i sigmoid(z_ij); the rows' sums of softplus(z_ij)."""

from __future__ import annotations

import triton
import triton.language as tl

from .pair_terms import PairTerm

__all__ = ["SIGMOID"]


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
def _common_shift(
    z, row, col, ROW: tl.constexpr, COL: tl.constexpr, WEIGHTS: tl.constexpr, STATISTICS: tl.constexpr
):  # fmt: skip
    return tl.full([], True, tl.int1), 0.0


@triton.jit
def _common_tile(
    z, shift, row, col, ROW: tl.constexpr, COL: tl.constexpr, WEIGHTS: tl.constexpr, STATISTICS: tl.constexpr
):  # fmt: skip
    return _tile(z, row, col, ROW, COL, WEIGHTS, STATISTICS)


@triton.jit
def _tile(z, row, col, ROW: tl.constexpr, COL: tl.constexpr, WEIGHTS: tl.constexpr, STATISTICS: tl.constexpr):
    e = tl.exp(-tl.abs(z))
    w = tl.zeros([1, 1], tl.float32)
    rows = tl.zeros([z.shape[0]], tl.float32)
    cols = tl.zeros([z.shape[1]], tl.float32)
    row_sum = rows
    if WEIGHTS:
        w = _sigmoid_from(z, e) * row[2][:, None]
    if STATISTICS:
        row_sum = tl.sum(_softplus_from(z, e), 1)
    return w, rows, row_sum, cols, cols


@triton.jit
def _merge(shift, total, other_shift, other_total):
    return shift, total + other_total


SIGMOID = PairTerm(_common_shift, _common_tile, _tile, _merge)
