"""The softmax losses: softplus(n_i - z_i,p(i)) with n_i the log-sum-exp over a row's negatives, of rows and of columns.

Where the scores need to be made only once, the gradients of a mean or a sum come with its value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..backends import Backend
from ..backends.base import Prepared
from ..engine import strategy
from ..engine.driver import (
    band_passes,
    gradient_pass,
    normalizer_of,
    positive_dots,
    positive_logits,
    softmax_side,
    statistics_pass,
)
from ..engine.gradients import Gradients, Wanted
from ..engine.matrix import COL_BIAS, Problem, ScoreMatrix
from ..engine.strategy import Place, Strategy
from ..panels.panel import Side
from ..panels.size import saved_dtype, score_dtype
from ..panels.terms import EXPONENTIAL
from .parts import (
    add_positive_params,
    bounded_ceilings,
    gradients_of,
    params_of,
    wanted_of,
)
from .prepared import prepared_for
from .registration import register
from .second import dense_logits, dense_normalizer
from .shared import Call, Outputs, Primitive
from .smoothing import Smoothing, smoothing_of
from .softmax_whole import LIFT, bands_are_whole, in_one_call, in_one_call_a_band

__all__ = ["centered_dots", "row_losses", "row_softmax", "softmax_loss", "softmax_losses"]


def softmax_loss(
    problem: Problem,
    gain: Tensor | None,
    reduction: str,
    *,
    both: bool = False,
    include_positive: bool = True,
    smoothing: float = 0.0,
    lift: Tensor | None = None,
) -> Tensor:
    """The softmax loss of every row, or their mean or sum.

    Parameters
    ----------
    problem : Problem
        Every row has a positive.
    gain : Tensor, optional
        Weights of the rows [N] in the dtype of the scores; with a mean, as shares of 1.
    reduction : {"mean", "sum", "none"}
        "none" gives [N].
    both : bool
        The columns' losses count too, in a square whose positives lie on the diagonal: the mean of both directions.
    include_positive : bool
        The denominator has the positive; without it the loss is n_i - z_i,p(i), and 0 for a row without negatives.
    smoothing : float
        The share of a row's target that lies on all its candidates alike; with the positive in the denominator.
    lift : Tensor, optional
        What the losses add to the positives' logits [N] in the dtype of the scores, differentiable: where the positive
        stands for several. With it in the denominator, and without `both` and smoothing.
    """
    # (as text that keeps its bits: Dynamo takes no float within what it prints)
    share = float(smoothing).hex() if smoothing else ""
    loss: Tensor = softmax_losses(problem, (gain, lift), (reduction, both, include_positive, share))[0]
    return loss


# ---- what is computed ----

_WHOLE = Strategy(Place.WHOLE)


def _strategy(call: Call, find: Callable[..., Strategy] = strategy.remembered) -> tuple[Backend, Strategy]:
    """Who computes it, and how."""
    problem, (reduction, both, _, smoothing) = call.problem, call.settings
    backend, rows, cols = problem.backend(), problem.x.shape[0], problem.y.shape[0]
    summed = reduction != "none"
    guided = problem.pairs.row_guide is not None
    if summed and not smoothing and strategy.fits_one_call(backend, rows, cols, problem.workspace_bytes, guided):
        return backend, _WHOLE
    found = find(
        backend,
        problem.size(),
        whole=both or problem.symmetric,
        summed=summed,
        gradients=True in call.needs,
        one_call=not smoothing,
        exponentials=not smoothing and not problem.pairs.capped,
    )
    return backend, found


def _gains(call: Call) -> Tensor:
    """What every row's loss is multiplied by [N], of one direction."""
    gain, (_, both, *_), x = call.extras[0], call.settings, call.problem.x
    share = _share(call)
    if gain is None:
        return torch.full((len(x),), share, dtype=score_dtype(x.dtype), device=x.device)
    return gain * share if both else gain


def _share(call: Call) -> float:
    """The same where rows have no weights of their own."""
    gain, (reduction, both, *_) = call.extras[0], call.settings
    share = 1.0 / max(call.problem.x.shape[0], 1) if reduction == "mean" and gain is None else 1.0
    return share / 2 if both else share


def _forward(call: Call) -> Outputs:
    """The loss; gradients, in the order of `_MADE`, where they come with it; or the normalisers, dots and scores."""
    backend, how = _strategy(call)
    if how.place is Place.WHOLE:
        gain = None if call.extras[0] is None else _gains(call)
        return in_one_call(call, backend, gain, _share(call))
    problem, (reduction, both, include, smoothing) = call.problem, call.settings
    if how.place is Place.BAND and bands_are_whole(call, backend):
        return in_one_call_a_band(call, backend, how.rows, _share(call))
    saved, scores = saved_dtype(problem.x.dtype), None
    if how.place is Place.KEPT:
        scores = problem.x.new_empty(
            problem.x.shape[0], problem.y.shape[0], dtype=score_dtype(problem.x.dtype), device=problem.x.device
        )
    matrix = ScoreMatrix.of(problem, EXPONENTIAL, backend, saved, scores, centered=True)
    lift = call.extras[1]
    plain = include and not smoothing and not problem.pairs.adds and lift is None
    if matrix.dots is not None and scores is None and plain and how.place is not Place.BAND:
        return _by_kernels(call, matrix, matrix.dots)
    dots, gain = centered_dots(matrix), _gains(call)
    z_pos = positive_logits(matrix, dots)
    smoothings = _smoothings(call, matrix, z_pos)
    if how.place is Place.BAND:
        found = _Found(matrix, dots, z_pos, gain, include, smoothings, lift)
        made = band_passes(matrix, how.rows, found.sides, wanted_of(call), cols=both)
        found.add_positive_params(made)
        value = found.losses if reduction == "none" else (gain * found.losses).sum()
        dlift = found.dz_pos if call.needs[LIFT] else None
        params = params_of(call, made.dparams)
        return value, made.dx, made.dy, *params, made.dcandidates, dlift, None, None, None, None
    row_state, col_state = statistics_pass(matrix, cols=both)
    row, col = normalizer_of(row_state), None if col_state is None else normalizer_of(col_state)
    losses = row_losses(_lifted(row, lift), z_pos, include)
    if col is not None:
        losses = losses + row_losses(col, z_pos, include)
    for each in smoothings:
        losses = losses + each.losses
    losses = gain * losses
    if True not in call.needs:
        return losses if reduction == "none" else losses.sum(), *(None,) * 10
    return losses if reduction == "none" else losses.sum(), *(None,) * 6, row, col, dots, scores


def _smoothings(call: Call, matrix: ScoreMatrix, z_pos: Tensor) -> list[Smoothing]:
    """What smoothing adds to the rows and, if they have losses, to the columns; nothing without."""
    _, both, _, share = call.settings
    if not share:
        return []
    share = float.fromhex(share)
    scale, turns = matrix.params[0], (False, True)[: 1 + both]
    return [smoothing_of(share, call.problem, scale, z_pos, turned=turned) for turned in turns]


def _by_kernels(call: Call, matrix: ScoreMatrix, dots: Tensor) -> Outputs:
    """The same where the backend does what surrounds the panels."""
    reduction, both, *_ = call.settings
    row, col = statistics_pass(matrix, cols=both)
    value = matrix.backend.softmax_losses(
        row, col, dots, matrix.params, call.extras[0], _share(call), reduction != "none"
    )
    kept = (row, col, dots) if True in call.needs else (None, None, None)
    return value, *(None,) * 6, *kept, None


def _prepared(call: Call) -> Prepared | None:
    """How a small matrix on a GPU is computed, gradients with the value."""
    reduction, both, include, smoothing = call.settings
    if reduction == "none" or smoothing or not include or call.extras[1] is not None:
        return None
    return prepared_for(call, "softmax", _share(call), both)


def centered_dots(matrix: ScoreMatrix) -> Tensor:
    """The positives' dot products [N]; their mean becomes the center of the scores.

    The weights of a row sum to 0 with its positive's, so that dL/dscale = sum w (score - c) for any c: one near the
    scores keeps the digits that a large common part of the features would take.
    """
    dots = positive_dots(matrix)
    matrix.params[2] = dots.sum() / max(len(dots), 1)
    return dots


def row_losses(normalizer: Tensor, z_pos: Tensor, include: bool) -> Tensor:
    """softplus(n - z_pos) [N] or, without the positive, n - z_pos; n = shift + rest. 0 without negatives."""
    shift, rest = normalizer
    if include:
        return -logsigmoid((z_pos - shift) - rest)
    return ((shift - z_pos) + rest).masked_fill(rest == -torch.inf, 0.0)


def row_softmax(normalizer: Tensor, z_pos: Tensor, include: bool) -> Tensor:
    """The derivative by n [N]: sigmoid(n - z_pos), the probability that is not the positive's; without it 1."""
    shift, rest = normalizer
    if include:
        return torch.sigmoid((shift - z_pos) + rest)
    return torch.ones_like(rest).masked_fill_(rest == -torch.inf, 0.0)


def _lifted(normalizer: Tensor, lift: Tensor | None) -> Tensor:
    """Log-sums as two numbers [2, n], as positives see them whose logits are lifted."""
    if lift is None:
        return normalizer
    shift, rest = normalizer
    return torch.stack([shift, rest - lift])


class _Found:
    """What bands of rows leave behind: the rows' losses and the positives' dL/dz."""

    def __init__(
        self,
        matrix: ScoreMatrix,
        dots: Tensor,
        z_pos: Tensor,
        gain: Tensor,
        include: bool,
        smoothings: Sequence[Smoothing],
        lift: Tensor | None,
    ) -> None:
        self.lift = lift
        self.matrix, self.dots, self.z_pos, self.gain, self.include = matrix, dots, z_pos, gain, include
        self.row_smoothing, self.col_smoothing = (*smoothings, None, None)[:2]
        self.losses, self.dz_pos = torch.zeros_like(z_pos), torch.zeros_like(z_pos)

    def sides(self, i: slice, row_state: Tensor, col_state: Tensor | None) -> tuple[Side, Side, Tensor]:
        """Normalisers and gains of a band's rows and columns, and the coefficients of its positives."""
        row = self._side(i, row_state, self.row_smoothing)
        col = row
        if not self.matrix.symmetric:
            col = Side() if col_state is None else self._side(i, col_state, self.col_smoothing)
        return row, col, self.dz_pos[i] * self.matrix.params[0]

    def _side(self, i: slice, state: Tensor, smoothing: Smoothing | None) -> Side:
        normalizer = normalizer_of(state)
        lifted = _lifted(normalizer, None if self.lift is None else self.lift[i])
        self.losses[i] += row_losses(lifted, self.z_pos[i], self.include)
        softmax = self.gain[i] * row_softmax(lifted, self.z_pos[i], self.include)
        self.dz_pos[i] -= softmax
        if smoothing is None:
            return softmax_side(normalizer, softmax)
        part = smoothing.band(i)
        self.losses[i] += part.losses
        self.dz_pos[i] += part.of_positives(self.gain[i])
        return softmax_side(normalizer, softmax, part.target(self.gain[i]))

    def add_positive_params(self, made: Gradients) -> None:
        """The positives' part of the gradient of the scale."""
        add_positive_params(self.matrix, made, self.dz_pos, self.dots)


def _fake(call: Call) -> Outputs:
    """The shapes of what `_forward` returns."""
    _, how = _strategy(call, strategy.choose)
    problem, (reduction, both, *_) = call.problem, call.settings
    x, y, dtype, saved = problem.x, problem.y, score_dtype(problem.x.dtype), saved_dtype(problem.x.dtype)
    value = x.new_empty((x.shape[0],) if reduction == "none" else (), dtype=dtype)
    want_x, want_y, _ = call.wants
    if how.gradients_come_with_the_value:
        of_params = dtype if how.place is Place.WHOLE else torch.float64
        return (
            value,
            x.new_empty(x.shape, dtype=saved) if want_x else None,
            y.new_empty(y.shape, dtype=saved) if want_y else None,
            *(x.new_empty((), dtype=of_params) if need else None for need in call.needs[2:4]),
            y.new_empty(y.shape[0], dtype=dtype) if call.needs[COL_BIAS] else None,
            x.new_empty(x.shape[0], dtype=dtype) if call.needs[LIFT] else None,
            None, None, None, None,
        )  # fmt: skip
    if True not in call.needs:
        return value, *(None,) * 10
    kept = how.place is Place.KEPT
    return (
        value, *(None,) * 6,
        x.new_empty((2, x.shape[0]), dtype=dtype),
        x.new_empty((2, y.shape[0]), dtype=dtype) if both else None,
        x.new_empty(x.shape[0], dtype=dtype),
        x.new_empty((x.shape[0], y.shape[0]), dtype=dtype) if kept else None,
    )  # fmt: skip


# ---- autograd ----


def _gradients(call: Call, kept: Outputs, upstream: Outputs) -> Outputs:
    """The gradient pass."""
    *_, row, col, dots, scores = kept
    (backend, _), (_, _, include, smoothing) = _strategy(call), call.settings
    if (
        include
        and not smoothing
        and call.extras[1] is None
        and backend.vectors
        and len(dots)
        and call.problem.y.shape[0]
        and not call.problem.pairs.adds
    ):
        return _gradients_by_kernels(call, backend, row, col, dots, upstream[0])
    matrix = ScoreMatrix.of(bounded_ceilings(call.problem, row, col), EXPONENTIAL, backend, scores=scores)
    matrix.params[2] = dots.sum() / max(len(dots), 1)
    z_pos, gain = positive_logits(matrix, dots), _gains(call) * upstream[0]
    row_gain = gain * row_softmax(_lifted(row, call.extras[1]), z_pos, include)
    col_gain = None if col is None else gain * row_softmax(col, z_pos, include)
    dz_pos = -row_gain if col_gain is None else -row_gain - col_gain
    smoothings = _smoothings(call, matrix, z_pos)
    targets: list[Tensor | None] = [None, None]
    for k, each in enumerate(smoothings):
        targets[k], dz_pos = each.target(gain), dz_pos + each.of_positives(gain)
    row_side = softmax_side(row, row_gain, targets[0])
    col_side = row_side if matrix.symmetric else Side() if col is None else softmax_side(col, col_gain, targets[1])
    made = gradient_pass(matrix, row_side, col_side, wanted_of(call), dz_pos * matrix.params[0])
    add_positive_params(matrix, made, dz_pos, dots)
    found = gradients_of(call, made)
    return (*found[:LIFT], dz_pos) if call.needs[LIFT] else found


def _gradients_by_kernels(
    call: Call, backend: Backend, row: Tensor, col: Tensor | None, dots: Tensor, upstream: Tensor
) -> Outputs:
    """The same where the backend does what surrounds the panels."""
    problem = bounded_ceilings(call.problem, row, col)
    gains = backend.softmax_gains(row, col, dots, problem, call.extras[0], _share(call), upstream)
    matrix = ScoreMatrix.of(problem, EXPONENTIAL, backend, params=gains.params)
    row_side = Side(None, row, gains.row)
    col_side = row_side if matrix.symmetric else Side() if col is None else Side(None, col, gains.col)
    made = gradient_pass(matrix, row_side, col_side, Wanted(*call.wants), gains.coefficients, dparams=gains.dparams)
    return gradients_of(call, made)


def _dense(call: Call, rows: slice, turned: bool) -> Outputs:
    """The losses of some rows (turned: columns), or their sum, in operations of torch."""
    z, z_pos = dense_logits(call.problem, rows, turned)
    reduction, _, include, smoothing = call.settings
    lift = None if call.extras[1] is None else call.extras[1][rows]
    losses = row_losses(_lifted(torch.stack(dense_normalizer(z)), lift), z_pos, include)
    if smoothing:
        negatives = z != -torch.inf
        sums = z.masked_fill(~negatives, 0.0).sum(1) + z_pos
        losses = losses + float.fromhex(smoothing) * (z_pos - sums / (negatives.sum(1) + 1))
    losses = _share(call) * losses
    gain = call.extras[0]
    if gain is not None:
        losses = losses * gain[rows]
    return (losses if reduction == "none" else losses.sum(),)


#: x, y, scale, bias, the columns' biases, and the lifts of the positives' logits.
_MADE = (0, 1, 2, 3, COL_BIAS, LIFT)

softmax_losses = register(
    Primitive(
        "softmax_loss",
        results=1,
        outputs=11,
        forward=_forward,
        fake=_fake,
        gradients=_gradients,
        dense=_dense,
        two_sided=lambda call: call.settings[1],
        prepared=_prepared,
        made=_MADE,
    )
)
