"""Which pairs of the score matrix count, and how a logit is made of a score: one vocabulary for all."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Pairs"]


@dataclass(frozen=True, slots=True)
class Pairs:
    """What is said of the pairs of a matrix, or of a block of it; None where nothing is. Backends apply all of it.

    The members have the same names in ``csrc/include/members.h`` and in ``triton_kernels/launch.py``.
    """

    #: of row i of the whole matrix, column i + diagonal is left out
    diagonal: int | None = None
    #: [N, K] int64 columns of the whole matrix that each row leaves out beside; -1 is no column
    columns: Tensor | None = None
    #: [M] added to the logits of a column, in the dtype of the scores; -inf leaves the column out
    col_bias: Tensor | None = None
    #: [N], [M] int64: pairs of equal ids are left out (of searches)
    row_ids: Tensor | None = None
    col_ids: Tensor | None = None
    #: where this block begins in the whole matrix
    first_row: int = 0
    first_column: int = 0

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
        )
