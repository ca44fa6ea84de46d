"""The sigmoid loss: sum_j softplus(z_ij) over a row's negatives + softplus(-z_i,p(i)).

Where pairs have ids, those of equal ids are positives too, within the stream: softplus(-z_ij).
Its weights depend on nothing but the pair's own score, so one pass gives value and gradients of a sum.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from ..backends.base import Prepared
from ..engine import strategy
from ..engine.driver import gradient_pass, neutral_state, positive_dots, positive_logits, statistics_pass
from ..engine.gradients import Gradients
from ..engine.matrix import COL_BIAS, Problem, ScoreMatrix
from ..panels.panel import Side
from ..panels.size import saved_dtype, score_dtype
from ..panels.terms import SIGMOID
from .parts import add_positive_params, gradients_of, params_of, wanted_of, whole_gradients, whole_scores
from .prepared import prepared_for
from .registration import register
from .second import dense_logits
from .shared import Call, Outputs, Primitive

__all__ = ["sigmoid_loss", "sigmoid_losses"]


def sigmoid_loss(problem: Problem, gain: Tensor | None, reduction: str) -> Tensor:
    """The sigmoid loss of every row, or their mean or sum.

    Parameters
    ----------
    problem : Problem
        Every row has a positive, or none has one beside those of its id.
    gain : Tensor, optional
        Weights of the rows [N] in the dtype of the scores; with a mean, as shares of 1.
    reduction : {"mean", "sum", "none"}
        "none" gives [N].
    """
    loss: Tensor = sigmoid_losses(problem, (gain,), (reduction,))[0]
    return loss


# ---- what is computed ----


def _share(call: Call) -> float:
    """What every row's loss is multiplied by where rows have no weights of their own."""
    (gain,), (reduction,) = call.extras, call.settings
    return 1.0 / max(call.problem.x.shape[0], 1) if reduction == "mean" and gain is None else 1.0


def _gains(call: Call) -> Tensor:
    """What every row's loss is multiplied by [N]."""
    (gain,), x = call.extras, call.problem.x
    if gain is not None:
        return gain
    return torch.full((x.shape[0],), _share(call), dtype=score_dtype(x.dtype), device=x.device)


def _in_one_call(call: Call) -> bool:
    (reduction,), x, y = call.settings, call.problem.x, call.problem.y
    workspace_bytes = call.problem.workspace_bytes
    return (
        reduction != "none"
        and not call.needs[COL_BIAS]
        and strategy.fits_one_call(call.problem.backend(), x.shape[0], y.shape[0], workspace_bytes)
    )


def _prepared(call: Call) -> Prepared | None:
    """How a small matrix on a GPU is computed, gradients with the value."""
    (reduction,) = call.settings
    return None if reduction == "none" else prepared_for(call, "sigmoid", _share(call))


def _forward(call: Call) -> Outputs:
    """The loss; dx, dy, dscale, dbias, dcandidates of a sum."""
    problem, (reduction,), backend = call.problem, call.settings, call.problem.backend()
    if _in_one_call(call):
        whole = whole_scores(problem)
        value, *params = backend.sigmoid_matrix(
            whole.scores, problem, call.extras[0], _share(call), whole.positive_weights
        )
        return value, *whole_gradients(call, whole, *params), None
    matrix, gain = _matrix(call), _gains(call)
    if reduction != "none" and True in call.needs:
        return _pass(call, matrix, gain)
    rows, _ = statistics_pass(matrix, cols=False)
    losses = gain * _losses(rows, matrix)
    return losses if reduction == "none" else losses.sum(), *(None,) * 5


def _matrix(call: Call) -> ScoreMatrix:
    problem = call.problem
    return ScoreMatrix.of(problem, SIGMOID, problem.backend(), saved_dtype(problem.x.dtype))


def _losses(state: Tensor, matrix: ScoreMatrix) -> Tensor:
    """The rows' losses [N], from the sums over the stream [1, N]."""
    if not matrix.positives.exist:
        return state[0]
    return state[0] - logsigmoid(positive_logits(matrix, positive_dots(matrix)))


def _weigh(call: Call, matrix: ScoreMatrix, gain: Tensor) -> tuple[Gradients, Tensor]:
    """The gradients of sum_i gain_i loss_i, and the rows' sums over the stream."""
    state, wanted = neutral_state(matrix, len(gain)), wanted_of(call)
    side = Side(state, None, gain)
    if not matrix.positives.exist:
        return gradient_pass(matrix, side, Side(), wanted), state
    dots = positive_dots(matrix)
    dz_pos = -torch.sigmoid(-positive_logits(matrix, dots)) * gain
    made = gradient_pass(matrix, side, Side(), wanted, dz_pos * matrix.params[0])
    add_positive_params(matrix, made, dz_pos, dots)
    return made, state


def _pass(call: Call, matrix: ScoreMatrix, gain: Tensor) -> Outputs:
    """The losses' weighted sum, and its gradients."""
    made, state = _weigh(call, matrix, gain)
    value = (gain * _losses(state, matrix)).sum()
    return value, made.dx, made.dy, *params_of(call, made.dparams), made.dcandidates


def _fake(call: Call) -> Outputs:
    """The shapes of what `_forward` returns."""
    problem, (reduction,) = call.problem, call.settings
    x, y, dtype = problem.x, problem.y, score_dtype(problem.x.dtype)
    if reduction == "none":
        return x.new_empty(x.shape[0], dtype=dtype), *(None,) * 5
    saved, of_params = saved_dtype(x.dtype), dtype if _in_one_call(call) else torch.float64
    want_x, want_y, _ = call.wants
    return (
        x.new_empty((), dtype=dtype),
        x.new_empty(x.shape, dtype=saved) if want_x else None,
        y.new_empty(y.shape, dtype=saved) if want_y else None,
        *(x.new_empty((), dtype=of_params) if need else None for need in call.needs[2:4]),
        y.new_empty(y.shape[0], dtype=dtype) if call.needs[COL_BIAS] else None,
    )


# ---- autograd ----


def _gradients(call: Call, kept: Outputs, upstream: Outputs) -> Outputs:
    """The pass with upstream's gains: every row has a factor of its own."""
    made, _ = _weigh(call, _matrix(call), _gains(call) * upstream[0])
    return gradients_of(call, made)


def _dense(call: Call, rows: slice, turned: bool) -> Outputs:
    """The losses of some rows, or their sum, in operations of torch."""
    z, z_pos = dense_logits(call.problem, rows, turned, signed=True)
    losses = softplus(z, threshold=1e9).sum(1)
    if call.problem.positives.exist:
        losses = losses - logsigmoid(z_pos)
    (gain,), (reduction,) = call.extras, call.settings
    losses = _share(call) * losses if gain is None else gain[rows] * losses
    return (losses if reduction == "none" else losses.sum(),)


sigmoid_losses = register(
    Primitive(
        "sigmoid_loss",
        results=1,
        outputs=6,
        forward=_forward,
        fake=_fake,
        gradients=_gradients,
        dense=_dense,
        two_sided=lambda call: False,
        prepared=_prepared,
        made=(0, 1, 2, 3, COL_BIAS),
    )
)
