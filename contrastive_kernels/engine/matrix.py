"""What is streamed: one score matrix, never stored whole, what it leaves out, and how it is walked."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..backends import Backend
from ..panels.terms import PairTerm
from .positives import Positives

__all__ = ["Stream"]


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
