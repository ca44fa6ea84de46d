"""Which pairs of the score matrix count, and how a logit is made of a score: one vocabulary for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["ALIKE_ALONE", "ALIKE_COUNT", "EVERY_PAIR", "Pairs"]

#: What pairs of equal ids are, if not what the term makes of them: pairs like others; the only ones that count.
ALIKE_COUNT, ALIKE_ALONE = 1, 2


class Pairs(NamedTuple):
    """What is said of the pairs of a matrix, or of a block of it; None where nothing is. Backends apply all of it.

    The members have the same names in ``csrc/include/members.h`` and in ``triton_kernels/pairs.py``. It travels as one
    object from a problem to the kernels, and only what applies it looks inside. (A tuple, which Dynamo takes as a
    default.)
    """

    #: of row i of the whole matrix, column i + diagonal is left out
    diagonal: int | None = None
    #: [N, K] int64 columns of the whole matrix that each row leaves out beside; -1 is no column
    columns: Tensor | None = None
    #: [M] added to the logits of a column, in the dtype of the scores; -inf leaves the column out
    col_bias: Tensor | None = None
    #: [N], [M] int64: pairs of equal ids: left out of exponentials and searches, and positives of the sigmoid term, but
    #: for what `equal_ids` says
    row_ids: Tensor | None = None
    col_ids: Tensor | None = None
    #: where this block begins in the whole matrix
    first_row: int = 0
    first_column: int = 0
    #: 0, `ALIKE_COUNT` or `ALIKE_ALONE`
    equal_ids: int = 0
    #: [N], [M] in the dtype of the scores: a pair whose scale * score lies above the row's (column's) is left out of
    #: what the row (column) sums and weighs
    row_ceiling: Tensor | None = None
    col_ceiling: Tensor | None = None
    #: [N], [M] in the dtype of the scores, both or neither: the scale of a score's logit among its row's (column's), in
    #: place of the one; for a backend with `scales_by_row`
    row_scale: Tensor | None = None
    col_scale: Tensor | None = None
    #: [N, E], [M, E], both or neither: another model's features, in their own dtype
    row_guide: Tensor | None = None
    col_guide: Tensor | None = None
    #: [N], [M] in the dtype of the scores, with a guide: so is a pair whose dot product of these features lies above
    row_threshold: Tensor | None = None
    col_threshold: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Those that a differentiable problem may say of its pairs, as :meth:`of` takes them."""
        return (
            self.col_bias, self.row_ids, self.col_ids, self.row_ceiling, self.col_ceiling, self.row_guide,
            self.col_guide, self.row_threshold, self.col_threshold,
        )  # fmt: skip

    @classmethod
    def of(cls, tensors: Sequence[Tensor | None]) -> Pairs:
        """What these tensors say; all but the first three may be left away."""
        col_bias, row_ids, col_ids, *limits = tensors
        if col_bias is None and row_ids is None and not any(each is not None for each in limits):
            return EVERY_PAIR
        row_ceiling, col_ceiling, row_guide, col_guide, row_threshold, col_threshold, *_ = *limits, *(None,) * 6
        return cls(
            None, None, col_bias, row_ids, col_ids, row_ceiling=row_ceiling, col_ceiling=col_ceiling,
            row_guide=row_guide, col_guide=col_guide, row_threshold=row_threshold, col_threshold=col_threshold,
        )  # fmt: skip

    def mapped(self, of_rows: Callable[[Any], Any], of_cols: Callable[[Any], Any]) -> Pairs:
        """The same of other rows and columns: what these functions make of the vectors of rows, and of columns."""

        def made(function: Callable[[Any], Any], vector: Tensor | None) -> Any:
            return None if vector is None else function(vector)

        return Pairs(
            self.diagonal,
            self.columns,
            made(of_cols, self.col_bias),
            made(of_rows, self.row_ids),
            made(of_cols, self.col_ids),
            equal_ids=self.equal_ids,
            row_ceiling=made(of_rows, self.row_ceiling),
            col_ceiling=made(of_cols, self.col_ceiling),
            row_scale=made(of_rows, self.row_scale),
            col_scale=made(of_cols, self.col_scale),
            row_guide=made(of_rows, self.row_guide),
            col_guide=made(of_cols, self.col_guide),
            row_threshold=made(of_rows, self.row_threshold),
            col_threshold=made(of_cols, self.col_threshold),
        )

    def block(self, rows: slice, cols: slice) -> Pairs:
        """The same of a block of this one's rows and columns."""

        def part(vector: Tensor | None, block: slice) -> Tensor | None:
            return None if vector is None else vector[block]

        return Pairs(
            self.diagonal,
            part(self.columns, rows),
            part(self.col_bias, cols),
            part(self.row_ids, rows),
            part(self.col_ids, cols),
            self.first_row + rows.start,
            self.first_column + cols.start,
            self.equal_ids,
            part(self.row_ceiling, rows),
            part(self.col_ceiling, cols),
            part(self.row_scale, rows),
            part(self.col_scale, cols),
            part(self.row_guide, rows),
            part(self.col_guide, cols),
            part(self.row_threshold, rows),
            part(self.col_threshold, cols),
        )

    def guide_in(self, dtype: torch.dtype) -> Pairs:
        """The same with a guide's features in this dtype."""
        if self.row_guide is None or self.col_guide is None:
            return self
        return self._replace(row_guide=self.row_guide.to(dtype), col_guide=self.col_guide.to(dtype))

    def leaving_out(self, diagonal: int | None, columns: Tensor | None) -> Pairs:
        """The same without these as well, which count in the whole matrix; one of both may be left out already."""
        diagonal = self.diagonal if diagonal is None else diagonal
        columns = self.columns if columns is None else columns
        return self._replace(diagonal=diagonal, columns=columns)

    @property
    def capped(self) -> bool:
        """Whether scores, or a guide's, may be too high to count."""
        return self.row_ceiling is not None or self.col_ceiling is not None or self.row_guide is not None

    @property
    def guide_features(self) -> int:
        """The width of a guide's features; 0 without one."""
        return 0 if self.row_guide is None else self.row_guide.shape[1]

    def with_guide(
        self, features: tuple[Tensor, Tensor], row_threshold: Tensor, col_threshold: Tensor | None = None
    ) -> Pairs:
        """The same with a guide's features of rows and columns, and its thresholds."""
        row_guide, col_guide = features
        return self._replace(
            row_guide=row_guide, col_guide=col_guide, row_threshold=row_threshold, col_threshold=col_threshold
        )

    @property
    def adds(self) -> bool:
        """Whether something is added to the columns' logits."""
        return self.col_bias is not None

    def least_added(self) -> Tensor | float:
        """The least that is added to the logits of a column that counts."""
        if self.col_bias is None or not len(self.col_bias):
            return 0.0
        bias = self.col_bias.detach()
        return bias.masked_fill(bias == -torch.inf, torch.inf).amin()

    def add_to(self, z: Tensor, columns: slice | Tensor) -> Tensor:
        """Logits [..., n] of these n columns, with what is added to a column's; the same tensor if that is nothing."""
        return z if self.col_bias is None else z + self.col_bias[columns]

    def add_to_positives(self, z: Tensor, columns: slice | Tensor) -> Tensor:
        """The same of positives [n]; nothing is added where the bias leaves one out, of a row that must not count."""
        if self.col_bias is None:
            return z
        added = self.col_bias[columns]
        return z + added.masked_fill(added == -torch.inf, 0.0)

    def turned(self) -> Pairs:
        """What ids, ceilings and a guide say of the transposed matrix."""
        limits = self.col_ceiling, self.row_ceiling, self.col_guide, self.row_guide
        return Pairs.of((None, self.col_ids, self.row_ids, *limits, self.col_threshold, self.row_threshold))

    def of_rows(self, rows: slice) -> Pairs:
        """The same of some rows of a whole matrix, which count from 0; no single pair is left out so far."""
        of_rows = self.row_ids, self.row_ceiling, self.row_scale, self.row_guide, self.row_threshold
        if all(v is None for v in of_rows):
            return self
        row_ids, ceiling, scale, guide, threshold = (None if v is None else v[rows] for v in of_rows)
        return self._replace(
            row_ids=row_ids, row_ceiling=ceiling, row_scale=scale, row_guide=guide, row_threshold=threshold
        )

    def alike(self, rows: slice, turned: bool = False) -> Tensor | None:
        """Which pairs of these rows (turned: columns) have equal ids [R, M]; None where nobody has ids."""
        if self.row_ids is None or self.col_ids is None:
            return None
        own, others = (self.col_ids, self.row_ids) if turned else (self.row_ids, self.col_ids)
        return own[rows, None] == others

    def too_high(self, scaled: Tensor, rows: slice, turned: bool = False) -> Tensor | None:
        """Which pairs of these rows (turned: columns) lie above their ceilings or a guide's thresholds [R, M].

        None where there are neither. `scaled`: scale * score of these pairs.
        """
        ceiling, threshold = self.row_ceiling, self.row_threshold
        own, others = self.row_guide, self.col_guide
        if turned:
            ceiling, threshold, own, others = self.col_ceiling, self.col_threshold, others, own
        out = None if ceiling is None else scaled > ceiling[rows, None]
        if threshold is None or own is None or others is None:
            return out
        alike = own[rows].detach() @ others.detach().T > threshold[rows, None]
        return alike if out is None else out | alike


#: Nothing is said: every pair counts, and its logit is scale * score + bias.
EVERY_PAIR = Pairs()
