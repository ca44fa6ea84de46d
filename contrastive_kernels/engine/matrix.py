"""One score matrix z = scale * x yT + bias: as a problem, as a call of a primitive, and as the driver walks it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..arguments.options import DEFAULT_ENGINE, Engine
from ..backends import Backend, Entries
from ..panels.pairs import EVERY_PAIR, Pairs
from ..panels.panel import in_pieces
from ..panels.size import Size, multiprocessors, score_dtype, workspace_for
from ..panels.terms import PairTerm

__all__ = ["COL_BIAS", "PROBLEM_TENSORS", "Call", "Outputs", "Positives", "Problem", "ScoreMatrix"]


@dataclass(frozen=True, slots=True)
class Positives:
    """Where the positive of each row lies: at ``row + offset``, at ``index[row]`` (-1: in no column), or nowhere."""

    offset: int | None = None
    #: int64 [N]
    index: Tensor | None = None
    #: int64 [N, P] columns that are no negatives of the row, the positive's among them; None: that one alone
    left_out: Tensor | None = None

    @classmethod
    def of(cls, offset: int | None, index: Tensor | None) -> Positives:
        """From an index [N], or [N, P] the first of which counts and all of which are left out."""
        if index is None or index.dim() == 1:
            return cls(offset, index)
        return cls(None, index[:, 0].contiguous(), index)

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
            return Positives(None, self.index[rows], None if self.left_out is None else self.left_out[rows])
        return Positives(None if self.offset is None else self.offset + rows.start)

    def columns(self, rows: int) -> slice | Tensor:
        """Where the rows' positives lie; the last column stands for that of a row without one."""
        return self._shifted(slice(0, rows)) if self.index is None else self.index

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

    def entries(self, values: Tensor | None) -> Entries | None:
        """values [N], if there are any, as the positives' entries of a matrix of all pairs."""
        return None if values is None else Entries(values, self.index, self.offset or 0)

    def turned_entries(self, values: Tensor | None, first: int = 0) -> Entries | None:
        """... of its transpose, from this row on."""
        if values is None:
            return None
        index = self.index if self.index is None or not first else self.index - first
        return Entries(values, index, (self.offset or 0) - first, True)

    def add_values(self, sums: Tensor, values: Tensor) -> None:
        """sums[p(i)] += values_i [N] in one order, for the rows that have a positive."""
        if self.index is None:
            sums[self._shifted(slice(0, len(values)))] += values
        elif sums.device.type == "cpu":
            sums.index_add_(0, self.index.clamp(min=0), self.coefficients(values))
        else:
            sums.index_put_((self.index.clamp(min=0),), self.coefficients(values), accumulate=True)

    def _shifted(self, rows: slice) -> slice:
        offset = self.offset or 0
        return slice(rows.start + offset, rows.stop + offset)


@dataclass(slots=True)
class Problem:
    """One score matrix z = scale * x yT + bias, which of its pairs count, and who computes it.

    What is said of pairs joins `Pairs`, any other tensor `tensors`; operators, autograd and the driver take it from
    there. Nobody writes to one, but it is not frozen: that would triple the time of making it.
    """

    #: [N, D], [M, D] of one dtype and device
    x: Tensor
    y: Tensor
    #: numbers, or tensors of one element on the same device
    scale: Tensor | float
    bias: Tensor | float = 0.0
    #: the positive of row i is column i + offset, or index[i] (int64 [N], -1: no column), or there is none; where
    #: both are given, the index counts. Of a symmetric matrix it is i + offset modulo N, and `with_index` makes
    #: the index for who wants it. An index [N, P] gives rows several, of whom the softmax losses of single rows take
    #: the first and leave out all
    offset: int | None = None
    index: Tensor | None = None
    #: y is x, and no row is its own negative
    symmetric: bool = False
    #: what is said of the pairs beside
    pairs: Pairs = EVERY_PAIR
    engine: Engine = DEFAULT_ENGINE

    def tensors(self) -> tuple[Any, ...]:
        """What autograd sees. (A number in a tensor's place stays one.)"""
        return self.x, self.y, self.scale, self.bias, self.index, *self.pairs.tensors

    def statics(self) -> tuple[Any, ...]:
        """The rest, but for the offset, which may be symbolic; printable."""
        return self.symmetric, self.engine.backend, self.engine.workspace_bytes

    @classmethod
    def of(cls, tensors: tuple[Any, ...], offset: int | None, statics: tuple[Any, ...]) -> Problem:
        """The problem of these tensors and statics."""
        x, y, scale, bias, index, *of_pairs = tensors
        symmetric, backend, workspace_bytes = statics
        engine = Engine(backend, workspace_bytes)
        return cls(x, y, scale, bias, offset, index, symmetric, Pairs.of(of_pairs), engine)

    def with_numbers_as_tensors(self) -> Problem:
        """The same with scale and bias as 0-d tensors, which operators want."""
        scale, bias = (
            v if isinstance(v, Tensor) else torch.full((), v, dtype=score_dtype(self.x.dtype), device=self.x.device)
            for v in (self.scale, self.bias)
        )
        return replace(self, scale=scale, bias=bias)

    @property
    def lacks_index(self) -> bool:
        """Whether its positives are known by an offset modulo N alone."""
        return self.symmetric and self.index is None and self.offset is not None

    def with_index(self) -> Problem:
        """The same with an index where it lacks one."""
        if not self.lacks_index or self.offset is None:
            return self
        rows = torch.arange(self.x.shape[0], dtype=torch.int64, device=self.x.device)
        return replace(self, index=rows.roll(-self.offset))

    def backend(self) -> Backend:
        """Who computes it."""
        return backends.choose(self.engine.backend or None, self.x.device, self.x.dtype)

    @property
    def workspace_bytes(self) -> int:
        """Bound of the memory that holds panels of scores."""
        return workspace_for(self.x.device, self.engine.workspace_bytes)

    @property
    def positives(self) -> Positives:
        """Where they lie."""
        return Positives.of(self.offset, self.index)

    def params(self) -> Tensor:
        """(scale, bias, 0) [3] on the device, in the dtype of the scores: the last is the center of the scores."""
        dtype, device = score_dtype(self.x.dtype), self.x.device
        values = (self.scale, self.bias, 0.0)
        if device.type == "cpu":  # where reading a tensor waits for nobody
            return torch.tensor([v.item() if isinstance(v, Tensor) else v for v in values], dtype=dtype, device=device)
        return torch.stack(
            [
                v.detach().reshape(()).to(dtype)
                if isinstance(v, Tensor)
                else torch.full((), v, dtype=dtype, device=device)
                for v in values
            ]
        )

    def size(self) -> Size:
        """What a strategy depends on."""
        x, y = self.x, self.y
        return Size(
            x.shape[0], y.shape[0], x.shape[1], x.dtype, x.device, self.symmetric, self.workspace_bytes,
            multiprocessors(x.device), guide=self.pairs.guide_features,
        )  # fmt: skip


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
    #: what is said of the pairs beside
    pairs: Pairs = EVERY_PAIR
    #: the gradients' dtype, if it is not the operands'
    gradient_dtype: torch.dtype | None = None
    #: [N, M] the whole matrix of dot products, where it is small and was kept
    scores: Tensor | None = None
    #: a second CUDA stream makes the weights of the next panel while this one's are multiplied; for measurements, with
    #: the triton backend
    overlap: bool = False
    #: a band of rows: its scores serve one statistics pass, and then hold the weights
    is_band: bool = False
    #: ... or it is the weights' room, beside these float32: the backend keeps what it likes in both
    scratch: Tensor | None = None
    #: [N, M] a guide's dot products, as `scores` of a band
    guide: Tensor | None = None
    #: [N] the positives' dot products, where the backend has made them together with the parameters
    dots: Tensor | None = None

    @classmethod
    def of(
        cls,
        problem: Problem,
        term: PairTerm,
        backend: Backend,
        gradient_dtype: torch.dtype | None = None,
        scores: Tensor | None = None,
        *,
        centered: bool = False,
        params: Tensor | None = None,
    ) -> ScoreMatrix:
        """A problem's matrix; `centered`: a backend that makes the dot products gives params their center too."""
        x = problem.x.contiguous()
        y = x if problem.symmetric else problem.y.contiguous()
        dots = None
        if params is None and backend.vectors and problem.positives.exist and x.shape[0] and y.shape[0]:
            own = problem.positives
            dots, params = backend.positive_dots(x, y, own.index, own.offset, problem, centered)
        elif params is None:
            params = problem.params()
        if backend.vectors:
            y = backend.operand(y)
            x = y if problem.symmetric else backend.operand(x)
        return cls(
            term, x, y, params, problem.positives, backend, problem.workspace_bytes,
            problem.symmetric, problem.pairs, gradient_dtype, scores, dots=dots,
        )  # fmt: skip

    @property
    def by_kernels(self) -> bool:
        """Whether the backend does what surrounds the panels."""
        return self.backend.vectors and not self.is_band and self.x.shape[0] > 0 and self.y.shape[0] > 0

    def band(
        self, rows: slice, scores: Tensor, scratch: Tensor | None = None, guide: Tensor | None = None
    ) -> ScoreMatrix:
        """Some rows of a matrix that leaves out positives alone, with room for their scores, or exponentials."""
        return replace(
            self,
            x=self.x[rows],
            positives=self.positives.band(rows),
            pairs=self.pairs.of_rows(rows),
            scores=scores[: rows.stop - rows.start],
            is_band=True,
            scratch=scratch,
            guide=None if guide is None else guide[: rows.stop - rows.start],
        )

    def negatives(self) -> Pairs:
        """The pairs without the positives and, of a symmetric matrix, every row's own column."""
        index, left_out = self.positives.index, self.positives.left_out
        diagonal = 0 if self.symmetric else self.positives.offset
        if left_out is None and index is not None:
            left_out = index[:, None]
        return self.pairs.leaving_out(diagonal, left_out)

    def size(self) -> Size:
        """What the shape of the panels depends on."""
        x, y = self.x, self.y
        return Size(
            x.shape[0], y.shape[0], x.shape[1], x.dtype, x.device, self.symmetric, self.workspace_bytes,
            multiprocessors(x.device), self.backend.native_operands and in_pieces(x) and in_pieces(y),
            2 if self.overlap else 1, self.is_band, self.pairs.capped, self.pairs.guide_features,
        )  # fmt: skip


Outputs = tuple[Any, ...]


#: Tensors that a problem itself has: x, y, scale, bias, index, and those of its pairs.
PROBLEM_TENSORS = 5 + len(EVERY_PAIR.tensors)
#: The place of the columns' biases among them.
COL_BIAS = 5


@dataclass(slots=True)  # frozen ones take three times as long to make
class Call:
    """One call of a primitive: the problem, the tensors beside it, its settings, and which tensors want gradients."""

    problem: Problem
    extras: tuple[Tensor | None, ...]
    settings: tuple[Any, ...]
    needs: tuple[bool, ...]
    #: rows and columns whose gradients alone are wanted; a pass may make all
    own: tuple[slice, slice] | None = None

    @property
    def tensors(self) -> tuple[Any, ...]:
        """All of them, the problem's first."""
        return (*self.problem.tensors(), *self.extras)

    @property
    def statics(self) -> tuple[Any, ...]:
        """All that is no tensor, but for the offset."""
        return self.problem.statics(), self.settings, self.needs

    @classmethod
    def of(cls, tensors: Sequence[Any], offset: int | None, statics: tuple[Any, ...]) -> Call:
        """The call of these tensors and statics."""
        of_problem, settings, needs = statics
        problem = Problem.of(tuple(tensors[:PROBLEM_TENSORS]), offset, of_problem)
        return cls(problem, tuple(tensors[PROBLEM_TENSORS:]), settings, needs)

    @property
    def wants(self) -> tuple[bool, bool, bool]:
        """Whether gradients of x, of y, and of scale or bias are wanted."""
        return self.needs[0], self.needs[1], self.needs[2] or self.needs[3]
