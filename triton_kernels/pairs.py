"""Which pairs of a tile count, and how a logit is made of a score: all that the kernels know of it.

`pairs` is the kernels' (diagonal, columns_ptr, first_column, col_bias_ptr), with None for what is not said, which then
costs nothing; `of_cols` is what was loaded of a tile's columns. Kernels hand both through, and pair terms ask here. A
further member that leaves out single pairs goes into `every_pair_counts` and `leave_out`; one that adds to the logits
of a column into what stands beside `load_columns`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .pair_terms import LOG2_E

__all__ = [
    "Pairs",
    "column_counts",
    "every_pair_counts",
    "leave_out",
    "load_columns",
    "logits",
    "offsets",
    "with_columns",
]


class Pairs(NamedTuple):
    """Which pairs of a panel count; None where nothing is said."""

    #: of the panel's row i, its column i + diagonal is left out
    diagonal: int | None = None
    #: [R, K] columns of the whole matrix that rows leave out
    columns: Tensor | None = None
    #: the panel's first column in the whole matrix
    first_column: int = 0
    #: [C] added to the logits of a column
    col_bias: Tensor | None = None

    @classmethod
    def of(cls, pairs: Any) -> Pairs:
        """What is said of a panel, with the diagonal counted from its own rows and columns."""
        diagonal = None if pairs.diagonal is None else pairs.diagonal + pairs.first_row - pairs.first_column
        return cls(diagonal, pairs.columns, pairs.first_column, pairs.col_bias)

    @property
    def width(self) -> int:
        """Columns that a row leaves out."""
        return 0 if self.columns is None else self.columns.shape[1]

    def arguments(self, rows: int, cols: int) -> tuple[Any, ...]:
        """The same as a kernel's arguments for a panel of this size: past its ends there are no pairs."""
        diagonal = None if self.diagonal is None else min(max(self.diagonal, -rows), cols)
        return diagonal, self.columns if self.width else None, self.first_column, self.col_bias


@triton.jit
def load_columns(pairs, cols, C):
    """What is added to the logits of these columns [N]; [1] of zero where nothing is."""
    _, _, _, col_bias_ptr = pairs
    if col_bias_ptr is None:
        return tl.zeros([1], tl.float32)
    else:  # noqa: RET505 (the compiler would see both)
        return tl.load(col_bias_ptr + cols, mask=cols < C, other=0.0)


@triton.jit
def logits(scores, scale, bias, pairs, cols, C):
    """The logits of a tile of these columns."""
    z = scores * scale + bias
    return z + load_columns(pairs, cols, C)[None, :]


@triton.jit
def with_columns(scores, scale, pairs, of_cols):
    """A tile's scores with what is added to a column's logits, in units of a score."""
    _, _, _, col_bias_ptr = pairs
    if col_bias_ptr is not None:
        scores += (of_cols / scale)[None, :]
    return scores


@triton.jit
def offsets(offset, pairs, of_cols):
    """An offset in units of log 2 with what is added to a column's logits [1, N]; itself if that is nothing."""
    _, _, _, col_bias_ptr = pairs
    if col_bias_ptr is None:
        return offset
    else:  # noqa: RET505 (the compiler would see both)
        return (of_cols * LOG2_E + offset)[None, :]


@triton.jit
def column_counts(cols, C, of_cols):
    """Which columns have a logit at all."""
    return (cols < C) & (of_cols > -float("inf"))


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
