"""The rules: what a rank makes of the statistics of its own rows, loss by loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..engine.driver import log_sums, normalizer_of, positive_dots, positive_logits, softmax_side
from ..engine.gradients import Wanted
from ..engine.matrix import Problem, ScoreMatrix
from ..operators.parts import with_gradients
from ..operators.sigmoid_loss import sigmoid_losses
from ..operators.softmax_loss import row_losses, row_softmax, softmax_losses
from ..operators.weighted_sum import two_sum
from ..panels.panel import Side
from ..panels.size import blocks, score_dtype
from ..panels.terms import EXPONENTIAL, SIGMOID, PairTerm
from .route import Made, Route

__all__ = ["LogSumExp", "Ratio", "Rule", "Sigmoid", "Softmax"]

#: A loss, and its gradients by x, y, scale and bias; None of those that are not wanted.
Alone = tuple[Tensor, tuple[Tensor | None, ...]]

#: Rows of which copies in the dtype of the scores are made at a time.
_ROWS = 1024


@dataclass
class Kept:
    """What the values of a loss leave for its gradients."""

    #: [n] the positives' dot products and logits, [3] scale, bias and center
    dots: Tensor
    z_pos: Tensor
    params: Tensor
    #: [2, n], [2, m] normalisers of this rank's rows and columns
    row: Tensor | None = None
    col: Tensor | None = None


class Rule(ABC):
    """One loss, in terms of a rank's own rows."""

    term: PairTerm
    #: y is x
    mirrored = False
    #: the positives of all rows lie on the diagonal
    diagonal = False
    #: tensors beside features, scale and bias that may want gradients
    extras: tuple[Tensor, ...] = ()

    def start(self, route: Route, problem: Problem, *, centered: bool) -> Kept:
        """The positives of this rank's rows; `centered`: rows' weights sum to 0 with the positive's."""
        own = ScoreMatrix.of(replace(problem, symmetric=False), self.term, problem.backend())
        if own.positives.exist and len(own.x):
            dots = positive_dots(own)
        else:
            dots = own.params.new_zeros(len(own.x))
        params = own.params.clone()
        if centered:  # the same on all ranks: weights sum to 0 over all of them
            found = route.total(torch.stack([dots.double().sum(), dots.new_ones(()).double() * len(dots)]))
            params[2] = found[0] / found[1].clamp(min=1)
        return Kept(dots, positive_logits(own, dots) if len(own.x) else dots, params)

    def vectors(self) -> list[tuple[Tensor, bool]]:
        """What the loss is told of every row, or (True) of every column."""
        return []

    def of(self, vectors: Sequence[Tensor]) -> Rule:
        """The same loss of other rows and columns, of which that is told."""
        return self

    def alone(self, problem: Problem, gain: Tensor | None, reduction: str, needs: Sequence[bool]) -> Alone | None:
        """The mean or sum as one process computes it, in the fewest calls; None where there is no such operator."""
        return None

    def keep(self, other: Rule, route: Route) -> None:  # noqa: B027 (most losses find nothing beside)
        """Takes over what the same loss of all rows that a route computes has found of these."""

    @abstractmethod
    def losses(self, route: Route, problem: Problem) -> tuple[Tensor, Kept]:
        """The losses of this rank's rows [n]."""

    @abstractmethod
    def gradients(self, route: Route, problem: Problem, kept: Kept, gain: Tensor, wanted: Wanted) -> Made:
        """The gradients of sum_i gain_i loss_i over the rows of all ranks, of what this rank has."""

    def both(self, route: Route, problem: Problem, gain: Tensor, wanted: Wanted) -> tuple[Tensor, Made]:
        """Losses and gradients."""
        losses, kept = self.losses(route, problem)
        return losses, self.gradients(route, problem, kept, gain, wanted)


class Softmax(Rule):
    """softplus(n_i - z_i,p(i)) or, without the positive, n_i - z_i,p(i).

    `both_ways`: its mean with the columns'; `mirrored`: columns are the rows.
    """

    term = EXPONENTIAL

    def __init__(self, *, both_ways: bool = False, mirrored: bool = False, include_positive: bool = True) -> None:
        self.both_ways, self.mirrored, self.include = both_ways, mirrored, include_positive
        self.diagonal = both_ways

    @property
    def about(self) -> tuple[tuple[str, Any], ...]:
        """What all ranks say alike."""
        return (("include_positive", self.include),)

    def losses(self, route: Route, problem: Problem) -> tuple[Tensor, Kept]:
        """The losses of this rank's rows [n]."""
        kept = self.start(route, problem, centered=True)
        row, col = route.statistics(kept.params, cols=self.both_ways)
        kept.row = normalizer_of(row)
        losses = row_losses(kept.row, kept.z_pos, self.include)
        if col is not None:
            kept.col = normalizer_of(col)
            losses = (losses + row_losses(kept.col, kept.z_pos, self.include)) / 2
        return losses, kept

    def alone(self, problem: Problem, gain: Tensor | None, reduction: str, needs: Sequence[bool]) -> Alone | None:
        """The mean or sum as one process computes it."""
        if self.mirrored or (self.both_ways and problem.offset != 0):
            return None
        settings = (reduction, self.both_ways, self.include, "")
        return with_gradients(softmax_losses, problem, (gain, None), settings, needs)

    def gradients(self, route: Route, problem: Problem, kept: Kept, gain: Tensor, wanted: Wanted) -> Made:
        """The gradients of sum_i gain_i loss_i."""
        assert kept.row is not None
        if self.both_ways:
            gain = gain / 2
        row_gain = gain * row_softmax(kept.row, kept.z_pos, self.include)
        row, col, dz_pos = softmax_side(kept.row, row_gain), Side(), -row_gain
        if self.mirrored:
            col = row
        elif kept.col is not None:
            col_gain = gain * row_softmax(kept.col, kept.z_pos, self.include)
            col, dz_pos = softmax_side(kept.col, col_gain), dz_pos - col_gain
        made = route.gradients(kept.params, row, col, wanted, fold=False)
        if self.mirrored and made.dparams is not None:
            made.dparams /= 2  # every pair has been seen from its row and from its column
        _add_positives(made, problem, kept, dz_pos, wanted, mirrored=self.mirrored)
        return made


class LogSumExp(Rule):
    """The log-sum-exp of a row of x against x itself, without its own place."""

    term = EXPONENTIAL
    mirrored = True

    def losses(self, route: Route, problem: Problem) -> tuple[Tensor, Kept]:
        """Those of this rank's rows [n]; -inf where there is no other row."""
        kept = self.start(route, problem, centered=False)
        row, _ = route.statistics(kept.params, cols=False)
        kept.row = normalizer_of(row)
        return log_sums(kept.row), kept

    def gradients(self, route: Route, problem: Problem, kept: Kept, gain: Tensor, wanted: Wanted) -> Made:
        """The gradients of sum_i gain_i loss_i."""
        assert kept.row is not None
        side = softmax_side(kept.row, gain)
        made = route.gradients(kept.params, side, side, wanted, fold=False)
        if made.dparams is not None:
            made.dparams /= 2  # every pair has been seen from its row and from its column
        return made


class Sigmoid(Rule):
    """sum_j softplus(z_ij) over negatives + softplus(-z_i,p(i))."""

    term = SIGMOID
    diagonal = True

    def losses(self, route: Route, problem: Problem) -> tuple[Tensor, Kept]:
        """The losses of this rank's rows [n]."""
        kept = self.start(route, problem, centered=False)
        row, _ = route.statistics(kept.params, cols=False)
        return self._of(row, problem, kept), kept

    def alone(self, problem: Problem, gain: Tensor | None, reduction: str, needs: Sequence[bool]) -> Alone:
        """The mean or sum as one process computes it."""
        return with_gradients(sigmoid_losses, problem, (gain,), (reduction,), needs)

    def _of(self, row: Tensor, problem: Problem, kept: Kept) -> Tensor:
        """The losses, given the sums over the stream [1, n], in which positives by ids are."""
        return row[0] - logsigmoid(kept.z_pos) if problem.positives.exist else row[0]

    def gradients(self, route: Route, problem: Problem, kept: Kept, gain: Tensor, wanted: Wanted) -> Made:
        """The gradients of sum_i gain_i loss_i."""
        made = route.gradients(kept.params, Side(None, None, gain), Side(), wanted, fold=True)
        _add_positives(made, problem, kept, -torch.sigmoid(-kept.z_pos) * gain, wanted)
        return made

    def both(self, route: Route, problem: Problem, gain: Tensor, wanted: Wanted) -> tuple[Tensor, Made]:
        """Losses and gradients in one pass: weights depend on nothing but the pair's own score."""
        kept = self.start(route, problem, centered=False)
        made = self.gradients(route, problem, kept, gain, wanted)
        assert made.row is not None
        return self._of(made.row, problem, kept), made


class Ratio(Rule):
    """sum_j exp(z_ij - given_i) over negatives + constant_i; of two sides, the mean of rows' and columns'.

    Parameters
    ----------
    rests : list of Tensor
        Of this rank's rows [n], and perhaps of its columns: given = the positive's logit + rest.
    logits : list of Tensor, optional
        The positives' logits, as many, differentiable; without them they are the matrix's own.
    constant : Tensor
        Added to the losses [n].
    """

    term = EXPONENTIAL

    def __init__(self, rests: list[Tensor], logits: list[Tensor] | None, constant: Tensor) -> None:
        self.rests, self.constant = rests, constant
        self.extras = tuple(logits or ())
        self.relative = logits is None
        #: what was found on the way: the normalisers (shift, rest) of rows, of columns, and the positives' dot products
        self.normalizers: list[Tensor] = []
        self.dots = constant

    def vectors(self) -> list[tuple[Tensor, bool]]:
        """Rests and logits of rows, and of columns; the constant."""
        sides = [(v, i == 1) for each in (self.rests, self.extras) for i, v in enumerate(each)]
        return [*sides, (self.constant, False)]

    def of(self, vectors: Sequence[Tensor]) -> Ratio:
        """The same loss of other rows and columns."""
        *sides, constant = vectors
        n = len(self.rests)
        return Ratio(sides[:n], None if self.relative else sides[n:], constant)

    def keep(self, other: Any, route: Route) -> None:
        """Takes over normalisers and dot products."""
        self.normalizers = [own(found) for found, own in zip(other.normalizers, (route.own, route.own_cols))]
        self.dots = route.own(other.dots)

    def _given(self, kept: Kept) -> list[Tensor]:
        logits = [kept.z_pos] * len(self.rests) if self.relative else [logit.detach() for logit in self.extras]
        return [torch.stack(two_sum(logit, rest)) for logit, rest in zip(logits, self.rests)]

    def _values(self, states: tuple[Tensor | None, Tensor | None], kept: Kept) -> list[Tensor]:
        """exp(found - given) of rows, and of columns; nothing found gives 0."""
        self.normalizers = [normalizer_of(state) for state in states if state is not None]
        self.dots = kept.dots
        return [
            torch.exp((found[0] - given[0]) + (found[1] - given[1]))
            for found, given in zip(self.normalizers, self._given(kept))
        ]

    def losses(self, route: Route, problem: Problem) -> tuple[Tensor, Kept]:
        """The losses of this rank's rows [n]."""
        kept = self.start(route, problem, centered=self.relative)
        values = self._values(route.statistics(kept.params, cols=len(self.rests) == 2), kept)
        return torch.stack(values).mean(0) + self.constant, kept

    def gradients(self, route: Route, problem: Problem, kept: Kept, gain: Tensor, wanted: Wanted) -> Made:
        """The gradients of sum_i gain_i loss_i."""
        return self._pass(route, problem, kept, gain, wanted)[1]

    def both(self, route: Route, problem: Problem, gain: Tensor, wanted: Wanted) -> tuple[Tensor, Made]:
        """Losses and gradients in one pass: normalisers are known before."""
        kept = self.start(route, problem, centered=self.relative)
        values, made = self._pass(route, problem, kept, gain, wanted)
        return torch.stack(values).mean(0) + self.constant, made

    def _pass(
        self, route: Route, problem: Problem, kept: Kept, gain: Tensor, wanted: Wanted
    ) -> tuple[list[Tensor], Made]:
        given = self._given(kept)
        gain = gain / len(given)
        sides = [Side(None, each, gain) for each in given]
        made = route.gradients(kept.params, sides[0], sides[1] if len(sides) == 2 else Side(), wanted, fold=True)
        values = self._values((made.row, made.col), kept)
        sums = [gain * each.masked_fill(gain == 0, 0.0) for each in values]
        if self.relative:
            _add_positives(made, problem, kept, -torch.stack(sums).sum(0), wanted)
        else:
            made.extras = tuple([-each for each in sums])
        return values, made


def _add_positives(
    made: Made, problem: Problem, kept: Kept, dz_pos: Tensor, wanted: Wanted, *, mirrored: bool = False
) -> None:
    """The positive pairs' part of a rank's gradients: both of a pair are on one rank."""
    positives, n = problem.positives, len(dz_pos)
    if not positives.exist or not n:
        return
    if made.dparams is not None:
        made.dparams[0] += (dz_pos * (kept.dots - kept.params[2])).sum(dtype=made.dparams.dtype)
        made.dparams[1] += dz_pos.sum(dtype=made.dparams.dtype)
    values = positives.coefficients(dz_pos * kept.params[0])
    sums = made.dx if mirrored else made.dy
    dtype = score_dtype(problem.x.dtype)
    for i in blocks(n, _ROWS):
        if made.dx is not None and wanted.x:
            made.dx[i].addcmul_(positives.select(problem.y, i).to(dtype), values[i, None])
        if sums is not None and (wanted.y or mirrored):
            positives.add_to(sums, i, problem.x[i].to(dtype), values[i])
