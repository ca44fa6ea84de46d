"""Which pairs of a tile count, and how a logit is made of a score: all that the kernels know of it.

`pairs` is the kernels' (diagonal, columns_ptr, first_column, col_bias_ptr), with None for what is not said, which then
costs nothing. A further member that leaves out single pairs goes into `every_pair_counts` and `leave_out`; one that
adds to the logits of a column into `col_biases`.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["col_biases", "every_pair_counts", "leave_out"]


@triton.jit
def col_biases(pairs, cols, C):
    """What is added to the logits of these columns [N]; [1] of zero where nothing is."""
    _, _, _, col_bias_ptr = pairs
    if col_bias_ptr is None:
        return tl.zeros([1], tl.float32)
    else:  # noqa: RET505 (the compiler would see both)
        return tl.load(col_bias_ptr + cols, mask=cols < C, other=0.0)


@triton.jit
def leave_out(values, never, pairs, rows, cols, R, C, COLUMNS: tl.constexpr):
    """A tile's values with `never` past the panel's ends and where a pair is left out."""
    diagonal, _, _, _ = pairs
    out = (rows >= R)[:, None] | (cols >= C)[None, :]
    if diagonal is not None:
        out = out | ((rows + diagonal)[:, None] == cols[None, :])
    for k in tl.static_range(COLUMNS):
        out = out | (_left_out(pairs, rows, k, R, C, COLUMNS)[:, None] == cols[None, :])
    return tl.where(out, never, values)


@triton.jit
def every_pair_counts(pairs, rows, row0, cols, col0, R, C, COLUMNS: tl.constexpr):
    """Whether a tile lies within the panel and none of its pairs is left out; so it is with most tiles."""
    diagonal, _, _, _ = pairs
    complete = (row0 + rows.shape[0] <= R) & (col0 + cols.shape[0] <= C)
    if diagonal is not None:
        first = row0 + diagonal  # of the tile's first row; the last row's is as many further
        complete = complete & ((first >= col0 + cols.shape[0]) | (first + rows.shape[0] <= col0))
    for k in tl.static_range(COLUMNS):
        column = _left_out(pairs, rows, k, R, C, COLUMNS)
        here = (column >= col0) & (column < col0 + cols.shape[0])
        complete = complete & (tl.max(here.to(tl.int32), 0) == 0)
    return complete


@triton.jit
def _left_out(pairs, rows, k, R, C, COLUMNS: tl.constexpr):
    """The panel's column that the k-th of these rows' own columns leaves out [M]; -1 where it leaves out none."""
    _, columns_ptr, first_column, _ = pairs
    inside = rows < R
    column = tl.load(columns_ptr + rows.to(tl.int64) * COLUMNS + k, mask=inside, other=0) - first_column
    return tl.where(inside & (column >= 0) & (column < C), column, -1).to(tl.int32)
