"""Which pairs of a tile count, and how a logit is made of a score: all that the kernels know of it.

`pairs` is the kernels' (diagonal, columns_ptr, first_column, col_bias_ptr, row_ids_ptr, col_ids_ptr, row_target_ptr,
row_target_stride, col_target_ptr, col_target_stride, EQUAL_IDS, row_ceiling_ptr, col_ceiling_ptr, row_guide_ptr,
col_guide_ptr, row_threshold_ptr, col_threshold_ptr, E, row_guide_stride, col_guide_stride), with None for what is not
said, which then costs nothing; `of_cols` is what was loaded of a tile's columns, `ids` of its ids, `limits` of its
ceilings and thresholds, with a guide's scores. Kernels hand all through, and pair terms ask here. A further member that
leaves out single pairs goes into `every_pair_counts` and `leave_out`; one that adds to the logits of a column into what
stands beside `load_columns`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .pair_terms import LOG2_E

__all__ = [
    "Pairs",
    "below",
    "column_counts",
    "every_pair_counts",
    "keep_alike",
    "leave_out",
    "leave_out_alike",
    "less_targets",
    "load_columns",
    "load_ids",
    "load_limits",
    "logits",
    "offsets",
    "turn_alike",
    "with_columns",
]


#: What `equal_ids` says.
ALIKE_COUNT = tl.constexpr(1)
ALIKE_ALONE = tl.constexpr(2)


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
    #: [R], [C] int64: what pairs of equal ids are is the term's to say
    row_ids: Tensor | None = None
    col_ids: Tensor | None = None
    #: what they are otherwise: ALIKE_COUNT, ALIKE_ALONE
    equal_ids: int = 0
    #: [R], [C]: pairs whose scale * score lies above are left out of the row's, of the column's
    row_ceiling: Tensor | None = None
    col_ceiling: Tensor | None = None
    #: [R, E], [C, E] a guide's features, their rows dense, and [R], [C]: so are pairs whose dot product lies above
    row_guide: Tensor | None = None
    col_guide: Tensor | None = None
    row_threshold: Tensor | None = None
    col_threshold: Tensor | None = None

    @classmethod
    def of(cls, pairs: Any) -> Pairs:
        """What is said of a panel, with the diagonal counted from its own rows and columns."""
        diagonal = None if pairs.diagonal is None else pairs.diagonal + pairs.first_row - pairs.first_column
        of_rows, of_cols = (None if v is None else v.contiguous() for v in (pairs.row_guide, pairs.col_guide))
        return cls(
            diagonal, pairs.columns, pairs.first_column, pairs.col_bias, pairs.row_ids, pairs.col_ids, pairs.equal_ids,
            pairs.row_ceiling, pairs.col_ceiling, of_rows, of_cols, pairs.row_threshold, pairs.col_threshold,
        )  # fmt: skip

    @property
    def capped(self) -> bool:
        """Whether scores, or a guide's, may be too high to count."""
        return self.row_ceiling is not None or self.col_ceiling is not None or self.row_guide is not None

    @property
    def width(self) -> int:
        """Columns that a row leaves out."""
        return 0 if self.columns is None else self.columns.shape[1]

    def arguments(self, rows: int, cols: int, *targets: Tensor | None) -> tuple[Any, ...]:
        """The same as a kernel's arguments for a panel of this size: past its ends there are no pairs.

        targets: of rows [2, R] and of columns [2, C].
        """
        diagonal = None if self.diagonal is None else min(max(self.diagonal, -rows), cols)
        columns = self.columns if self.width else None
        of_sides = [v for target in targets for v in (target, 0 if target is None else target.stride(0))]
        said = diagonal, columns, self.first_column, self.col_bias, self.row_ids, self.col_ids
        guide = self.row_guide, self.col_guide, self.row_threshold, self.col_threshold
        features = 0 if self.row_guide is None else self.row_guide.shape[1]
        strides = (0 if v is None else v.stride(0) for v in guide[:2])
        return *said, *of_sides, self.row_ceiling, self.col_ceiling, *guide, features, *strides


@triton.jit
def _load_vector(ptr, index, n):
    """What is said of these rows or columns [M]; [1] of zero where nothing is."""
    if ptr is None:
        return tl.zeros([1], tl.float32)
    else:  # noqa: RET505 (the compiler would see both)
        return tl.load(ptr + index, mask=index < n, other=0.0)


@triton.jit
def load_columns(pairs, cols, C):
    """What is added to the logits of these columns [N]; [1] of zero where nothing is."""
    return _load_vector(pairs[3], cols, C)


@triton.jit
def logits(scores, scale, bias, pairs, cols, C):
    """The logits of a tile of these columns."""
    z = scores * scale + bias
    return z + load_columns(pairs, cols, C)[None, :]


@triton.jit
def with_columns(scores, scale, pairs, of_cols):
    """A tile's scores with what is added to a column's logits, in units of a score."""
    col_bias_ptr = pairs[3]
    if col_bias_ptr is not None:
        scores += (of_cols / scale)[None, :]
    return scores


@triton.jit
def offsets(offset, pairs, of_cols):
    """An offset in units of log 2 with what is added to a column's logits [1, N]; itself if that is nothing."""
    col_bias_ptr = pairs[3]
    if col_bias_ptr is None:
        return offset
    else:  # noqa: RET505 (the compiler would see both)
        return (of_cols * LOG2_E + offset)[None, :]


@triton.jit
def column_counts(cols, C, of_cols):
    """Which columns have a logit at all."""
    return (cols < C) & (of_cols > -float("inf"))


@triton.jit
def load_ids(pairs, rows, cols, R, C):
    """The ids of these rows [M] and columns [N]; [1] of zero where nobody has any."""
    row_ids_ptr = pairs[4]
    col_ids_ptr = pairs[5]
    if row_ids_ptr is None:
        return tl.zeros([1], tl.int64), tl.zeros([1], tl.int64)
    else:  # noqa: RET505 (the compiler would see both)
        row_ids = tl.load(row_ids_ptr + rows, mask=rows < R, other=0)
        return row_ids, tl.load(col_ids_ptr + cols, mask=cols < C, other=0)


@triton.jit
def load_limits(pairs, rows, cols, R, C, guide):
    """The ceilings of these rows [M] and columns [N], a guide's scores of the tile, and the thresholds of both."""
    row_ceiling = _load_vector(pairs[11], rows, R)
    col_ceiling = _load_vector(pairs[12], cols, C)
    return row_ceiling, col_ceiling, guide, _load_vector(pairs[15], rows, R), _load_vector(pairs[16], cols, C)


@triton.jit
def below(values, never, scores, scale, pairs, limits, ROWS: tl.constexpr):
    """A tile's values with `never` where scale * score lies above the row's (else the column's) ceiling.

    ... or a guide's score above its threshold.
    """
    if ROWS:
        if pairs[11] is not None:
            values = tl.where(scores * scale > limits[0][:, None], never, values)
        if pairs[15] is not None:
            values = tl.where(limits[2] > limits[3][:, None], never, values)
    else:
        if pairs[12] is not None:
            values = tl.where(scores * scale > limits[1][None, :], never, values)
        if pairs[16] is not None:
            values = tl.where(limits[2] > limits[4][None, :], never, values)
    return values


@triton.jit
def leave_out_alike(values, never, pairs, ids):
    """A tile's values with `never` where ids are equal, unless these pairs count; where they are not, if only those."""
    if pairs[4] is not None and pairs[10] != ALIKE_COUNT:
        if pairs[10] == ALIKE_ALONE:
            values = keep_alike(values, never, pairs, ids)
        else:
            values = tl.where(ids[0][:, None] == ids[1][None, :], never, values)
    return values


@triton.jit
def keep_alike(values, never, pairs, ids):
    """A tile's values with `never` where ids are not equal, if only pairs of equal ones count."""
    if pairs[4] is not None and pairs[10] == ALIKE_ALONE:
        values = tl.where(ids[0][:, None] == ids[1][None, :], values, never)
    return values


@triton.jit
def _target(ptr, stride, index, n, factor, alike, ROWS: tl.constexpr):
    """What one side takes off a tile's weights [M, N], or the same for all pairs of a row (column)."""
    target = tl.load(ptr + index, mask=index < n, other=0.0) * factor
    target = target[:, None] if ROWS else target[None, :]
    if alike is not None:
        of_alike = tl.load(ptr + stride + index, mask=index < n, other=0.0) * factor
        target = tl.where(alike, of_alike[:, None] if ROWS else of_alike[None, :], target)
    return target


@triton.jit
def less_targets(w, counts, factor, pairs, of_cols, ids, rows, cols, R, C):
    """A tile's weights (times `factor`) less the targets of its rows and columns, of the pairs that count.

    `counts`: which do, beside what ids and biases say.
    """
    if pairs[6] is not None or pairs[8] is not None:
        counts = counts & (of_cols > -float("inf"))[None, :]
        alike = None
        if pairs[4] is not None:
            alike = ids[0][:, None] == ids[1][None, :]
            if pairs[10] == ALIKE_ALONE:
                counts = counts & alike
            elif pairs[10] != ALIKE_COUNT:
                counts = counts & (ids[0][:, None] != ids[1][None, :])
        if pairs[6] is not None:
            w -= _target(pairs[6], pairs[7], rows, R, factor, alike, True)
        if pairs[8] is not None:
            w -= _target(pairs[8], pairs[9], cols, C, factor, alike, False)
        w = tl.where(counts, w, 0.0)
    return w


@triton.jit
def turn_alike(values, lowest, which, of_cols, pairs, ids):
    """A tile's values with the sign changed where ids are equal and `which` is above `lowest`: the pair counts."""
    if pairs[4] is not None:
        alike = (ids[0][:, None] == ids[1][None, :]) & (which > lowest) & (of_cols > -float("inf"))[None, :]
        values = tl.where(alike, -values, values)
    return values


@triton.jit
def leave_out(values, never, pairs, rows, cols, R, C, COLUMNS: tl.constexpr):
    """A tile's values with `never` past the panel's ends and where a pair is left out."""
    diagonal = pairs[0]
    out = (rows >= R)[:, None] | (cols >= C)[None, :]
    if diagonal is not None:
        out = out | ((rows + diagonal)[:, None] == cols[None, :])
    for k in tl.static_range(COLUMNS):
        out = out | (_left_out(pairs, rows, k, R, C, COLUMNS)[:, None] == cols[None, :])
    return tl.where(out, never, values)


@triton.jit
def every_pair_counts(pairs, rows, row0, cols, col0, R, C, COLUMNS: tl.constexpr):
    """Whether a tile lies within the panel and none of its pairs is left out; so it is with most tiles."""
    diagonal = pairs[0]
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
    columns_ptr = pairs[1]
    first_column = pairs[2]
    inside = rows < R
    column = tl.load(columns_ptr + rows.to(tl.int64) * COLUMNS + k, mask=inside, other=0) - first_column
    return tl.where(inside & (column >= 0) & (column < C), column, -1).to(tl.int32)
