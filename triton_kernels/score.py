"""The kernels that multiply a tile of scores on the tensor cores and finish it in registers: usual ones, and the rest.

No score leaves the chip. A tile leaves either its statistics, or its weights, or both; a program writes what no other
program writes, so that there are no atomics and two runs agree bitwise. No loop names a loss: see pair_terms.py; which
pairs count is in pairs.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pair_terms import NEVER
from .pairs import (
    below,
    column_counts,
    every_pair_counts,
    leave_out,
    less_targets,
    load_columns,
    load_ids,
    load_limits,
    logits,
)

__all__ = ["finish_tile", "load_params", "load_side", "rest_kernel", "score_kernel", "tile_place"]

#: What a tile's sums stay below unless a weight has overflowed.
_LARGEST = tl.constexpr(1e38)


@triton.jit
def _tile_product(
    x_ptr, y_ptr, rows, cols, R, C, D, x_stride, y_stride,
    BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, INPUT_PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """x yT of these rows and columns [M, N] in float32; past the end, the last row (column) once more."""
    features = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + tl.minimum(rows, R - 1).to(tl.int64)[:, None] * x_stride + features[None, :]
    y_ptrs = y_ptr + tl.minimum(cols, C - 1).to(tl.int64)[None, :] * y_stride + features[:, None]
    scores = tl.zeros([rows.shape[0], cols.shape[0]], tl.float32)
    for k in range(0, D, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            y = tl.load(y_ptrs)
        else:
            x = tl.load(x_ptrs, mask=features[None, :] < D - k, other=0.0)
            y = tl.load(y_ptrs, mask=features[:, None] < D - k, other=0.0)
        if UPCAST:  # the interpreter multiplies bfloat16 as if it were integers
            x = x.to(tl.float32)
            y = y.to(tl.float32)
        scores = tl.dot(x, y, scores, input_precision=INPUT_PRECISION)
        x_ptrs += BLOCK_K
        y_ptrs += BLOCK_K
    return scores


@triton.jit
def _guide_product(
    pairs, rows, cols, R, C, E, BLOCK_E: tl.constexpr, EVEN_E: tl.constexpr, GUIDE_PRECISION: tl.constexpr
):
    """A guide's scores of these rows and columns [M, N], by E of its features; [1, 1] of zero without one."""
    if pairs[13] is None:
        return tl.zeros([1, 1], tl.float32)
    else:  # noqa: RET505 (the compiler would see both)
        return _tile_product(
            pairs[13], pairs[14], rows, cols, R, C, E, pairs[18], pairs[19],
            BLOCK_E, EVEN_E, GUIDE_PRECISION, False,
        )  # fmt: skip


@triton.jit
def tile_place(tile, R, C, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """A tile's row block and column block: GROUP row blocks go through the columns together and share L2."""
    row_blocks = tl.cdiv(R, BLOCK_M)
    col_blocks = tl.cdiv(C, BLOCK_N)
    first = tile // (GROUP * col_blocks) * GROUP
    group = tl.minimum(row_blocks - first, GROUP)
    within = tile % (GROUP * col_blocks)
    return first + within % group, within // group


@triton.jit
def load_side(normalizer_ptr, normalizer_stride, gain_ptr, index, n, HAS: tl.constexpr, BLOCK: tl.constexpr):
    """(shift, rest, gain) of one side, each [BLOCK]; past the end, those of a row without negatives."""
    shift = tl.zeros([BLOCK], tl.float32)
    rest = tl.full([BLOCK], float("inf"), tl.float32)
    gain = tl.zeros([BLOCK], tl.float32)
    if HAS:
        inside = index < n
        gain = tl.load(gain_ptr + index, mask=inside, other=0.0)
        if normalizer_ptr is not None:
            shift = tl.load(normalizer_ptr + index, mask=inside, other=0.0)
            rest = tl.load(normalizer_ptr + normalizer_stride + index, mask=inside, other=float("inf"))
    return shift, rest, gain


@triton.jit
def _store_statistics(partials_ptr, block, index, n, shift, total):
    """partials [blocks, 2, n]: this block's shift and sum of every row (or column)."""
    ptrs = partials_ptr + block.to(tl.int64) * 2 * n + index
    tl.store(ptrs, shift, mask=index < n)
    tl.store(ptrs + n, total, mask=index < n)


@triton.jit
def _store_moments(moments_ptr, block, index, n, moment):
    """moments [blocks, n]: of every row (or column), this block's sum of exponential * (score - center)."""
    tl.store(moments_ptr + block.to(tl.int64) * n + index, moment, mask=index < n)


@triton.jit
def _store_weights(weights_ptr, stride, w, rows, cols, R, C):
    ptrs = weights_ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    tl.store(ptrs, w.to(weights_ptr.dtype.element_ty), mask=(rows < R)[:, None] & (cols < C)[None, :])


@triton.jit
def load_params(params_ptr):
    """Scale, bias, and a center that scores can be counted from: one that is not finite is none."""
    center = tl.load(params_ptr + 2)
    return tl.load(params_ptr), tl.load(params_ptr + 1), tl.where(tl.abs(center) < float("inf"), center, 0.0)


@triton.jit
def finish_tile(
    scores, guide, complete, usual, pairs, of_cols, referred, scale, bias, center, factor, row_block, col_block,
    rows, cols,
    row_partials_ptr, col_partials_ptr, params_partials_ptr, row_moments_ptr, col_moments_ptr, unusual_ptr, R, C,
    TERM: tl.constexpr, ROW: tl.constexpr, COL: tl.constexpr, COLUMNS: tl.constexpr,
    WEIGHTS: tl.constexpr, STATISTICS: tl.constexpr,
):  # fmt: skip
    """A tile's weights, from its scores; its statistics and sums are stored, and whether it is unusual.

    Where there is room for moments, it is the exponentials of a usual tile instead of weights.
    """
    if not complete:
        scores = leave_out(scores, NEVER, pairs, rows, cols, R, C, COLUMNS)
    ids = load_ids(pairs, rows, cols, R, C)
    w, row_shift, row_sum, col_shift, col_sum = TERM.usual(
        scores, pairs, of_cols, ids, load_limits(pairs, rows, cols, R, C, guide), referred, scale, bias,
        ROW, COL, WEIGHTS, STATISTICS,
    )  # fmt: skip
    block = row_block * tl.cdiv(C, cols.shape[0]) + col_block
    if WEIGHTS:
        w = less_targets(w, scores > NEVER / 10, factor, pairs, of_cols, ids, rows, cols, R, C)
        # the center comes off here: tensor cores cut off digits of each partial sum, which it would only make larger
        dscale = tl.sum(tl.sum(w * (scores - center), 1), 0)
        usual = usual & (tl.abs(dscale) < _LARGEST)  # no weight has overflowed; NaN is not below
        if params_partials_ptr is not None:
            tl.store(params_partials_ptr + 2 * block, dscale / factor)
            tl.store(params_partials_ptr + 2 * block + 1, tl.sum(tl.sum(w, 1), 0) / factor)
    if STATISTICS:
        counts = column_counts(cols, C, of_cols)
        usual = usual & TERM.fair(row_sum, col_sum, rows < R, counts, ROW, COL)
        if row_partials_ptr is not None:
            _store_statistics(row_partials_ptr, col_block, rows, R, row_shift, row_sum)
        if col_partials_ptr is not None:
            _store_statistics(col_partials_ptr, row_block, cols, C, col_shift, col_sum)
    if row_moments_ptr is not None:
        _store_moments(row_moments_ptr, col_block, rows, R, tl.sum(w * (scores - center), 1))
    if col_moments_ptr is not None:
        _store_moments(col_moments_ptr, row_block, cols, C, tl.sum(w * (scores - center), 0))
    tl.store(unusual_ptr + block, tl.where(usual, 0.0, 1.0))
    return w


_ARGUMENTS = ["R", "diagonal", "first_column", "row_normalizer_stride", "col_normalizer_stride"]
_ARGUMENTS += ["row_target_stride", "col_target_stride"]


@triton.jit(do_not_specialize=_ARGUMENTS)
def score_kernel(
    x_ptr,  # [R, D]
    y_ptr,  # [C, D]
    params_ptr,  # [3] scale, bias, center
    diagonal,  # of the panel's row i, its column i + diagonal is left out; or None
    columns_ptr,  # [R, COLUMNS] columns of the whole matrix that rows leave out, or None
    first_column,  # the panel's, in the whole matrix
    col_bias_ptr,  # [C] or None
    row_ids_ptr,  # int64 [R] or None
    col_ids_ptr,  # int64 [C] or None
    row_target_ptr,  # [2, R] or None: what comes off the weights of pairs of other ids, of equal ids
    row_target_stride,
    col_target_ptr,  # [2, C] or None
    col_target_stride,
    row_ceiling_ptr,  # [R] or None: scale * score above it is left out of the row's sums and weights
    col_ceiling_ptr,  # [C] or None
    row_guide_ptr,  # [R, E] or None: a guide's features
    col_guide_ptr,  # [C, E] or None
    row_threshold_ptr,  # [R] or None: what a guide scores higher is left out, too
    col_threshold_ptr,  # [C] or None
    E, row_guide_stride, col_guide_stride,
    row_normalizer_ptr,  # [2, R] or None
    row_gain_ptr,  # [R] or None
    col_normalizer_ptr,  # [2, C] or None
    col_gain_ptr,  # [C] or None
    weights_ptr,  # [R, C] or None: dL/dz * factor; or, where there is room for moments, exponentials
    factor_ptr,  # [1] what the weights are multiplied by
    row_partials_ptr,  # [column blocks, 2, R] or None
    col_partials_ptr,  # [row blocks, 2, C] or None
    params_partials_ptr,  # [blocks, 2] or None
    row_moments_ptr,  # [column blocks, R] or None: statistics are made, and exponentials kept
    col_moments_ptr,  # [row blocks, C] or None
    unusual_ptr,  # [blocks] becomes 1 where a tile is left to rest_kernel, else 0
    R, C, D, x_stride, y_stride, weights_stride, row_normalizer_stride, col_normalizer_stride,
    TERM: tl.constexpr, ROW: tl.constexpr, COL: tl.constexpr, COLUMNS: tl.constexpr, EQUAL_IDS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_E: tl.constexpr, EVEN_E: tl.constexpr, GUIDE_PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr, INPUT_PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile: scores, then statistics for the sides that have partials, and weights where there is room for them."""
    WEIGHTS: tl.constexpr = weights_ptr is not None and row_moments_ptr is None
    STATISTICS: tl.constexpr = row_partials_ptr is not None or col_partials_ptr is not None
    row_block, col_block = tile_place(tl.program_id(0), R, C, BLOCK_M, BLOCK_N, GROUP)
    row0 = row_block * BLOCK_M
    col0 = col_block * BLOCK_N
    rows = row0 + tl.arange(0, BLOCK_M)
    cols = col0 + tl.arange(0, BLOCK_N)
    scale, bias, center = load_params(params_ptr)
    pairs = (
        diagonal, columns_ptr, first_column, col_bias_ptr, row_ids_ptr, col_ids_ptr,
        row_target_ptr, row_target_stride, col_target_ptr, col_target_stride, EQUAL_IDS,
        row_ceiling_ptr, col_ceiling_ptr, row_guide_ptr, col_guide_ptr, row_threshold_ptr, col_threshold_ptr,
        E, row_guide_stride, col_guide_stride,
    )  # fmt: skip
    of_cols = load_columns(pairs, cols, C)
    # what is left out is far below every score: with a positive scale
    usual = (scale > 1e-18) & (scale < 1e18)
    factor = 1.0
    referred = (0.0,)
    if WEIGHTS:
        factor = tl.load(factor_ptr)
        row = load_side(row_normalizer_ptr, row_normalizer_stride, row_gain_ptr, rows, R, ROW, BLOCK_M)
        col = load_side(col_normalizer_ptr, col_normalizer_stride, col_gain_ptr, cols, C, COL, BLOCK_N)
        narrow, referred = TERM.refer(row, col, scale, bias, factor, ROW, COL)
        usual = usual & narrow
    complete = every_pair_counts(pairs, rows, row0, cols, col0, R, C, COLUMNS)
    guide = _guide_product(pairs, rows, cols, R, C, tl.where(usual, E, 0), BLOCK_E, EVEN_E, GUIDE_PRECISION)
    scores = _tile_product(
        x_ptr, y_ptr, rows, cols, R, C, tl.where(usual, D, 0), x_stride, y_stride,
        BLOCK_K, EVEN_K, INPUT_PRECISION, UPCAST,
    )  # fmt: skip
    w = finish_tile(
        scores, guide, complete, usual, pairs, of_cols, referred, scale, bias, center, factor, row_block, col_block,
        rows, cols, row_partials_ptr, col_partials_ptr, params_partials_ptr, row_moments_ptr, col_moments_ptr,
        unusual_ptr, R, C, TERM, ROW, COL, COLUMNS, WEIGHTS, STATISTICS,
    )  # fmt: skip
    if weights_ptr is not None:
        _store_weights(weights_ptr, weights_stride, w, rows, cols, R, C)


@triton.jit(do_not_specialize=_ARGUMENTS)
def rest_kernel(
    x_ptr, y_ptr, params_ptr, diagonal, columns_ptr, first_column, col_bias_ptr, row_ids_ptr, col_ids_ptr,
    row_target_ptr, row_target_stride, col_target_ptr, col_target_stride, row_ceiling_ptr, col_ceiling_ptr,
    row_guide_ptr, col_guide_ptr, row_threshold_ptr, col_threshold_ptr, E, row_guide_stride, col_guide_stride,
    row_normalizer_ptr, row_gain_ptr, col_normalizer_ptr, col_gain_ptr, weights_ptr, factor_ptr,
    row_partials_ptr, col_partials_ptr, params_partials_ptr, row_moments_ptr, col_moments_ptr, unusual_ptr,
    R, C, D, x_stride, y_stride, weights_stride, row_normalizer_stride, col_normalizer_stride,
    TERM: tl.constexpr, ROW: tl.constexpr, COL: tl.constexpr, COLUMNS: tl.constexpr, EQUAL_IDS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_E: tl.constexpr, EVEN_E: tl.constexpr, GUIDE_PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr, INPUT_PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    PIECE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The tiles that score_kernel left, anew and in full generality, PIECE of their columns at a time.

    Each program looks after TILES of the blocks; nearly all find none to do.
    """
    col_blocks = tl.cdiv(C, BLOCK_N)
    blocks = tl.cdiv(R, BLOCK_M) * col_blocks
    programs = tl.num_programs(0)
    mine = tl.program_id(0) + tl.arange(0, TILES) * programs
    unusual = tl.load(unusual_ptr + mine, mask=mine < blocks, other=0.0)
    if tl.max(unusual, 0) > 0:
        for block in range(tl.program_id(0), blocks, programs):
            if tl.load(unusual_ptr + block) > 0:
                _any_tile(
                    x_ptr, y_ptr, params_ptr,
                    (
                        diagonal, columns_ptr, first_column, col_bias_ptr, row_ids_ptr, col_ids_ptr,
                        row_target_ptr, row_target_stride, col_target_ptr, col_target_stride, EQUAL_IDS,
                        row_ceiling_ptr, col_ceiling_ptr, row_guide_ptr, col_guide_ptr, row_threshold_ptr,
                        col_threshold_ptr, E, row_guide_stride, col_guide_stride,
                    ),
                    row_normalizer_ptr, row_gain_ptr, col_normalizer_ptr, col_gain_ptr, weights_ptr, factor_ptr,
                    row_partials_ptr, col_partials_ptr, params_partials_ptr, block // col_blocks, block % col_blocks,
                    R, C, D, x_stride, y_stride, weights_stride, row_normalizer_stride, col_normalizer_stride,
                    TERM, ROW, COL, COLUMNS, weights_ptr is not None and row_moments_ptr is None,
                    BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_E, EVEN_E, GUIDE_PRECISION, EVEN_K, INPUT_PRECISION, UPCAST,
                    PIECE,
                )  # fmt: skip


@triton.jit
def _any_tile(
    x_ptr, y_ptr, params_ptr, pairs, row_normalizer_ptr, row_gain_ptr, col_normalizer_ptr, col_gain_ptr,
    weights_ptr, factor_ptr, row_partials_ptr, col_partials_ptr, params_partials_ptr, row_block, col_block,
    R, C, D, x_stride, y_stride, weights_stride, row_normalizer_stride, col_normalizer_stride,
    TERM: tl.constexpr, ROW: tl.constexpr, COL: tl.constexpr, COLUMNS: tl.constexpr, WEIGHTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr, EVEN_E: tl.constexpr, GUIDE_PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr, INPUT_PRECISION: tl.constexpr, UPCAST: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """One tile, with a shift for each row and each column."""
    STATISTICS: tl.constexpr = row_partials_ptr is not None or col_partials_ptr is not None
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    scale, bias, center = load_params(params_ptr)
    row = load_side(row_normalizer_ptr, row_normalizer_stride, row_gain_ptr, rows, R, WEIGHTS and ROW, BLOCK_M)
    shift = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    dscale = 0.0
    dbias = 0.0
    for piece in range(0, BLOCK_N, PIECE):
        cols = col_block * BLOCK_N + piece + tl.arange(0, PIECE)
        guide = _guide_product(pairs, rows, cols, R, C, pairs[17], BLOCK_E, EVEN_E, GUIDE_PRECISION)
        scores = _tile_product(
            x_ptr, y_ptr, rows, cols, R, C, D, x_stride, y_stride, BLOCK_K, EVEN_K, INPUT_PRECISION, UPCAST
        )
        z = logits(scores, scale, bias, pairs, cols, C)
        of_cols = load_columns(pairs, cols, C)
        ids = load_ids(pairs, rows, cols, R, C)
        z = TERM.alike(z, z, of_cols, pairs, ids, False)
        z = leave_out(z, -float("inf"), pairs, rows, cols, R, C, COLUMNS)
        col = load_side(col_normalizer_ptr, col_normalizer_stride, col_gain_ptr, cols, C, WEIGHTS and COL, PIECE)
        limits = load_limits(pairs, rows, cols, R, C, guide)
        by_row = below(z, -float("inf"), scores, scale, pairs, limits, True)
        by_col = below(z, -float("inf"), scores, scale, pairs, limits, False)
        w, row_shift, row_sum, col_shift, col_sum = TERM.tile(by_row, by_col, row, col, ROW, COL, WEIGHTS, STATISTICS)
        if WEIGHTS:
            w = TERM.alike(w, z, of_cols, pairs, ids, True)
            w = less_targets(w, z > -float("inf"), 1.0, pairs, of_cols, ids, rows, cols, R, C)
            dscale += tl.sum(tl.sum(w * (scores - center), 1), 0)
            dbias += tl.sum(tl.sum(w, 1), 0)
            _store_weights(weights_ptr, weights_stride, w * tl.load(factor_ptr), rows, cols, R, C)
        if row_partials_ptr is not None:
            shift, total = TERM.merge(shift, total, row_shift, row_sum)
        if col_partials_ptr is not None:
            _store_statistics(col_partials_ptr, row_block, cols, C, col_shift, col_sum)
    if params_partials_ptr is not None:
        block = row_block * tl.cdiv(C, BLOCK_N) + col_block
        tl.store(params_partials_ptr + 2 * block, dscale)
        tl.store(params_partials_ptr + 2 * block + 1, dbias)
    if row_partials_ptr is not None:
        _store_statistics(row_partials_ptr, col_block, rows, R, shift, total)
