"""The positive pairs' own part, of size N D: where they lie, their dot products, and what they add to the gradients."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Positives"]


@dataclass(frozen=True, slots=True)
class Positives:
    """Where the positive of each row lies: at ``row + offset``, at ``index[row]`` (-1: in no column), or nowhere."""

    offset: int | None = None
    #: int64 [N]
    index: Tensor | None = None

    @property
    def exist(self) -> bool:
        """Whether any row has a positive."""
        return self.offset is not None or self.index is not None

    def select(self, y: Tensor, rows: slice) -> Tensor:
        """The positives of these rows, [rows, D]; any row of y where there is none."""
        if self.index is None:
            return y[self._shifted(rows)]
        return y[self.index[rows].clamp(min=0)]

    def band(self, rows: slice) -> Positives:
        """Those of some rows, which count from 0."""
        if self.index is not None:
            return Positives(index=self.index[rows])
        return Positives(None if self.offset is None else self.offset + rows.start)

    def coefficients(self, values: Tensor) -> Tensor:
        """values [N], with 0 where a row has no positive."""
        return values if self.index is None else values.masked_fill(self.index < 0, 0.0)

    def add_to(self, sums: Tensor, rows: slice, block: Tensor, values: Tensor) -> None:
        """sums[p(i)] += values_i * block_i for these rows; the same order of additions in every run."""
        if self.index is None:
            sums[self._shifted(rows)].addcmul_(block, values[:, None])
            return
        index, product = self.index[rows].clamp(min=0), block * values[:, None]
        if sums.device.type == "cpu":
            sums.index_add_(0, index, product)
        else:  # index_add_ on a GPU adds in no fixed order
            sums.index_put_((index,), product, accumulate=True)

    def _shifted(self, rows: slice) -> slice:
        offset = self.offset or 0
        return slice(rows.start + offset, rows.stop + offset)
