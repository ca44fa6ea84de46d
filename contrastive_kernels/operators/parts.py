"""What the operators' passes have in common: small matrices whole, gradients in their tensors' dtypes and shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import Entries
from ..engine.gradients import Gradients, Wanted
from ..engine.matrix import COL_BIAS, Problem, ScoreMatrix
from ..panels.size import number, saved_dtype
from .shared import Call, Outputs, Primitive, like

__all__ = [
    "WholeScores",
    "add_positive_params",
    "bounded_ceilings",
    "gradients_of",
    "multiply_into",
    "params_of",
    "part_of",
    "wanted_of",
    "whole_gradients",
    "whole_scores",
    "with_gradients",
]


def gradients_of(call: Call, made: Gradients) -> Outputs:
    """What a gradient pass made, as gradients of the call's tensors."""
    dscale, dbias = (None, None) if made.dparams is None else made.dparams
    found = [made.dx, made.dy, dscale, dbias, *[None] * (len(call.needs) - 4)]
    found[COL_BIAS] = made.dcandidates
    wanted = zip(found, call.tensors, call.needs)
    return tuple([like(g, t) if need and g is not None else None for g, t, need in wanted])


def params_of(call: Call, dparams: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """dL/dscale and dL/dbias, as far as they are wanted, of their sums [2]."""
    if dparams is None:
        return None, None
    dscale, dbias = dparams.unbind()
    return dscale if call.needs[2] else None, dbias if call.needs[3] else None


class WholeScores(NamedTuple):
    """Both operands as their products take them, in the dtype of the scores or as they are, and all scores [N, M].

    A backend's one call puts the weights in the scores' place.
    """

    x: Tensor
    y: Tensor
    scores: Tensor
    #: room for the positives' weights [N], where products would round them
    positive_weights: Tensor | None = None


def whole_scores(problem: Problem) -> WholeScores:
    """The scores of a small matrix."""
    x, y = problem.x, problem.y
    if x.dtype.itemsize == 2:
        backend = problem.backend()
        if backend.multiplies(x.dtype):
            scores = torch.empty(x.shape[0], y.shape[0], dtype=torch.float32, device=x.device)
            backend.multiply(x, y.t(), scores)
            return WholeScores(x, y, scores, scores.new_empty(x.shape[0]) if problem.positives.exist else None)
        x = x.float()
        y = x if problem.symmetric else y.float()
    return WholeScores(x, y, x.mm(y.t()))


def whole_gradients(
    call: Call, whole: WholeScores, dscale: float, dbias: float
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dy, dscale, dbias, as far as they are wanted, from the weights of all pairs.

    Of a call's own rows and columns alone, if it has any. A product that rounds weights to 16 bits has those of the
    positives beside, each as large as all others of its row: rounded, their sum would not be 0.
    """
    (x, y, weights, of_positives), (want_x, want_y, want_scale, want_bias) = whole, call.needs[:4]
    params = number(weights, dscale) if want_scale else None, number(weights, dbias) if want_bias else None
    of_rows, of_cols, own = weights, weights.t(), call.own
    if own is not None:  # (a slice of all takes as long as a small product)
        of_rows, of_cols = of_rows[own[0]], of_cols[own[1]]
    saved = saved_dtype(call.problem.x.dtype)
    if x.dtype == weights.dtype:
        dx, dy = of_rows.mm(y) if want_x else None, of_cols.mm(x) if want_y else None
        if saved != weights.dtype:
            dx, dy = (None if g is None else g.to(saved) for g in (dx, dy))
        return dx, dy, *params
    multiply, positives = call.problem.backend().multiply, call.problem.positives
    entries, turned = (
        positives.entries(of_positives),
        positives.turned_entries(of_positives, own[1].start if own else 0),
    )
    if own is not None and of_positives is not None:
        entries = positives.band(own[0]).entries(of_positives[own[0]])
    dx = dy = None
    if want_x:
        dx = weights.new_empty(len(of_rows), y.shape[1], dtype=saved)
        multiply(of_rows, y, dx, entries=entries)
    if want_y:
        dy = weights.new_empty(len(of_cols), x.shape[1], dtype=saved)
        multiply(of_cols, x, dy, entries=turned)
    return dx, dy, *params


def multiply_into(x: Tensor, y: Tensor, out: Tensor, add: bool = False, entries: Entries | None = None) -> None:
    """out (+)= x y by torch, as a backend's own product is called; it rounds nothing, and so takes no entries."""
    torch.addmm(out, x, y, out=out) if add else torch.mm(x, y, out=out)


def wanted_of(call: Call) -> Wanted:
    """Which gradients a pass makes."""
    return Wanted(*call.wants, call.needs[COL_BIAS])


def bounded_ceilings(problem: Problem, row: Tensor | None, col: Tensor | None) -> Problem:
    """The problem of a gradient pass that follows its statistics, the normalisers [2, N], [2, M] as two numbers.

    A pass may make a score, or a guide's, with other last digits than the one before: a pair that was above its ceiling
    there, and is not here, might weigh anything where all others are far below. None that counted lies above its
    normaliser.
    """
    pairs = problem.pairs
    if not pairs.capped:
        return problem
    lowest = pairs.least_added()  # which does not count for ceilings

    def bounded(ceiling: Tensor | None, threshold: Tensor | None, normalizer: Tensor | None) -> Tensor | None:
        if (ceiling is None and threshold is None) or normalizer is None:
            return ceiling
        shift, rest = normalizer
        room = 1 + 4 * torch.finfo(shift.dtype).eps * shift.abs()
        bound = (shift - lowest) + (rest + room)
        return bound if ceiling is None else torch.minimum(ceiling, bound)

    of_rows = bounded(pairs.row_ceiling, pairs.row_threshold, row)
    of_cols = bounded(pairs.col_ceiling, pairs.col_threshold, row if problem.symmetric else col)
    return replace(problem, pairs=pairs._replace(row_ceiling=of_rows, col_ceiling=of_cols))


def add_positive_params(matrix: ScoreMatrix, made: Gradients, dz_pos: Tensor, dots: Tensor) -> None:
    """The positive pairs' part of the gradients of scale, bias and the columns' biases."""
    if made.dcandidates is not None:
        matrix.positives.add_values(made.dcandidates, dz_pos)
    if made.dparams is not None:
        made.dparams[0] += (dz_pos * (dots - matrix.params[2])).sum(dtype=made.dparams.dtype)
        made.dparams[1] += dz_pos.sum(dtype=made.dparams.dtype)


def with_gradients(
    primitive: Primitive,
    problem: Problem,
    extras: tuple[Tensor | None, ...],
    settings: tuple[Any, ...],
    needs: Sequence[bool],
    own: tuple[slice, slice],
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """A primitive's one result, a number, and its gradients by the first tensors that want them, without autograd.

    `own`: the rows of x, and of y, whose gradients alone are wanted.
    """
    rest = [False] * (len(problem.tensors()) + len(extras) - len(needs))
    call = Call(problem, extras, settings, (*needs, *rest), own)
    value, *kept = primitive.forward(call)
    found: list[Tensor | None] = [None] * len(call.needs)
    if primitive.comes_with_value(tuple(kept), call.needs):
        for place, g in zip(primitive.made, kept):
            found[place] = g
    elif True in needs:
        found[:] = primitive.backward(call, tuple(kept), (torch.ones_like(value),))
    found[:2] = [part_of(g, place) for g, place in zip(found, own)]
    return value, tuple(found[: len(needs)])


def part_of(gradient: Tensor | None, place: slice) -> Tensor | None:
    """These rows of a gradient, which need not keep the others alive; itself where it has no others."""
    if gradient is None or gradient.shape[0] == place.stop - place.start:
        return gradient
    return gradient[place].clone()
