"""What is streamed: one score matrix, never stored whole, what it leaves out, and how it is walked."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .backends import Backend
from .specs import PairTerm

__all__ = ["Positives", "Stream", "score_dtype"]


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores, statistics and values for operands of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Positives:
    """Where the positive of each row lies: at ``row + offset``, at ``index[row]`` (-1: in no column), or nowhere."""

    offset: int | None = None
    index: Tensor | None = None

    @property
    def exist(self) -> bool:
        """Whether any row has a positive."""
        return self.offset is not None or self.index is not None

    def columns(self, rows: Tensor) -> Tensor:
        """The positives' columns [N] for row numbers [N]; -1 in no column."""
        if self.index is not None:
            return self.index
        return torch.full_like(rows, -1) if self.offset is None else rows + self.offset

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


@dataclass(frozen=True)
class Stream:
    """One score matrix z = scale * x yT + bias, what it leaves out, and how it is walked."""

    term: PairTerm
    #: [N, D], [M, D] contiguous, of one dtype
    x: Tensor
    y: Tensor
    #: [2] scale and bias in the dtype of the scores
    params: Tensor
    positives: Positives
    backend: Backend
    workspace_bytes: int
    #: the gradients' dtype, if it is not the operands'
    gradient_dtype: torch.dtype | None = None
    #: [N, M] the whole matrix of dot products, where it is small and was kept
    scores: Tensor | None = None
    #: y is x, and no row is its own negative: panels above the diagonal serve their mirror images too
    symmetric: bool = False
    #: a second CUDA stream makes the weights of the next panel while this one's are multiplied; for measurements, with
    #: the triton backend
    overlap: bool = False
    #: a band of rows: its scores serve one reduction, and then hold the weights
    is_band: bool = False

    def band(self, rows: slice, scores: Tensor) -> Stream:
        """Some rows of a matrix that leaves out positives alone, with room for their scores."""
        return replace(
            self,
            x=self.x[rows],
            positives=self.positives.band(rows),
            scores=scores[: rows.stop - rows.start],
            is_band=True,
        )

    def exclude(self) -> Tensor:
        """Columns left out of each row, [N, K]."""
        n, offset = self.x.shape[0], self.positives.offset
        if offset is not None and not self.symmetric:
            return torch.arange(offset, offset + n, device=self.x.device)[:, None]
        rows = torch.arange(n, device=self.x.device)
        if self.symmetric:
            return torch.stack([self.positives.columns(rows), rows], 1)
        return self.positives.columns(rows)[:, None] if self.positives.exist else rows[:, None][:, :0]
