"""The softmax losses of a matrix, or of a band of rows, whose scores and weights one call of the backend sees whole."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..backends import Backend
from ..engine.matrix import COL_BIAS, PROBLEM_TENSORS, Positives, Problem
from ..panels.size import blocks, saved_dtype, score_dtype
from .parts import multiply_into, params_of, whole_gradients, whole_scores
from .shared import Call, Outputs

__all__ = ["LIFT", "bands_are_whole", "in_one_call", "in_one_call_a_band"]

#: The place of the lifts among a call's tensors, the last of all.
LIFT = PROBLEM_TENSORS + 1


def in_one_call(call: Call, backend: Backend, gain: Tensor | None, share: float) -> Outputs:
    """A small matrix: the backend gives value and weights in one call; with these gains [N], or the share of all."""
    problem, (_, both, include, _), lift = call.problem, call.settings, call.extras[1]
    whole = whole_scores(problem)
    if problem.index is not None and problem.index.dim() == 2:
        problem = _with_one_positive(problem, problem.positives)
    biases = call.needs[COL_BIAS]
    dlift = None if lift is None else torch.empty_like(lift)
    lifts = None if lift is None or dlift is None else (lift, dlift)
    guide = _guide_of(problem, whole.scores)
    said = (gain, share, both, include, biases, lifts, guide)
    value, *params = backend.softmax_matrix(whole.scores, problem, *said, whole.positive_weights)
    of_biases = _bias_gradients(problem, whole.scores, whole.positive_weights) if biases else None
    found = (*whole_gradients(call, whole, *params), of_biases, dlift if call.needs[LIFT] else None)
    return value, *found, None, None, None, None


def _bias_gradients(problem: Problem, weights: Tensor, of_positives: Tensor | None) -> Tensor:
    """The gradients of the columns' biases [M], from weights that are dL/dz and become scale * dL/dz."""
    found = weights.sum(0)
    weights *= problem.scale
    if of_positives is not None:
        problem.positives.add_values(found, of_positives)
        of_positives *= problem.scale
    return found


def _guide_of(problem: Problem, scores: Tensor) -> Tensor | None:
    """A guide's scores [N, M], if there is one."""
    of_rows, of_cols = problem.pairs.row_guide, problem.pairs.col_guide
    if of_rows is None or of_cols is None:
        return None
    return of_rows.to(scores.dtype).mm(of_cols.to(scores.dtype).t())


def _with_one_positive(problem: Problem, positives: Positives) -> Problem:
    """The problem with these positives, of several of whom the first counts and the others are left out beside it."""
    if positives.left_out is None:
        return replace(problem, index=positives.index)
    return replace(problem, index=positives.index, pairs=problem.pairs._replace(columns=positives.left_out))


def bands_are_whole(call: Call, backend: Backend) -> bool:
    """Whether a band is a matrix of its own that one call of the backend computes: rows depend on no other ones."""
    problem, (_, both, _, smoothing) = call.problem, call.settings
    one_way = not smoothing and not both and not problem.symmetric
    served = problem.x.dtype == torch.float32 or backend.multiplies(problem.x.dtype)
    return backend.whole_matrix and one_way and len(problem.x) > 0 and served


def in_one_call_a_band(call: Call, backend: Backend, rows: int, share: float) -> Outputs:
    """Bands of some rows: the backend gives each one's value and weights in one call."""
    problem, (gain, lift), (want_x, want_y, _) = call.problem, call.extras, call.wants
    x, y, totals = problem.x.contiguous(), problem.y.contiguous(), [0.0, 0.0, 0.0]
    dtype, saved, device = score_dtype(x.dtype), saved_dtype(x.dtype), x.device
    dx = torch.empty(x.shape, dtype=saved, device=device) if want_x else None
    dy = torch.empty(y.shape, dtype=dtype, device=device) if want_y else None
    scores = torch.empty(min(rows, len(x)), len(y), dtype=dtype, device=device)
    of_cols, guide = problem.pairs.col_guide, None
    room = None if of_cols is None else torch.empty_like(scores)
    dlift = None if lift is None else torch.empty_like(lift)
    of_biases = torch.zeros(len(y), dtype=dtype, device=device) if call.needs[COL_BIAS] else None
    rounds = x.dtype != dtype
    multiply = backend.multiply if rounds else multiply_into
    for i in blocks(len(x), rows):
        weights, positives = scores[: i.stop - i.start], problem.positives.band(i)
        of_positives = weights.new_empty(len(weights)) if rounds else None
        multiply(x[i], y.T, weights)
        band = _with_one_positive(
            replace(problem, x=x[i], y=y, offset=positives.offset, pairs=problem.pairs.of_rows(i)), positives
        )
        of_guide = band.pairs.row_guide
        if of_guide is not None and of_cols is not None and room is not None:
            guide = torch.mm(of_guide.to(dtype), of_cols.to(dtype).T, out=room[: i.stop - i.start])
        of_rows, lifts = None if gain is None else gain[i], None
        if lift is not None and dlift is not None:
            lifts = lift[i], dlift[i]
        said = (of_rows, share, False, call.settings[2], of_biases is not None, lifts, guide)
        value, *params = backend.softmax_matrix(weights, band, *said, of_positives)
        totals = [total + part for total, part in zip(totals, (value.item(), *params))]
        if of_biases is not None:
            of_biases += _bias_gradients(band, weights, of_positives)
        if dx is not None:
            multiply(weights, y, dx[i], False, positives.entries(of_positives))
        if dy is not None:
            multiply(weights.T, x[i], dy, i.start > 0, positives.turned_entries(of_positives))
    found = torch.tensor(totals, dtype=torch.float64, device=device)
    made = (
        dx,
        None if dy is None else dy.to(saved),
        *params_of(call, found[1:]),
        of_biases,
        dlift if call.needs[LIFT] else None,
    )
    return found[0].to(dtype), *made, None, None, None, None
