"""The kernel that folds the tiles' partial results into the running states, in one order: two runs agree bitwise."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["merge_kernel", "merged"]


@triton.jit
def merged(partials_ptr, index, inside, n, blocks, TERM: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """(shift, sum) [BLOCK] of these rows (or columns), of the partials [blocks, 2, n].

    PARTS of them are on their way at a time, each followed by the one PARTS further; then these are merged.
    """
    part = tl.arange(0, PARTS)
    shift = tl.zeros([PARTS, BLOCK], tl.float32)
    total = tl.zeros([PARTS, BLOCK], tl.float32)
    for first in range(0, blocks, PARTS):
        mask = (first + part < blocks)[:, None] & inside[None, :]
        ptrs = partials_ptr + (first + part).to(tl.int64)[:, None] * 2 * n + index[None, :]
        other_shift = tl.load(ptrs, mask=mask, other=0.0)
        other_total = tl.load(ptrs + n, mask=mask, other=0.0)
        shift, total = TERM.merge(shift, total, other_shift, other_total)
    return TERM.merge_all(shift, total)


@triton.jit
def _merge_side(
    state_ptr, partials_ptr, block, n, blocks, state_stride,
    TERM: tl.constexpr, STATE_ROWS: tl.constexpr, FRESH: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """state [STATE_ROWS, n] of BLOCK rows (or columns), with the partials [blocks, 2, n] merged; FRESH: they are it."""
    index = block * BLOCK + tl.arange(0, BLOCK)
    inside = index < n
    shift, total = merged(partials_ptr, index, inside, n, blocks, TERM, BLOCK, PARTS)
    sum_ptr = state_ptr + (STATE_ROWS - 1) * state_stride
    if not FRESH:
        own_shift = tl.zeros([BLOCK], tl.float32)
        if STATE_ROWS == 2:
            own_shift = tl.load(state_ptr + index, mask=inside, other=0.0)
        own_total = tl.load(sum_ptr + index, mask=inside, other=0.0)
        shift, total = TERM.merge(own_shift, own_total, shift, total)
    if STATE_ROWS == 2:
        tl.store(state_ptr + index, shift, mask=inside)
    tl.store(sum_ptr + index, total, mask=inside)


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
    TERM: tl.constexpr, STATE_ROWS: tl.constexpr, ROW_FRESH: tl.constexpr, COL_FRESH: tl.constexpr,
    BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Folds a panel's partial results into the running state: programs for rows, for columns, one for params."""
    program = tl.program_id(0)
    row_programs = 0
    if row_state_ptr is not None:
        row_programs = tl.cdiv(R, BLOCK)
        if program < row_programs:
            _merge_side(
                row_state_ptr, row_partials_ptr, program, R, col_blocks, row_stride,
                TERM, STATE_ROWS, ROW_FRESH, BLOCK, PARTS,
            )  # fmt: skip
    col_programs = 0
    if col_state_ptr is not None:
        col_programs = tl.cdiv(C, BLOCK)
        if (program >= row_programs) & (program < row_programs + col_programs):
            _merge_side(
                col_state_ptr, col_partials_ptr, program - row_programs, C, row_blocks, col_stride,
                TERM, STATE_ROWS, COL_FRESH, BLOCK, PARTS,
            )  # fmt: skip
    if dparams_ptr is not None:  # noqa: SIM102 (known to the compiler, unlike what follows)
        if program == row_programs + col_programs:
            _add_params(dparams_ptr, params_partials_ptr, row_blocks * col_blocks, BLOCK * PARTS)
