"""The kernel of large panels: programs stay and take one tile after the other, whose operands the TMA unit copies.

It leaves what score_kernel leaves. The gains of rows and columns are referred to one shift before it starts, so that
nothing stands between a tile's product and its weights but the loads of two vectors.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pairs import every_pair_counts, load_columns
from .score import finish_tile, load_params, tile_place

__all__ = ["LINE", "persistent_kernel", "refer_kernel"]

#: Numbers that refer_kernel leaves beside the gains: shift, slope, offset and unit.
LINE = 4


@triton.jit
def _sample(normalizer_ptr, stride, n, SAMPLE: tl.constexpr):
    """(sum, count) of finite normalisers of n, evenly spaced."""
    index = (tl.arange(0, SAMPLE).to(tl.int64) * n // SAMPLE).to(tl.int32)
    normalizer = tl.load(normalizer_ptr + index) + tl.load(normalizer_ptr + stride + index)
    finite = tl.abs(normalizer) < float("inf")
    return tl.sum(tl.where(finite, normalizer, 0.0), 0), tl.sum(finite.to(tl.float32), 0)


@triton.jit
def _refer_side(
    out_ptr, normalizer_ptr, stride, gain_ptr, block, n, shift, unit, TERM: tl.constexpr, BLOCK: tl.constexpr
):
    index = block * BLOCK + tl.arange(0, BLOCK)
    inside = index < n
    gain = tl.load(gain_ptr + index, mask=inside, other=0.0)
    own_shift = tl.zeros([BLOCK], tl.float32)
    rest = own_shift
    if normalizer_ptr is not None:
        own_shift = tl.load(normalizer_ptr + index, mask=inside, other=0.0)
        rest = tl.load(normalizer_ptr + stride + index, mask=inside, other=0.0)
    # first the factor, which is large where gains are small and weights float16: then none falls subnormal
    tl.store(out_ptr + index, TERM.refer_gain((own_shift, rest, gain * unit), shift), mask=inside)


@triton.jit(do_not_specialize=["R", "C", "row_normalizer_stride", "col_normalizer_stride"])
def refer_kernel(
    params_ptr, factor_ptr, row_normalizer_ptr, row_gain_ptr, col_normalizer_ptr, col_gain_ptr,
    line_ptr,  # [LINE]
    row_referred_ptr,  # [R]
    col_referred_ptr,  # [C]
    R, C, row_normalizer_stride, col_normalizer_stride,
    TERM: tl.constexpr, ROW: tl.constexpr, COL: tl.constexpr, BLOCK: tl.constexpr, SAMPLE: tl.constexpr,
):  # fmt: skip
    """A panel's gains, referred to the mean of a sample of its normalisers, times the factor.

    A gain that cannot be referred, because its normaliser lies too far from the mean, becomes infinite, and so marks
    its tiles as unusual.
    """
    scale, bias, _ = load_params(params_ptr)
    total = 0.0
    count = 0.0
    if ROW and row_normalizer_ptr is not None:
        total, count = _sample(row_normalizer_ptr, row_normalizer_stride, R, SAMPLE)
    if COL and col_normalizer_ptr is not None:
        of_cols, cols_count = _sample(col_normalizer_ptr, col_normalizer_stride, C, SAMPLE)
        total += of_cols
        count += cols_count
    shift = total / tl.maximum(count, 1.0)
    slope, offset, unit = TERM.line(scale, bias, shift)
    program = tl.program_id(0)
    if program == 0:
        tl.store(line_ptr, shift)
        tl.store(line_ptr + 1, slope)
        tl.store(line_ptr + 2, offset)
        tl.store(line_ptr + 3, unit)
    unit *= tl.load(factor_ptr)
    row_programs = 0
    if ROW:
        row_programs = tl.cdiv(R, BLOCK)
        if program < row_programs:
            _refer_side(
                row_referred_ptr, row_normalizer_ptr, row_normalizer_stride, row_gain_ptr, program, R, shift, unit,
                TERM, BLOCK,
            )  # fmt: skip
    if COL:  # noqa: SIM102 (known to the compiler, unlike what follows)
        if program >= row_programs:
            _refer_side(
                col_referred_ptr, col_normalizer_ptr, col_normalizer_stride, col_gain_ptr, program - row_programs, C,
                shift, unit, TERM, BLOCK,
            )  # fmt: skip


@triton.jit(do_not_specialize=["R", "C", "D", "diagonal", "first_column", "row_target_stride", "col_target_stride"])
def persistent_kernel(
    x_desc,  # [R, D] in blocks of BLOCK_M x BLOCK_K
    y_desc,  # [C, D] in blocks of BLOCK_N x BLOCK_K
    weights_desc,  # [R, C] in blocks of BLOCK_M x BLOCK_N / PARTS, or None
    params_ptr, diagonal, columns_ptr, first_column, col_bias_ptr, row_ids_ptr, col_ids_ptr,
    row_target_ptr, row_target_stride, col_target_ptr, col_target_stride, row_ceiling_ptr, col_ceiling_ptr,
    row_guide_ptr, col_guide_ptr, row_threshold_ptr, col_threshold_ptr, E, row_guide_stride, col_guide_stride,  # None
    line_ptr,  # [LINE] and the referred gains, of refer_kernel; or None
    row_referred_ptr,  # [R] or None
    col_referred_ptr,  # [C] or None
    factor_ptr, row_partials_ptr, col_partials_ptr, params_partials_ptr, row_moments_ptr, col_moments_ptr, unusual_ptr,
    R, C, D,
    TERM: tl.constexpr, ROW: tl.constexpr, COL: tl.constexpr, COLUMNS: tl.constexpr, EQUAL_IDS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """This program's share of the tiles; see score_kernel."""
    STORES: tl.constexpr = weights_desc is not None
    WEIGHTS: tl.constexpr = STORES and row_moments_ptr is None
    STATISTICS: tl.constexpr = row_partials_ptr is not None or col_partials_ptr is not None
    scale, bias, center = load_params(params_ptr)
    usual = (scale > 1e-18) & (scale < 1e18)
    pairs = (
        diagonal, columns_ptr, first_column, col_bias_ptr, row_ids_ptr, col_ids_ptr,
        row_target_ptr, row_target_stride, col_target_ptr, col_target_stride, EQUAL_IDS,
        row_ceiling_ptr, col_ceiling_ptr, row_guide_ptr, col_guide_ptr, row_threshold_ptr, col_threshold_ptr,
        E, row_guide_stride, col_guide_stride,
    )  # fmt: skip
    factor = 1.0
    shift = 0.0
    slope = 0.0
    offset = 0.0
    unit = 1.0
    if WEIGHTS:
        factor = tl.load(factor_ptr)
        shift = tl.load(line_ptr)
        slope = tl.load(line_ptr + 1)
        offset = tl.load(line_ptr + 2)
        unit = tl.load(line_ptr + 3)
    for tile in range(tl.program_id(0), tl.cdiv(R, BLOCK_M) * tl.cdiv(C, BLOCK_N), tl.num_programs(0)):
        row_block, col_block = tile_place(tile, R, C, BLOCK_M, BLOCK_N, GROUP)
        row0 = row_block * BLOCK_M
        col0 = col_block * BLOCK_N
        scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, D, BLOCK_K):
            x = x_desc.load([row0, k])
            y = y_desc.load([col0, k])
            if UPCAST:  # the interpreter multiplies bfloat16 as if it were integers
                x = x.to(tl.float32)
                y = y.to(tl.float32)
            scores = tl.dot(x, y.T, scores)
        parts = _parts(scores, PARTS)
        for part in tl.static_range(PARTS):
            if col0 + part * (BLOCK_N // PARTS) < C:
                _finish_part(
                    parts[part], usual, pairs, (shift, slope, offset, unit), scale, bias, center, factor, row_block,
                    col_block * PARTS + part, weights_desc, row_referred_ptr, col_referred_ptr, row_partials_ptr,
                    col_partials_ptr, params_partials_ptr, row_moments_ptr, col_moments_ptr, unusual_ptr, R, C,
                    TERM, ROW, COL, COLUMNS, WEIGHTS, STATISTICS, STORES,
                )  # fmt: skip


@triton.jit
def _halves(scores):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(scores, [scores.shape[0], 2, scores.shape[1] // 2]), (0, 2, 1)))


@triton.jit
def _parts(scores, PARTS: tl.constexpr):
    """A tile's columns in PARTS parts, which are finished one after the other: so they fit the registers."""
    if PARTS == 1:
        return (scores,)
    else:  # noqa: RET505 (the compiler would see both)
        left, right = _halves(scores)
        if PARTS == 2:
            return (left, right)
        else:  # noqa: RET505
            left_left, left_right = _halves(left)
            right_left, right_right = _halves(right)
            return (left_left, left_right, right_left, right_right)


@triton.jit
def _finish_part(
    scores, usual, pairs, line, scale, bias, center, factor, row_block, col_block, weights_desc,
    row_referred_ptr, col_referred_ptr, row_partials_ptr, col_partials_ptr, params_partials_ptr, row_moments_ptr,
    col_moments_ptr, unusual_ptr, R, C,
    TERM: tl.constexpr, ROW: tl.constexpr, COL: tl.constexpr, COLUMNS: tl.constexpr,
    WEIGHTS: tl.constexpr, STATISTICS: tl.constexpr, STORES: tl.constexpr,
):  # fmt: skip
    """Finishes all columns of a tile, or a part of them."""
    row0 = row_block * scores.shape[0]
    col0 = col_block * scores.shape[1]
    rows = row0 + tl.arange(0, scores.shape[0])
    cols = col0 + tl.arange(0, scores.shape[1])
    of_cols = load_columns(pairs, cols, C)
    complete = every_pair_counts(pairs, rows, row0, cols, col0, R, C, COLUMNS)
    row_gain = tl.zeros([scores.shape[0]], tl.float32)
    col_gain = tl.zeros([scores.shape[1]], tl.float32)
    if WEIGHTS and ROW:
        row_gain = tl.load(row_referred_ptr + rows, mask=rows < R, other=0.0)
    if WEIGHTS and COL:
        col_gain = tl.load(col_referred_ptr + cols, mask=cols < C, other=0.0)
    referred = (line[0], line[1], line[2], line[3], row_gain, col_gain)
    w = finish_tile(
        scores, tl.zeros([1, 1], tl.float32), complete, usual, pairs, of_cols, referred, scale, bias, center, factor,
        row_block, col_block, rows, cols, row_partials_ptr, col_partials_ptr, params_partials_ptr, row_moments_ptr,
        col_moments_ptr, unusual_ptr, R, C, TERM, ROW, COL, COLUMNS, WEIGHTS, STATISTICS,
    )  # fmt: skip
    if STORES:
        weights_desc.store([row0, col0], w.to(weights_desc.dtype))
