"""Losses by labels of a small matrix that no backend has in one call: all scores at once, with their gradients.

Overhead dominates there: a few operations of torch on all scores take less than two passes over panels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..engine import strategy
from ..panels.panel import present
from .parts import whole_gradients, whole_scores
from .shared import Call, Outputs

__all__ = ["in_one_go", "inside", "of_pairs", "value_and_gradients"]


class Scores(NamedTuple):
    """All of them [N, M], the logits with -inf for a row's own column, and which pairs are positives."""

    scores: Tensor
    z: Tensor
    alike: Tensor


class Found(NamedTuple):
    """The rows' losses [N], and the weights dL/dz [N, M] of their sum with these gains."""

    losses: Tensor
    w: Tensor


def in_one_go(call: Call) -> bool:
    """Whether a sum's matrix is as small as one call of the backend takes; twice as much is made of it."""
    problem, reduction = call.problem, call.settings[0]
    rows, cols = problem.x.shape[0], problem.y.shape[0]
    return reduction != "none" and strategy.fits_one_call(problem.backend(), rows, cols, problem.workspace_bytes // 2)


def value_and_gradients(call: Call, function: Callable[..., Found]) -> Outputs:
    """The sum of the rows' losses; dx, dy, dscale, dbias as far as they are wanted. `function`: one of those below."""
    problem, (gain, *rest) = call.problem, map(present, call.extras)
    whole = whole_scores(problem)
    scores = whole.scores
    alike = present(problem.pairs.alike(slice(None)))
    z = scores * problem.scale
    if not isinstance(problem.bias, float) or problem.bias:
        z += problem.bias
    if problem.symmetric:
        alike.fill_diagonal_(False)
        z.fill_diagonal_(-torch.inf)
    losses, w = function(Scores(scores, z, alike), gain, *rest)
    value = (gain * losses).sum()
    if True not in call.needs:
        return value, *(None,) * 4
    sums = [0.0, 0.0]
    if call.wants[2]:  # a row's weights sum to 0: a center near the scores keeps digits
        center = torch.where(alike, scores, 0.0).sum() / alike.sum().clamp(min=1)
        sums = [v.sum(dtype=torch.float64).item() for v in (w * (scores - center), w)]
    w *= problem.scale
    if problem.symmetric:
        w = w + w.T
    return value, *whole_gradients(call, whole._replace(scores=w), *sums)


def inside(given: Scores, gain: Tensor, share: Tensor) -> Found:
    """softplus(n_i - m_i) + log k_i."""
    z, alike = given.z, given.alike
    of_others, of_alike = (_exponentials(z.masked_fill(out, -torch.inf)) for out in (alike, ~alike))
    margin = (of_others[0] - of_alike[0]) + (of_others[1].log() - of_alike[1].log())
    losses = -logsigmoid(-margin) - share.masked_fill(share == 0, 1.0).log()
    softmax = (gain * torch.sigmoid(margin)).masked_fill(share == 0, 0.0)
    w = of_others[2].mul_(_quotient(softmax, of_others[1])[:, None])
    return Found(
        losses.masked_fill(share == 0, 0.0), w.sub_(of_alike[2].mul_(_quotient(softmax, of_alike[1])[:, None]))
    )


def of_pairs(given: Scores, gain: Tensor) -> Found:
    """The sum over p of softplus(n_i - z_ip)."""
    z, alike = given.z, given.alike
    shift, total, e = _exponentials(z.masked_fill(alike, -torch.inf))
    margins = ((shift[:, None] - z) + total.log()[:, None]).masked_fill_(~alike, -torch.inf)
    sigmoids = torch.sigmoid(margins)
    w = e.mul_(_quotient(gain * sigmoids.sum(1), total)[:, None])
    return Found(-logsigmoid(-margins).sum(1), w.sub_(sigmoids.mul_(gain[:, None])))


def _exponentials(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of rows: a finite maximum [N], the sum of exponentials against it [N], and these [N, M]."""
    highest = z.amax(1)
    shift = highest.masked_fill(highest == -torch.inf, 0.0)
    e = torch.exp(z - shift[:, None])
    return shift, e.sum(1), e


def _quotient(gain: Tensor, total: Tensor) -> Tensor:
    """gain / total [N]; 0 of nothing."""
    return (gain / total).masked_fill(total == 0, 0.0)
