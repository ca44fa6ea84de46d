"""Weights from exponentials that the statistics pass has kept: their scores are not made anew.

What is kept of a usual tile are its exponentials against a shift of its own, where its weights will be, and of each of
its rows (and columns) the sum of exponential * (score - center). The weights are the exponentials times the gains,
referred to that shift; dL/dscale, which wants more digits than weights of 16 bits have, is the sum of those sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .exponential import referred_gain
from .score import load_params, load_side

__all__ = ["weigh_kept_kernel"]


@triton.jit
def _weigh_side(
    normalizer_ptr, stride, gain_ptr, partials_ptr, moments_ptr, block, index, n, shift, unit,
    HAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(gains referred to the tile's shift [BLOCK], what this side adds to dL/dscale and dL/dbias)."""
    gain = tl.zeros([BLOCK], tl.float32)
    dscale = 0.0
    dbias = 0.0
    if HAS:
        inside = index < n
        gain = referred_gain(load_side(normalizer_ptr, stride, gain_ptr, index, n, HAS, BLOCK), shift)
        moments = tl.load(moments_ptr + block.to(tl.int64) * n + index, mask=inside, other=0.0)
        sums = tl.load(partials_ptr + (block.to(tl.int64) * 2 + 1) * n + index, mask=inside, other=0.0)
        dscale = tl.sum(gain * moments, 0) * unit
        dbias = tl.sum(gain * sums, 0)
    return gain, dscale, dbias


@triton.jit(do_not_specialize=["R", "row_normalizer_stride", "col_normalizer_stride"])
def weigh_kept_kernel(
    params_ptr,  # [3] scale, bias, center
    row_normalizer_ptr,  # [2, R]
    row_gain_ptr,  # [R]
    col_normalizer_ptr,  # [2, C] or None
    col_gain_ptr,  # [C] or None
    weights_ptr,  # [R, C] exponentials, which become dL/dz * factor
    factor_ptr,  # [1]
    row_partials_ptr,  # [column blocks, 2, R] shifts and sums
    col_partials_ptr,  # [row blocks, 2, C]
    row_moments_ptr,  # [column blocks, R]
    col_moments_ptr,  # [row blocks, C]
    params_partials_ptr,  # [blocks, 2] or None
    unusual_ptr,  # [blocks] 1: the tile has kept nothing, and is left to rest_kernel
    R, C, weights_stride, row_normalizer_stride, col_normalizer_stride,
    TERM: tl.constexpr, COL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile's weights, in the place of its exponentials.

    Normalisers are of this matrix: a usual tile's shift is at most e^58 above a row's, and may lie as far below as it
    likes, for then the weights are nothing beside the row's others.
    """
    block = tl.program_id(0)
    if tl.load(unusual_ptr + block) == 0:
        col_blocks = tl.cdiv(C, BLOCK_N)
        row_block = block // col_blocks
        col_block = block % col_blocks
        rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = col_block * BLOCK_N + tl.arange(0, BLOCK_N)
        ptrs = weights_ptr + rows.to(tl.int64)[:, None] * weights_stride + cols[None, :]
        inside = (rows < R)[:, None] & (cols < C)[None, :]
        e = tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
        scale, bias, _ = load_params(params_ptr)
        shift = tl.load(row_partials_ptr + col_block.to(tl.int64) * 2 * R + row_block * BLOCK_M)  # as of all its rows
        _, _, unit = TERM.line(scale, bias, shift)
        row_gain, dscale, dbias = _weigh_side(
            row_normalizer_ptr, row_normalizer_stride, row_gain_ptr, row_partials_ptr, row_moments_ptr, col_block,
            rows, R, shift, unit, True, BLOCK_M,
        )  # fmt: skip
        col_gain, dscale_of_cols, dbias_of_cols = _weigh_side(
            col_normalizer_ptr, col_normalizer_stride, col_gain_ptr, col_partials_ptr, col_moments_ptr, row_block,
            cols, C, shift, unit, COL, BLOCK_N,
        )  # fmt: skip
        dscale += dscale_of_cols
        dbias += dbias_of_cols
        unit *= tl.load(factor_ptr)
        gains = (row_gain * unit)[:, None]
        if COL:
            gains = gains + (col_gain * unit)[None, :]
        tl.store(ptrs, (e * gains).to(weights_ptr.dtype.element_ty), mask=inside)
        if params_partials_ptr is not None:
            tl.store(params_partials_ptr + 2 * block, dscale)
            tl.store(params_partials_ptr + 2 * block + 1, dbias)
