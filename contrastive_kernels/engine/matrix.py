"""What is walked: one score matrix, never stored whole, what it leaves out, and in which dtypes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..backends import Backend
from ..panels.pairs import Pairs
from ..panels.panel import in_pieces
from ..panels.size import Size
from ..panels.terms import PairTerm
from .positives import Positives
from .problem import Problem
from .shapes import multiprocessors

__all__ = ["ScoreMatrix"]


@dataclass(frozen=True)
class ScoreMatrix:
    """One score matrix z = scale * x yT + bias, as the driver walks it."""

    term: PairTerm
    #: [N, D], [M, D] contiguous, of one dtype
    x: Tensor
    y: Tensor
    #: [3] scale, bias and center in the dtype of the scores
    params: Tensor
    positives: Positives
    backend: Backend
    workspace_bytes: int
    #: y is x, and no row is its own negative: panels above the diagonal serve their mirror images too
    symmetric: bool = False
    #: [M] added to the logits of a column
    col_bias: Tensor | None = None
    #: the gradients' dtype, if it is not the operands'
    gradient_dtype: torch.dtype | None = None
    #: [N, M] the whole matrix of dot products, where it is small and was kept
    scores: Tensor | None = None
    #: a second CUDA stream makes the weights of the next panel while this one's are multiplied; for measurements, with
    #: the triton backend
    overlap: bool = False
    #: a band of rows: its scores serve one statistics pass, and then hold the weights
    is_band: bool = False

    @classmethod
    def of(
        cls,
        problem: Problem,
        term: PairTerm,
        backend: Backend,
        gradient_dtype: torch.dtype | None = None,
        scores: Tensor | None = None,
    ) -> ScoreMatrix:
        """A problem's matrix."""
        x = problem.x.contiguous()
        y = x if problem.symmetric else problem.y.contiguous()
        return cls(
            term, x, y, problem.params(), problem.positives, backend, problem.engine.workspace_bytes,
            problem.symmetric, problem.col_bias, gradient_dtype, scores,
        )  # fmt: skip

    def band(self, rows: slice, scores: Tensor) -> ScoreMatrix:
        """Some rows of a matrix that leaves out positives alone, with room for their scores."""
        return replace(
            self,
            x=self.x[rows],
            positives=self.positives.band(rows),
            scores=scores[: rows.stop - rows.start],
            is_band=True,
        )

    def pairs(self) -> Pairs:
        """What is left out: the positives and, of a symmetric matrix, every row's own column."""
        index = self.positives.index
        diagonal = 0 if self.symmetric else self.positives.offset
        return Pairs(diagonal, None if index is None else index[:, None], self.col_bias)

    def size(self) -> Size:
        """What the shape of the panels depends on."""
        x, y = self.x, self.y
        return Size(
            len(x), len(y), x.shape[1], x.dtype, x.device, self.symmetric, self.workspace_bytes,
            multiprocessors(x.device), self.backend.native_operands and in_pieces(x) and in_pieces(y),
            2 if self.overlap else 1, self.is_band,
        )  # fmt: skip
