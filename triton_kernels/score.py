"""The kernels: one multiplies a tile of scores on the tensor cores and finishes it in registers, one merges.

No score leaves the chip. A tile leaves either its statistics, or its weights, or both; a program writes what no other
program writes, so that there are no atomics and two runs agree bitwise. No loop names a loss: see pair_terms.py; which
pairs count is in pairs.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pairs import every_pair_counts, logits

__all__ = ["merge_kernel", "score_kernel"]


@triton.jit
def _tile_product(
    x_ptr, y_ptr, rows, cols, R, C, D, x_stride, y_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, INPUT_PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """x yT of these rows and columns [BLOCK_M, BLOCK_N] in float32; past the end, the last row (column) once more."""
    features = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + tl.minimum(rows, R - 1).to(tl.int64)[:, None] * x_stride + features[None, :]
    y_ptrs = y_ptr + tl.minimum(cols, C - 1).to(tl.int64)[None, :] * y_stride + features[:, None]
    scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
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
def _tile_place(R, C, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """This program's row block and column block: GROUP row blocks go through the columns together and share L2."""
    program = tl.program_id(0)
    row_blocks = tl.cdiv(R, BLOCK_M)
    col_blocks = tl.cdiv(C, BLOCK_N)
    first = program // (GROUP * col_blocks) * GROUP
    group = tl.minimum(row_blocks - first, GROUP)
    within = program % (GROUP * col_blocks)
    return first + within % group, within // group


@triton.jit
def _load_side(normalizer_ptr, normalizer_stride, gain_ptr, index, n, HAS: tl.constexpr, BLOCK: tl.constexpr):
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
def _finish(w, scores, center, factor, WEIGHTS: tl.constexpr, PARAMS: tl.constexpr, OUT: tl.constexpr):
    """w * factor in the dtype it is stored in, and the tile's sums of w * (score - center) and of w."""
    dscale = 0.0
    dbias = 0.0
    out = w
    if WEIGHTS:
        if PARAMS:
            dscale = tl.sum(tl.sum(w * (scores - center), 1), 0)
            dbias = tl.sum(tl.sum(w, 1), 0)
        out = (w * factor).to(OUT)
    return out, dscale, dbias


@triton.jit
def _store_statistics(partials_ptr, block, index, n, shift, total):
    """partials [blocks, 2, n]: this block's shift and sum of every row (or column)."""
    ptrs = partials_ptr + block.to(tl.int64) * 2 * n + index
    tl.store(ptrs, shift, mask=index < n)
    tl.store(ptrs + n, total, mask=index < n)


@triton.jit(do_not_specialize=["R", "diagonal", "first_column", "row_normalizer_stride", "col_normalizer_stride"])
def score_kernel(
    x_ptr,  # [R, D]
    y_ptr,  # [C, D]
    params_ptr,  # [3] scale, bias, center
    diagonal,  # of the panel's row i, its column i + diagonal is left out; or None
    columns_ptr,  # [R, COLUMNS] columns of the whole matrix that rows leave out, or None
    first_column,  # the panel's, in the whole matrix
    col_bias_ptr,  # [C] or None
    row_normalizer_ptr,  # [2, R] or None
    row_gain_ptr,  # [R] or None
    col_normalizer_ptr,  # [2, C] or None
    col_gain_ptr,  # [C] or None
    weights_ptr,  # [R, C] or None: dL/dz * factor
    factor_ptr,  # [1] what the weights are multiplied by
    row_partials_ptr,  # [column blocks, 2, R] or None
    col_partials_ptr,  # [row blocks, 2, C] or None
    params_partials_ptr,  # [blocks, 2] or None
    R, C, D, x_stride, y_stride, weights_stride, row_normalizer_stride, col_normalizer_stride,
    TERM: tl.constexpr, ROW: tl.constexpr, COL: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    EVEN_K: tl.constexpr, INPUT_PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile: scores, then statistics for the sides that have partials, and weights where there is room for them."""
    row_block, col_block = _tile_place(R, C, BLOCK_M, BLOCK_N, GROUP)
    row0 = row_block * BLOCK_M
    col0 = col_block * BLOCK_N
    rows = row0 + tl.arange(0, BLOCK_M)
    cols = col0 + tl.arange(0, BLOCK_N)
    scores = _tile_product(
        x_ptr, y_ptr, rows, cols, R, C, D, x_stride, y_stride,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, INPUT_PRECISION, UPCAST,
    )  # fmt: skip
    scale = tl.load(params_ptr)
    bias = tl.load(params_ptr + 1)
    center = tl.load(params_ptr + 2)
    pairs = (diagonal, columns_ptr, first_column, col_bias_ptr)
    WEIGHTS: tl.constexpr = weights_ptr is not None
    STATISTICS: tl.constexpr = row_partials_ptr is not None or col_partials_ptr is not None
    PARAMS: tl.constexpr = params_partials_ptr is not None
    OUT: tl.constexpr = weights_ptr.dtype.element_ty if WEIGHTS else tl.float32
    factor = tl.load(factor_ptr) if WEIGHTS else 1.0
    row = _load_side(row_normalizer_ptr, row_normalizer_stride, row_gain_ptr, rows, R, WEIGHTS and ROW, BLOCK_M)
    col = _load_side(col_normalizer_ptr, col_normalizer_stride, col_gain_ptr, cols, C, WEIGHTS and COL, BLOCK_N)
    z = logits(scores, scale, bias, pairs, rows, cols, R, C, COLUMNS, True)
    common, shift = TERM.common_shift(z, row, col, ROW, COL, WEIGHTS, STATISTICS)
    complete = every_pair_counts(pairs, rows, row0, cols, col0, R, C, COLUMNS)
    # Both branches end with what leaves the chip, so that neither keeps scores and weights in registers beyond its end.
    if common & complete:
        w, row_shift, row_sum, col_shift, col_sum = TERM.common_tile(z, shift, row, col, ROW, COL, WEIGHTS, STATISTICS)
        w, dscale, dbias = _finish(w, scores, center, factor, WEIGHTS, PARAMS, OUT)
    else:
        z = logits(scores, scale, bias, pairs, rows, cols, R, C, COLUMNS, False)
        w, row_shift, row_sum, col_shift, col_sum = TERM.tile(z, row, col, ROW, COL, WEIGHTS, STATISTICS)
        w, dscale, dbias = _finish(w, scores, center, factor, WEIGHTS, PARAMS, OUT)
    if WEIGHTS:
        ptrs = weights_ptr + rows.to(tl.int64)[:, None] * weights_stride + cols[None, :]
        tl.store(ptrs, w, mask=(rows < R)[:, None] & (cols < C)[None, :])
    if PARAMS:
        block = row_block * tl.cdiv(C, BLOCK_N) + col_block
        tl.store(params_partials_ptr + 2 * block, dscale)
        tl.store(params_partials_ptr + 2 * block + 1, dbias)
    if row_partials_ptr is not None:
        _store_statistics(row_partials_ptr, col_block, rows, R, row_shift, row_sum)
    if col_partials_ptr is not None:
        _store_statistics(col_partials_ptr, row_block, cols, C, col_shift, col_sum)


@triton.jit
def _merge_side(
    state_ptr, partials_ptr, block, n, blocks, state_stride,
    TERM: tl.constexpr, STATE_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """state [STATE_ROWS, n] of BLOCK rows (or columns), with the partials [blocks, 2, n] merged in, in their order."""
    index = block * BLOCK + tl.arange(0, BLOCK)
    mask = index < n
    shift = tl.zeros([BLOCK], tl.float32)
    if STATE_ROWS == 2:
        shift = tl.load(state_ptr + index, mask=mask, other=0.0)
    sum_ptr = state_ptr + (STATE_ROWS - 1) * state_stride
    total = tl.load(sum_ptr + index, mask=mask, other=0.0)
    ptrs = partials_ptr + index
    for _ in range(blocks):
        other_shift = tl.load(ptrs, mask=mask, other=0.0)
        other_total = tl.load(ptrs + n, mask=mask, other=0.0)
        shift, total = TERM.merge(shift, total, other_shift, other_total)
        ptrs += 2 * n
    if STATE_ROWS == 2:
        tl.store(state_ptr + index, shift, mask=mask)
    tl.store(sum_ptr + index, total, mask=mask)


@triton.jit
def _add_params(dparams_ptr, partials_ptr, blocks, BLOCK: tl.constexpr):
    """dparams [2] += the sums of the partials [blocks, 2], in dparams' own dtype."""
    total_type = dparams_ptr.dtype.element_ty
    index = tl.arange(0, BLOCK)
    scale_sum = tl.zeros([BLOCK], total_type)
    bias_sum = tl.zeros([BLOCK], total_type)
    for first in range(0, blocks, BLOCK):
        ptrs = partials_ptr + 2 * (first + index)
        scale_sum += tl.load(ptrs, mask=first + index < blocks, other=0.0).to(total_type)
        bias_sum += tl.load(ptrs + 1, mask=first + index < blocks, other=0.0).to(total_type)
    tl.store(dparams_ptr, tl.load(dparams_ptr) + tl.sum(scale_sum, 0))
    tl.store(dparams_ptr + 1, tl.load(dparams_ptr + 1) + tl.sum(bias_sum, 0))


@triton.jit(do_not_specialize=["R", "C", "row_blocks", "col_blocks", "row_stride", "col_stride"])
def merge_kernel(
    row_state_ptr,  # [STATE_ROWS, R] or None
    col_state_ptr,  # [STATE_ROWS, C] or None
    row_partials_ptr,  # [col_blocks, 2, R]
    col_partials_ptr,  # [row_blocks, 2, C]
    dparams_ptr,  # [2] or None
    params_partials_ptr,  # [row_blocks * col_blocks, 2]
    R, C, row_blocks, col_blocks, row_stride, col_stride,
    TERM: tl.constexpr, STATE_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Folds a panel's partial results into the running state: programs for rows, for columns, one for params."""
    program = tl.program_id(0)
    row_programs = 0
    if row_state_ptr is not None:
        row_programs = tl.cdiv(R, BLOCK)
        if program < row_programs:
            _merge_side(row_state_ptr, row_partials_ptr, program, R, col_blocks, row_stride, TERM, STATE_ROWS, BLOCK)
    col_programs = 0
    if col_state_ptr is not None:
        col_programs = tl.cdiv(C, BLOCK)
        if (program >= row_programs) & (program < row_programs + col_programs):
            _merge_side(
                col_state_ptr, col_partials_ptr, program - row_programs, C, row_blocks, col_stride,
                TERM, STATE_ROWS, BLOCK,
            )  # fmt: skip
    if dparams_ptr is not None:  # noqa: SIM102 (known to the compiler, unlike what follows)
        if program == row_programs + col_programs:
            _add_params(dparams_ptr, params_partials_ptr, row_blocks * col_blocks, BLOCK)
