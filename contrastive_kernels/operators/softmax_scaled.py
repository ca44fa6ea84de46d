"""The softmax losses of matching rows and columns with scales of their own, both directions in one walk.

Row i has the logits s_i <x_i, y_j>, column j the logits t_j <x_i, y_j>: one score serves both, with an exponential for
each. The weights of scores are s_i w_ij + t_j v_ij, and their gradients by the scales sums of w_ij and v_ij times
scores, by row and by column. For backends with `scales_by_row`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..backends import Backend
from ..engine import strategy
from ..engine.driver import band_passes, gradient_pass, normalizer_of, positive_dots, softmax_side, statistics_pass
from ..engine.matrix import PROBLEM_TENSORS, Problem, ScoreMatrix
from ..engine.strategy import Place, Strategy
from ..panels.panel import Side, present
from ..panels.size import saved_dtype, score_dtype
from ..panels.terms import EXPONENTIAL
from .parts import bounded_ceilings, wanted_of
from .registration import register
from .second import dense_logits, dense_normalizer
from .shared import Call, Outputs, Primitive, like
from .smoothing import smoothing_of
from .softmax_loss import row_losses, row_softmax

__all__ = ["scaled_softmax_loss"]


def scaled_softmax_loss(
    problem: Problem,
    scales: tuple[Tensor, Tensor],
    gain: Tensor | None,
    reduction: str,
    *,
    include_positive: bool = True,
    smoothing: float = 0.0,
) -> Tensor:
    """The mean of both directions' softmax losses, or their mean or sum over the pairs.

    Parameters
    ----------
    problem : Problem
        A square whose positives lie on the diagonal, with scale 1, in the dtype of the scores.
    scales : pair of Tensor
        Of the rows and of the columns [N], in the dtype of the scores, differentiable.
    gain, reduction, include_positive, smoothing
        As for :func:`.softmax_loss.softmax_loss`.
    """
    share = float(smoothing).hex() if smoothing else ""
    loss: Tensor = scaled_softmax_losses(problem, (gain, *scales), (reduction, include_positive, share))[0]
    return loss


#: The places of the scales among a call's tensors.
_SCALES = PROBLEM_TENSORS + 1, PROBLEM_TENSORS + 2


# ---- what is computed ----


def _strategy(call: Call, find: Callable[..., Strategy] = strategy.remembered) -> tuple[Backend, Strategy]:
    """Who computes it, and how."""
    problem, summed = call.problem, call.settings[0] != "none"
    backend = problem.backend()
    if not backend.scales_by_row or problem.pairs.adds:
        what = "biases" if problem.pairs.adds else f"the backend {backend.name!r}"
        raise RuntimeError(f"contrastive_kernels: scales by row and column reached {what}")
    size, wanted = problem.size(), True in call.needs
    return backend, find(backend, size, whole=True, summed=summed, gradients=wanted, one_call=False)


def _share(call: Call) -> float:
    """What both directions' losses are multiplied by."""
    mean = call.settings[0] == "mean" and call.extras[0] is None
    return 0.5 / max(call.problem.x.shape[0], 1) if mean else 0.5


def _gains(call: Call) -> Tensor:
    """The same of every row [N]."""
    gain, x, share = call.extras[0], call.problem.x, _share(call)
    if gain is None:
        return torch.full((len(x),), share, dtype=score_dtype(x.dtype), device=x.device)
    return gain * share


class _Directions:
    """A matrix with scales: what both directions' losses and weights are made of."""

    def __init__(self, call: Call, backend: Backend, scores: Tensor | None = None, dots: Tensor | None = None) -> None:
        problem, (_, self.include, share) = call.problem, call.settings
        self.scales = present(call.extras[1]), present(call.extras[2])
        by_row, by_col = (scale.contiguous() for scale in self.scales)
        scaled = replace(problem, pairs=problem.pairs._replace(row_scale=by_row, col_scale=by_col))
        self.matrix = ScoreMatrix.of(scaled, EXPONENTIAL, backend, saved_dtype(problem.x.dtype), scores)
        self.dots = positive_dots(self.matrix) if dots is None else dots
        self.matrix.params[2] = self.dots.sum() / max(len(self.dots), 1)
        self.z_pos = [self.dots * scale for scale in self.scales]
        self.smoothings = [
            smoothing_of(float.fromhex(share), problem, scale, z_pos, turned=turned) if share else None
            for scale, z_pos, turned in zip(self.scales, self.z_pos, (False, True))
        ]
        #: the scales' gradients, once sides are there and their pass is done
        self.dscales = [torch.zeros_like(self.dots), torch.zeros_like(self.dots)]

    def losses(self, *normalizers: Tensor) -> Tensor:
        """Of every row and its column [N], from their normalisers."""
        losses = torch.zeros_like(self.dots)
        for normalizer, z_pos, smoothing in zip(normalizers, self.z_pos, self.smoothings):
            losses += row_losses(normalizer, z_pos, self.include)
            if smoothing is not None:
                losses += smoothing.losses
        return losses

    def sides(self, gain: Tensor, *normalizers: Tensor) -> tuple[Side, Side, Tensor]:
        """What rows and columns weigh, and dL/d<x_i, y_i> [N]."""
        sides, coefficients = [], torch.zeros_like(self.dots)
        for k, normalizer in enumerate(normalizers):
            softmax, smoothing = gain * row_softmax(normalizer, self.z_pos[k], self.include), self.smoothings[k]
            side = softmax_side(normalizer, softmax, None if smoothing is None else smoothing.target(gain))
            dz_pos = -softmax if smoothing is None else smoothing.of_positives(gain) - softmax
            side.dscale = self.dscales[k] = dz_pos * (self.dots - self.matrix.params[2])
            coefficients += dz_pos * self.scales[k]
            sides.append(side)
        return sides[0], sides[1], coefficients


def _forward(call: Call) -> Outputs:
    """The loss; gradients, in the order of `_MADE`, where they come with it; or the normalisers, dots and scores."""
    backend, how = _strategy(call)
    x, y, scores, dtype = call.problem.x, call.problem.y, None, score_dtype(call.problem.x.dtype)
    if how.place is Place.KEPT:
        scores = torch.empty(x.shape[0], y.shape[0], dtype=dtype, device=x.device)
    directions, gain, wanted = _Directions(call, backend, scores), _gains(call), True in call.needs
    if how.place is Place.BAND:
        losses = torch.zeros_like(gain)

        def sides(i: slice, row_state: Tensor, col_state: Tensor | None) -> tuple[Side, Side, Tensor]:
            """Of the one band that has all rows."""
            normalizers = normalizer_of(row_state), normalizer_of(present(col_state))
            losses.copy_(directions.losses(*normalizers))
            return directions.sides(gain, *normalizers)

        made = band_passes(directions.matrix, how.rows, sides, wanted_of(call), cols=True)
        dscales = [g if call.needs[place] else None for g, place in zip(directions.dscales, _SCALES)]
        return (gain * losses).sum(), made.dx, made.dy, *dscales, None, None, None, None
    row_state, col_state = statistics_pass(directions.matrix, cols=True)
    normalizers = normalizer_of(row_state), normalizer_of(present(col_state))
    losses = gain * directions.losses(*normalizers)
    value = losses if call.settings[0] == "none" else losses.sum()
    kept = (*normalizers, directions.dots, scores) if wanted else (None,) * 4
    return value, *(None,) * 4, *kept


def _fake(call: Call) -> Outputs:
    """The shapes of what `_forward` returns."""
    _, how = _strategy(call, strategy.choose)
    x, y, dtype, saved = call.problem.x, call.problem.y, score_dtype(call.problem.x.dtype), None
    n, summed = x.shape[0], call.settings[0] != "none"
    value = x.new_empty(() if summed else (n,), dtype=dtype)
    if how.place is Place.BAND:
        saved = saved_dtype(x.dtype)
        shapes = (x.shape, saved), (y.shape, saved), ((n,), dtype), ((n,), dtype)
        wanted = [call.needs[place] for place in _MADE]
        made = [x.new_empty(shape, dtype=kind) if need else None for (shape, kind), need in zip(shapes, wanted)]
        return value, *made, None, None, None, None
    if True not in call.needs:
        return value, *(None,) * 8
    kept = x.new_empty((n, y.shape[0]), dtype=dtype) if how.place is Place.KEPT else None
    normalizers = [x.new_empty((2, n), dtype=dtype) for _ in range(2)]
    return value, *(None,) * 4, *normalizers, x.new_empty(n, dtype=dtype), kept


# ---- autograd ----


def _gradients(call: Call, kept: Outputs, upstream: Outputs) -> Outputs:
    """The gradient pass."""
    *_, row, col, dots, scores = kept
    backend, _ = _strategy(call)
    bounded = replace(call, problem=bounded_ceilings(call.problem, row, col))
    directions = _Directions(bounded, backend, scores, dots)
    row_side, col_side, coefficients = directions.sides(_gains(call) * upstream[0], row, col)
    made = gradient_pass(directions.matrix, row_side, col_side, wanted_of(call), coefficients)
    found: list[Tensor | None] = [None] * len(call.needs)
    for place, g in zip(_MADE, (made.dx, made.dy, *directions.dscales)):
        found[place] = like(g, call.tensors[place]) if call.needs[place] and g is not None else None
    return tuple(found)


def _dense(call: Call, rows: slice, turned: bool) -> Outputs:
    """The losses of some rows (turned: columns), or their sum, in operations of torch."""
    (gain, *scales), (reduction, include, share) = call.extras, call.settings
    own = present(scales[1] if turned else scales[0])[rows, None]
    z, z_pos = dense_logits(replace(call.problem, scale=own), rows, turned)
    losses = row_losses(torch.stack(dense_normalizer(z)), z_pos, include)
    if share:
        negatives = z != -torch.inf
        sums = z.masked_fill(~negatives, 0.0).sum(1) + z_pos
        losses = losses + float.fromhex(share) * (z_pos - sums / (negatives.sum(1) + 1))
    losses = _share(call) * losses
    if gain is not None:
        losses = losses * gain[rows]
    return (losses if reduction == "none" else losses.sum(),)


#: x, y, and the scales of rows and of columns.
_MADE = (0, 1, *_SCALES)

scaled_softmax_losses = register(
    Primitive(
        "scaled_softmax_loss",
        results=1,
        outputs=9,
        forward=_forward,
        fake=_fake,
        gradients=_gradients,
        dense=_dense,
        two_sided=lambda call: True,
        made=_MADE,
    )
)
