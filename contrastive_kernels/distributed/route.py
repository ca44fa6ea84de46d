"""How the rows of the ranks meet: what every strategy gives, in terms of a rank's own rows alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..engine.driver import gradient_pass, neutral_state, statistics_pass
from ..engine.gradients import Wanted
from ..engine.matrix import Problem, ScoreMatrix
from ..panels.pairs import Pairs
from ..panels.panel import Side
from ..panels.size import BAND_SHARE, score_dtype
from ..panels.terms import PairTerm
from .group import Sizes

__all__ = ["Block", "Made", "Own", "Route", "merged"]


@dataclass(frozen=True)
class Own:
    """What a rank brings: its rows x [n, D], its columns y [m, D], and what is said of their pairs."""

    #: y is x where `mirrored`; the positives count among the rank's own columns
    problem: Problem
    term: PairTerm
    #: y is x, and every row of the global matrix is a column too
    mirrored: bool = False

    def excluded(self) -> Tensor | None:
        """The rank's own columns that each of its rows leaves out [n, K]: the positive, and itself; -1 is none."""
        problem, n = self.problem, len(self.problem.x)
        columns = []
        here = torch.arange(n, dtype=torch.int64, device=problem.x.device)
        if problem.index is not None:
            columns.append(problem.index)
        elif problem.offset is not None:
            columns.append(here + problem.offset)
        if self.mirrored:
            columns.append(here)
        return torch.stack(columns, 1) if columns else None


@dataclass
class Made:
    """Of a rank's own rows and columns; None where it is not wanted."""

    #: [n, D], [m, D] in the dtype of the scores, without the positive pairs
    dx: Tensor | None
    dy: Tensor | None
    #: [2] this rank's share of dL/d(scale, bias), in float64
    dparams: Tensor | None
    #: [state_rows, n], [state_rows, m] over the whole matrix, where they were folded
    row: Tensor | None = None
    col: Tensor | None = None
    #: of further tensors that a loss is given
    extras: tuple[Tensor | None, ...] = ()

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Of x, y, scale, bias and the further ones."""
        return (self.dx, self.dy, *((None, None) if self.dparams is None else self.dparams), *self.extras)


class Block:
    """A block of the global matrix as a rank computes it: some rows against some columns.

    Parameters
    ----------
    own : Own
        What the rank brings.
    x, y : Tensor
        The block's rows and columns.
    pairs : Pairs
        What is said of its pairs, those left out included.
    keeps : bool
        Scores that fit a quarter of the workspace are kept from the statistics pass to the gradient pass.
    """

    def __init__(self, own: Own, x: Tensor, y: Tensor, pairs: Pairs, *, keeps: bool) -> None:
        problem = replace(own.problem, x=x, y=y, offset=None, index=None, symmetric=False, pairs=pairs)
        backend, dtype = problem.backend(), score_dtype(x.dtype)
        self._term, self._problem, self._scores = own.term, problem, None
        scores = len(x) * len(y) * dtype.itemsize
        if keeps and backend.score_tile and 0 < scores <= problem.workspace_bytes // BAND_SHARE:
            self._scores = torch.empty(len(x), len(y), dtype=dtype, device=x.device)
        self._made = False

    def _matrix(self, params: Tensor | None) -> ScoreMatrix:
        problem, dtype = self._problem, score_dtype(self._problem.x.dtype)
        return ScoreMatrix.of(problem, self._term, problem.backend(), dtype, self._scores, params=params)

    def statistics(self, params: Tensor, *, cols: bool) -> tuple[Tensor, Tensor | None]:
        """The states of the block's rows and columns."""
        matrix = self._matrix(params)
        if not len(matrix.x) or not len(matrix.y):
            return _neutral(matrix, len(matrix.x)), _neutral(matrix, len(matrix.y)) if cols else None
        found = statistics_pass(matrix, cols=cols)
        self._made = self._scores is not None
        return found

    def gradients(self, params: Tensor, row: Side, col: Side, wanted: Wanted, *, fold: bool) -> Made:
        """The gradients of the pair terms of the block; `fold`: and its states, of sides with gains."""
        matrix = self._matrix(params)
        if not self._made:
            matrix = replace(matrix, scores=None)
        empty = not len(matrix.x) or not len(matrix.y)
        if fold:
            make = _neutral if empty else neutral_state
            row = replace(row, state=make(matrix, len(matrix.x)))
            if col.gain is not None:
                col = replace(col, state=make(matrix, len(matrix.y)))
        if empty:
            dx, dy = (
                v.new_zeros(v.shape, dtype=score_dtype(v.dtype)) if want else None
                for v, want in ((matrix.x, wanted.x), (matrix.y, wanted.y))
            )
            dparams = torch.zeros(2, dtype=torch.float64, device=matrix.x.device) if wanted.params else None
            return Made(dx, dy, dparams, row.state, col.state)
        made = gradient_pass(matrix, row, col, wanted)
        return Made(made.dx, made.dy, made.dparams, row.state, col.state)


def _neutral(matrix: ScoreMatrix, n: int) -> Tensor:
    """The state of nothing, written whatever the backend knows."""
    state = torch.zeros(matrix.term.state_rows, n, dtype=score_dtype(matrix.x.dtype), device=matrix.x.device)
    if matrix.term.has_shift:
        state[0] = -torch.inf
    return state


class Route(ABC):
    """How the ranks' rows meet. Every rank calls the same methods in the same order."""

    def __init__(self, sizes: Sizes) -> None:
        #: what the ranks have agreed on
        self.sizes = sizes
        #: of the rows and of the columns of all ranks, this rank's, where vectors are of all
        self.places = slice(0), slice(0)

    @abstractmethod
    def statistics(self, params: Tensor, *, cols: bool) -> tuple[Tensor, Tensor | None]:
        """The states over the whole matrix of this rank's rows [k, n] and, if wanted, columns [k, m]."""

    @abstractmethod
    def gradients(self, params: Tensor, row: Side, col: Side, wanted: Wanted, *, fold: bool) -> Made:
        """The gradients, given what goes with this rank's rows and columns; `fold`: with the states of both."""

    @abstractmethod
    def total(self, own: Tensor) -> Tensor:
        """The sum over ranks of a few numbers, added in their order."""

    #: whether vectors are of all rows and columns, and not of this rank's alone; gradients are of its own always
    whole = False
    #: whether a rank computes all pairs, as the operators of one process do
    alone = False

    def own(self, vector: Tensor) -> Tensor:
        """Of vectors [..., n], this rank's rows."""
        return vector

    def own_cols(self, vector: Tensor) -> Tensor:
        """Of vectors [..., m], this rank's columns."""
        return vector

    def of_all(self, vector: Tensor) -> Tensor:
        """Of a vector of this rank's rows, those that vectors have here."""
        return vector

    def own_problem(self, problem: Problem) -> Problem:
        """Of the rows and columns that vectors have here, this rank's."""
        return problem


def merged(parts: Tensor, term: PairTerm) -> Tensor:
    """One state [k, n] of several ranks' states of the same rows [ranks, k, n]."""
    if not term.has_shift:
        return parts.sum(0)
    shift = parts[:, 0].amax(0)
    finite = shift.masked_fill(shift == -torch.inf, 0.0)
    return torch.stack([shift, (parts[:, 1] * torch.exp(parts[:, 0] - finite)).sum(0)])
