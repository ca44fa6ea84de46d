"""Supervised contrastive losses: a row's positives are the columns of its label, in the stream like all others.

Outside: logsumexp_a z_ia - mean_p z_ip, with the weights gain * (exp(z - a_i) - [p] / k_i); the difference is taken in
float32, before a tile is rounded. Inside: softplus(n_i - m_i) + log k_i, n and m the log-sums over the other columns
and over the positives, each with a pass of its own.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..backends import Backend
from ..engine import strategy
from ..engine.class_sums import ClassSums, square_norms
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
from ..engine.matrix import Problem, ScoreMatrix
from ..engine.strategy import Place, Strategy
from ..panels.pairs import ALIKE_ALONE, ALIKE_COUNT, EVERY_PAIR
from ..panels.panel import Side, present
from ..panels.size import saved_dtype, score_dtype
from ..panels.terms import EXPONENTIAL
from .label_matrix import in_one_go, inside, value_and_gradients
from .parts import add_positive_params, gradients_of, params_of, whole_gradients, whole_scores
from .registration import register
from .second import dense_logits, dense_normalizer
from .shared import Call, Outputs, Primitive

__all__ = ["label_loss"]


def label_loss(problem: Problem, gain: Tensor, share: Tensor, reduction: str, *, inside: bool = False) -> Tensor:
    """The supervised contrastive loss of every row, or their sum.

    Parameters
    ----------
    problem : Problem
        Rows and columns have ids. Outside, the index of a row with one positive is its column, and -1 of the others.
    gain : Tensor
        Weights of the rows [N] in the dtype of the scores, 0 where a row has no positive.
    share : Tensor
        1 / k_i [N] in the same dtype, of the number of a row's positives; 0 where it has none.
    reduction : {"sum", "none"}
        "none" gives [N].
    inside : bool
        The mean over the positives stands inside of the logarithm.
    """
    loss: Tensor = label_losses(problem, (gain, share), (reduction, inside))[0]
    return loss


# ---- what is computed ----


def _vectors(call: Call) -> tuple[Tensor, Tensor]:
    """Weights of the rows [N], and the shares of their positives [N]."""
    gain, share = call.extras
    return present(gain), present(share)


def _strategy(call: Call) -> tuple[Backend, Strategy]:
    """Who computes it, and how."""
    problem, (reduction, is_inside), backend = call.problem, call.settings, call.problem.backend()
    summed = reduction != "none" and not is_inside
    if in_one_go(call):
        return backend, Strategy(Place.WHOLE)
    found = strategy.choose(
        backend, problem.size(), whole=problem.symmetric, summed=summed, gradients=True in call.needs, one_call=False
    )
    return backend, found


def _matrix(call: Call, backend: Backend, equal_ids: int, dots: Tensor, dtype: torch.dtype | None) -> ScoreMatrix:
    """The matrix whose pairs of equal ids are this; the mean of the positives' scores is its center."""
    problem, (gain, _) = call.problem, _vectors(call)
    index = problem.index
    if index is not None and index.device.type == "cpu" and not (index >= 0).any():  # where a look waits for nobody
        index = None
    pairs = problem.pairs._replace(equal_ids=equal_ids)
    matrix = ScoreMatrix.of(replace(problem, index=index, pairs=pairs), EXPONENTIAL, backend, dtype)
    matrix.params[2] = dots.sum() / (gain != 0).sum().clamp(min=1)
    return matrix


def _mean_dots(call: Call) -> Tensor:
    """mean_p <x_i, y_p> [N] over a row's positives, in float64; 0 without."""
    problem, (_, share) = call.problem, _vectors(call)
    pairs, x = problem.pairs, problem.x
    dots = ClassSums(present(pairs.row_ids), present(pairs.col_ids), problem.workspace_bytes).dots(x, problem.y)
    if problem.symmetric:
        dots -= square_norms(x)
    return dots * share


class _Rows:
    """What is made of the rows' normalisers.

    A row with one positive has it outside of the stream, as InfoNCE has: its loss is softplus(n_i - z_ip), which may be
    tiny. That of any other row is at least log k.
    """

    def __init__(self, call: Call, matrix: ScoreMatrix, mean_dots: Tensor, gain: Tensor) -> None:
        _, self.share = _vectors(call)
        self.matrix, self.gain = matrix, gain
        self.mean = matrix.params[0].to(mean_dots.dtype) * mean_dots + matrix.params[1]
        self.dots: Tensor | None = None
        self.z_pos = torch.zeros_like(gain)
        self.single = torch.zeros_like(gain, dtype=torch.bool)
        if matrix.positives.index is not None:
            self.dots, self.single = positive_dots(matrix), matrix.positives.index >= 0
            self.z_pos = positive_logits(matrix, self.dots)
        self.dz_pos = torch.zeros_like(gain)

    def losses(self, normalizer: Tensor, rows: slice = slice(None)) -> Tensor:
        """softplus(n_i - z_ip), or a_i - mean_p z_ip, of these rows; 0 without positives."""
        shift, rest = normalizer
        many = (shift - self.mean[rows]).to(rest.dtype) + rest
        one = -logsigmoid((self.z_pos[rows] - shift) - rest)
        return torch.where(self.single[rows], one, many).masked_fill(self.share[rows] == 0, 0.0)

    def side(self, normalizer: Tensor, rows: slice = slice(None)) -> tuple[Side, Tensor | None]:
        """What weighs these rows, and their positives' part of dL/d score where these are outside of the stream."""
        shift, rest = normalizer
        gain, single = self.gain[rows], self.single[rows]
        target = torch.stack([torch.zeros_like(gain), (gain * self.share[rows]).masked_fill(single, 0.0)])
        gain = torch.where(single, gain * torch.sigmoid((shift - self.z_pos[rows]) + rest), gain)
        side = softmax_side(normalizer, gain, target)
        if self.dots is None:
            return side, None
        self.dz_pos[rows] = (-gain).masked_fill(~single, 0.0)
        return side, self.dz_pos[rows] * self.matrix.params[0]

    def add_params(self, made: Gradients) -> None:
        """The part in the gradient of the scale of the positives that are outside of the stream."""
        if self.dots is not None:
            add_positive_params(self.matrix, made, self.dz_pos, self.dots)


def _forward(call: Call) -> Outputs:
    """The loss; dx, dy, dscale, dbias where they come with it; the rows' normalisers and mean positive scores."""
    (backend, how), (reduction, is_inside), (gain, _) = _strategy(call), call.settings, _vectors(call)
    if how.place is Place.WHOLE:
        whole = value_and_gradients(call, inside) if is_inside else _in_one_call(call, backend)
        return *whole, None, None, None
    strategy.require_panel(backend, call.problem.size())
    mean_dots = _mean_dots(call)
    if is_inside:
        return _forward_inside(call, backend, mean_dots)
    matrix = _matrix(call, backend, ALIKE_COUNT, mean_dots, saved_dtype(call.problem.x.dtype))
    of_rows = _Rows(call, matrix, mean_dots, gain)
    if how.place is Place.BAND:
        losses = torch.zeros_like(gain)

        def sides(i: slice, row_state: Tensor, _: Tensor | None) -> tuple[Side, Side, Tensor | None]:
            normalizer = normalizer_of(row_state)
            losses[i] = of_rows.losses(normalizer, i)
            row, positive = of_rows.side(normalizer, i)
            return row, row if matrix.symmetric else Side(), positive

        made = band_passes(matrix, how.rows, sides, Wanted(*call.wants), cols=False)
        of_rows.add_params(made)
        return (gain * losses).sum(), made.dx, made.dy, *params_of(call, made.dparams), None, None, None
    # the log-sum goes over all other columns, so that nobody looks at ids
    state, _ = statistics_pass(replace(matrix, pairs=EVERY_PAIR), cols=False)
    normalizer = normalizer_of(state)
    losses = gain * of_rows.losses(normalizer)
    kept = (normalizer, None, mean_dots) if True in call.needs else (None, None, None)
    return losses if reduction == "none" else losses.sum(), None, None, None, None, *kept


def _in_one_call(call: Call, backend: Backend) -> Outputs:
    """A small matrix: the backend gives value and weights in one call."""
    problem, (gain, share) = call.problem, _vectors(call)
    whole = whole_scores(problem)
    problem = replace(problem, pairs=problem.pairs._replace(equal_ids=ALIKE_COUNT))
    value, *params = backend.label_matrix(whole.scores, problem, gain, share, whole.positive_weights)
    return value, *whole_gradients(call, whole, *params)


def _forward_inside(call: Call, backend: Backend, dots: Tensor) -> Outputs:
    (reduction, _), (gain, share) = call.settings, _vectors(call)
    others, alike = (
        normalizer_of(statistics_pass(_matrix(call, backend, equal_ids, dots, None), cols=False)[0])
        for equal_ids in (0, ALIKE_ALONE)
    )
    losses = gain * _inside(others, alike, share)
    kept = (others, alike, dots) if True in call.needs else (None, None, None)
    return losses if reduction == "none" else losses.sum(), None, None, None, None, *kept


def _margin(others: Tensor, alike: Tensor) -> Tensor:
    """n_i - m_i [N]."""
    return (others[0] - alike[0]) + (others[1] - alike[1])


def _inside(others: Tensor, alike: Tensor, share: Tensor) -> Tensor:
    """softplus(n_i - m_i) + log k_i [N]; 0 without positives."""
    losses = -logsigmoid(-_margin(others, alike)) - share.masked_fill(share == 0, 1.0).log()
    return losses.masked_fill(share == 0, 0.0)


def _fake(call: Call) -> Outputs:
    """The shapes of what `_forward` returns."""
    _, how = _strategy(call)
    problem, (reduction, is_inside) = call.problem, call.settings
    x, y, dtype, saved = problem.x, problem.y, score_dtype(problem.x.dtype), saved_dtype(problem.x.dtype)
    value = x.new_empty((x.shape[0],) if reduction == "none" else (), dtype=dtype)
    if True not in call.needs:
        return value, *(None,) * 7
    if how.gradients_come_with_the_value:
        of_params = dtype if how.place is Place.WHOLE else torch.float64
        want_x, want_y, _ = call.wants
        return (
            value,
            x.new_empty(x.shape, dtype=saved) if want_x else None,
            y.new_empty(y.shape, dtype=saved) if want_y else None,
            *(x.new_empty((), dtype=of_params) if need else None for need in call.needs[2:4]),
            None, None, None,
        )  # fmt: skip
    pair = x.new_empty((2, x.shape[0]), dtype=dtype)
    return (
        value, None, None, None, None,
        pair, torch.empty_like(pair) if is_inside else None, x.new_empty(x.shape[0], dtype=torch.float64),
    )  # fmt: skip


# ---- autograd ----


def _gradients(call: Call, kept: Outputs, upstream: Outputs) -> Outputs:
    """The gradient pass, or two."""
    *_, normalizer, _, dots = kept
    backend, (gain, _) = call.problem.backend(), _vectors(call)
    gain, wanted = gain * upstream[0], Wanted(*call.wants)
    if call.settings[1]:
        return gradients_of(call, _gradients_inside(call, backend, gain, kept))
    matrix = _matrix(call, backend, ALIKE_COUNT, dots, None)
    of_rows = _Rows(call, matrix, dots, gain)
    row, positive = of_rows.side(normalizer)
    made = gradient_pass(matrix, row, row if matrix.symmetric else Side(), wanted, positive)
    of_rows.add_params(made)
    return gradients_of(call, made)


def _gradients_inside(call: Call, backend: Backend, gain: Tensor, kept: Outputs) -> Gradients:
    """Of the other columns, and of the positives; added up before they are rounded."""
    *_, others, alike, dots = kept
    total = Gradients()
    gain = gain * torch.sigmoid(_margin(others, alike)).masked_fill(gain == 0, 0.0)
    dtype = score_dtype(call.problem.x.dtype)
    for equal_ids, normalizer, sign in ((0, others, 1.0), (ALIKE_ALONE, alike, -1.0)):
        matrix = _matrix(call, backend, equal_ids, dots, dtype)
        row = softmax_side(normalizer, sign * gain)
        made = gradient_pass(matrix, row, row if matrix.symmetric else Side(), Wanted(*call.wants))
        for name in ("dx", "dy", "dparams"):
            part, before = getattr(made, name), getattr(total, name)
            setattr(total, name, part if before is None else before.add_(part))
    return total


def _dense(call: Call, rows: slice, turned: bool) -> Outputs:
    """The losses of some rows, or their sum, in operations of torch."""
    problem, (reduction, is_inside), (gain, share) = call.problem, call.settings, _vectors(call)
    z, _ = dense_logits(replace(problem, index=None, pairs=EVERY_PAIR), rows, turned)
    alike = present(problem.pairs.alike(rows))
    share = share[rows]
    if is_inside:
        others, own = (torch.stack(dense_normalizer(z.masked_fill(out, -torch.inf))) for out in (alike, ~alike))
        losses = gain[rows] * _inside(others, own, share)
    else:
        mean = z.masked_fill(~alike | (z == -torch.inf), 0.0).sum(1) * share
        shift, rest = dense_normalizer(z)
        losses = gain[rows] * ((shift - mean) + rest).masked_fill(share == 0, 0.0)
    return (losses if reduction == "none" else losses.sum(),)


label_losses = register(
    Primitive(
        "label_loss",
        results=1,
        outputs=8,
        forward=_forward,
        fake=_fake,
        gradients=_gradients,
        dense=_dense,
        two_sided=lambda call: False,
        made=(0, 1, 2, 3),
    )
)
