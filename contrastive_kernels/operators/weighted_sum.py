"""Sums over pairs whose weights are known beforehand: value and gradients of a sum in one pass.

exponential    value_i = sum_j exp(z_ij - a_i) over negatives, of rows, and of columns with b_j
sigmoid        value_i = sum_j softplus(z_ij) over negatives + softplus(-z_i,p(i)), of rows
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .. import backends
from ..engine import strategy
from ..engine.driver import gradient_pass, neutral_state, normalizer_of, positive_dots, statistics_pass
from ..engine.gradients import Gradients, Wanted
from ..engine.matrix import ScoreMatrix
from ..engine.problem import Problem
from ..panels.panel import Side
from ..panels.size import score_dtype
from ..panels.terms import EXPONENTIAL, SIGMOID
from .second import dense_logits
from .shared import Call, Outputs, Primitive, like, params_of, register, saved_dtype, whole_gradients, whole_scores
from .softmax_loss import add_positive_params, dense_normalizer

__all__ = ["ExponentialSums", "exponential_sums", "sigmoid_sums", "two_sum"]


class ExponentialSums(NamedTuple):
    """What :func:`exponential_sums` gives: the rows' and columns' sums, or their weighted sum; and the matrix's own."""

    #: sum_i r_i value_i + sum_j c_j value_j; or the rows' and the columns' values [N], [M], unweighted
    total: Tensor | None
    rows: Tensor | None
    cols: Tensor | None
    #: the log-sum-exps found, (shift, rest) [2, N] and [2, M], and the positives' dot products [N]; not differentiable
    row_normalizer: Tensor
    col_normalizer: Tensor | None
    dots: Tensor | None


def exponential_sums(
    problem: Problem, rests: list[Tensor], logits: list[Tensor] | None, gain: Tensor | None, reduction: str
) -> ExponentialSums:
    """Sums of exp(z_ij - z_i,p(i) - rest_i) over negatives.

    Parameters
    ----------
    problem : Problem
        The score matrix.
    rests : list of Tensor
        Of the rows [N], and perhaps of the columns [M]; not differentiated. +inf says that a row has no negatives.
    logits : list of Tensor, optional
        The positives' logits, as many, differentiable; without them they are the matrix's own.
    gain : Tensor, optional
        Weights [N] of rows, and of columns, of a sum; with a mean, as shares of 1.
    reduction : {"mean", "sum", "none"}
        A mean or a sum has gradients that come with it: with two directions, of the mean of both. "none": every row's
        and column's value, unweighted.
    """
    two = len(rests) == 2
    if two and gain is not None:
        gain = gain / 2
    extras = (*_padded(rests), gain, gain.clone() if two and gain is not None else None, *_padded(logits))
    settings = ("exponential", logits is None, reduction)
    values, col_values, row_found, col_found, dots = weighted_sum(problem, extras, settings)
    if reduction != "none":
        return ExponentialSums(values, None, None, row_found, col_found, dots)
    return ExponentialSums(None, values, col_values if two else None, row_found, col_found, dots)


def _padded(vectors: list[Tensor] | None) -> list[Tensor | None]:
    """Two of them, None where there is none."""
    return [*(vectors or []), None, None][:2]


def sigmoid_sums(problem: Problem, gain: Tensor | None, reduction: str) -> Tensor:
    """The sigmoid loss of every row [N], or their mean or sum; gains as in :func:`.softmax_loss.softmax_loss`."""
    if reduction == "none":
        rows = weighted_sum(problem, (None,) * 6, ("sigmoid", False, reduction))[0]
        return rows if gain is None else gain * rows
    return weighted_sum(problem, (None, None, gain, None, None, None), ("sigmoid", False, reduction))[0]


# ---- what is computed ----


def _share(call: Call) -> float:
    """What every row is multiplied by where rows have no weights of their own."""
    share = 1.0 / max(call.problem.x.shape[0], 1) if call.settings[2] == "mean" else 1.0
    return share if call.extras[1] is None else share / 2


def _gains(call: Call) -> list[Tensor | None]:
    """The weights of rows [N] and of columns [M] of a sum."""
    x, y = call.problem.x, call.problem.y
    row, col = call.extras[2:4]
    if row is None:
        dtype, share = score_dtype(x.dtype), _share(call)
        row = torch.full((x.shape[0],), share, dtype=dtype, device=x.device)
        if call.extras[1] is not None:
            col = torch.full((y.shape[0],), share, dtype=dtype, device=x.device)
    return [row, col]


def _matrix(call: Call, backend: backends.Backend) -> ScoreMatrix:
    problem = call.problem
    term = SIGMOID if call.settings[0] == "sigmoid" else EXPONENTIAL
    return ScoreMatrix.of(problem, term, backend, saved_dtype(problem.x.dtype))


def _fits_one_call(call: Call, backend: backends.Backend) -> bool:
    x, y, engine = call.problem.x, call.problem.y, call.problem.engine
    return strategy.fits_one_call(backend, x.shape[0], y.shape[0], engine.workspace_bytes)


def _backend(call: Call) -> backends.Backend:
    problem = call.problem
    return backends.choose(problem.engine.backend or None, problem.x.device, problem.x.dtype)


def _forward(call: Call) -> Outputs:
    """Values; dx, dy, dparams, da, db where they come with the value; found normalisers of rows, of columns, dots."""
    _, relative, reduction = call.settings
    backend = _backend(call)
    if reduction != "none" and _fits_one_call(call, backend):
        return _in_one_call(call, backend)
    matrix = _matrix(call, backend)
    dots = _dots(matrix, relative)
    if reduction != "none":
        return _pass(call, matrix, dots, *_gains(call))
    row, col = statistics_pass(matrix, cols=call.extras[1] is not None)
    if matrix.term is SIGMOID:
        return row[0] - logsigmoid(_z_pos(matrix, dots)), *(None,) * 10
    row, col = normalizer_of(row), None if col is None else normalizer_of(col)
    a, *b = _given(call, matrix, dots)
    values, col_values = _ratio(row, a), _ratio(col, b[0]) if b else None
    return values, col_values, *(None,) * 6, row, col, dots


def _dots(matrix: ScoreMatrix, relative: bool) -> Tensor | None:
    """The positives' dot products [N]; where a row's weights sum to 0 with its positive's, their mean is the center."""
    if not matrix.positives.exist:
        return None
    dots = positive_dots(matrix)
    if relative:
        matrix.params[2] = dots.sum() / max(len(dots), 1)
    return dots


def _z_pos(matrix: ScoreMatrix, dots: Tensor) -> Tensor:
    return matrix.params[0] * dots + matrix.params[1]


def _given(call: Call, matrix: ScoreMatrix, dots: Tensor | None) -> list[Tensor]:
    """The given normalisers of rows, and of columns, as two numbers (shift, rest) [2, n]: nothing is rounded away."""
    rests, logits = call.extras[:2], call.extras[4:]
    if call.settings[1]:
        logits = (_z_pos(matrix, dots),) * 2
    return [_two_numbers(rest, logit) for rest, logit in zip(rests, logits) if rest is not None]


def _two_numbers(rest: Tensor, logit: Tensor | None) -> Tensor:
    """logit + rest as (shift, rest) [2, n], the shift finite; a rest of +inf says that there are no negatives."""
    if logit is None:
        endless = rest == torch.inf
        return torch.stack([rest.masked_fill(endless, 0.0), torch.zeros_like(rest).masked_fill_(endless, torch.inf)])
    return torch.stack(two_sum(logit, rest))


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a + b as (rounded sum, exact remainder) [n]; where b is infinite, as (a, b)."""
    total = a + b
    part = total - a
    rest = (a - (total - part)) + (b - part)
    infinite = b.abs() == torch.inf
    return torch.where(infinite, a, total), torch.where(infinite, b, rest)


def _ratio(found: Tensor, given: Tensor) -> Tensor:
    """exp(found - given) [n] of two normalisers (shift, rest); nothing found gives 0."""
    return torch.exp((found[0] - given[0]) + (found[1] - given[1]))


def _pass(call: Call, matrix: ScoreMatrix, dots: Tensor | None, row_gain: Tensor, col_gain: Tensor | None) -> Outputs:
    """Values and gradients in one pass, for gains known beforehand."""
    if matrix.term is SIGMOID:
        return _sigmoid_pass(call, matrix, dots, row_gain)
    relative, given = call.settings[1], _given(call, matrix, dots)
    gains = [row_gain, col_gain][: len(given)]
    wanted = Wanted(*call.wants)
    if True not in call.needs:
        states = [s for s in statistics_pass(matrix, cols=len(given) == 2) if s is not None]
        made, found = Gradients(), [normalizer_of(state) for state in states]
    else:
        states = [neutral_state(matrix, n.shape[1]) for n in given]
        sides = [Side(state, n, gain) for state, n, gain in zip(states, given, gains)] + [Side()] * (2 - len(given))

        def dz_pos() -> Tensor:
            """dL/dz_pos [N] = -(the weights' sums over the row, and over the column)."""
            return -sum(gain * _ratio(normalizer_of(s), n) for s, n, gain in zip(states, given, gains))

        late = (lambda: dz_pos() * matrix.params[0]) if relative else None
        made = gradient_pass(matrix, *sides, wanted, late_positive=late)
        if relative:
            add_positive_params(matrix, made, dz_pos(), dots)
        found = [normalizer_of(state) for state in states]
    sums = [gain * _ratio(f, n) for f, n, gain in zip(found, given, gains)]
    total = sum(s.sum() for s in sums)
    da = -sums[0] if call.needs[-2] else None
    db = -sums[1] if call.needs[-1] else None
    row, col = found + [None] * (2 - len(found))
    return total, None, made.dx, made.dy, *params_of(call, made.dparams), da, db, row, col, dots


def _sigmoid_pass(call: Call, matrix: ScoreMatrix, dots: Tensor, gain: Tensor) -> Outputs:
    """The sigmoid loss's weighted sum, and its gradients."""
    z_pos = _z_pos(matrix, dots)
    positive_loss = -logsigmoid(z_pos)
    if True not in call.needs:
        rows, made = statistics_pass(matrix, cols=False)[0][0], Gradients()
    else:
        state = neutral_state(matrix, len(dots))
        dz_pos = -torch.sigmoid(-z_pos) * gain
        made = gradient_pass(matrix, Side(state, None, gain), Side(), Wanted(*call.wants), dz_pos * matrix.params[0])
        add_positive_params(matrix, made, dz_pos, dots)
        rows = state[0]
    total = (gain * (rows + positive_loss)).sum()
    return total, None, made.dx, made.dy, *params_of(call, made.dparams), *(None,) * 5


def _in_one_call(call: Call, backend: backends.Backend) -> Outputs:
    """A small matrix: the backend gives value and weights in one call."""
    problem, (term, relative, _) = call.problem, call.settings
    *rests, row_gain, col_gain, row_logit, col_logit = call.extras
    x, y, scores = whole_scores(problem)
    given = rests
    if not relative:
        logits = (row_logit, col_logit)
        given = [None if rest is None else _two_numbers(rest, logit) for rest, logit in zip(rests, logits)]
    value, dscale, dbias, row, col, dots = backend.weighted_matrix(
        SIGMOID if term == "sigmoid" else EXPONENTIAL, scores, problem, Side(None, given[0], row_gain),
        Side(None, given[1], col_gain), _share(call), relative,
    )  # fmt: skip
    da = db = None
    if call.needs[-2] or call.needs[-1]:
        gains = _gains(call)
        da = -gains[0] * _ratio(row, given[0]) if call.needs[-2] else None
        db = -gains[1] * _ratio(col, given[1]) if call.needs[-1] else None
    return value, None, *whole_gradients(call, scores, x, y), dscale, dbias, da, db, row, col, dots


def _fake(call: Call) -> Outputs:
    """The shapes of what `_forward` returns."""
    problem, (term, _, reduction) = call.problem, call.settings
    x, y, dtype, saved = problem.x, problem.y, score_dtype(problem.x.dtype), saved_dtype(problem.x.dtype)
    n, m = x.shape[0], y.shape[0]
    two = call.extras[1] is not None
    exponential = term == "exponential"
    found = (
        x.new_empty((2, n), dtype=dtype) if exponential else None,
        x.new_empty((2, m), dtype=dtype) if exponential and two else None,
        x.new_empty(n, dtype=dtype) if exponential and problem.positives.exist else None,
    )
    if reduction == "none":
        col_values = x.new_empty(m, dtype=dtype) if two else None
        return x.new_empty(n, dtype=dtype), col_values, *(None,) * 6, *found
    want_x, want_y, _ = call.wants
    if _fits_one_call(call, _backend(call)):
        saved = dtype
    return (
        x.new_empty((), dtype=dtype),
        None,
        x.new_empty(x.shape, dtype=saved) if want_x else None,
        y.new_empty(y.shape, dtype=saved) if want_y else None,
        *(x.new_empty((), dtype=torch.float64) if need else None for need in call.needs[2:4]),
        x.new_empty(n, dtype=dtype) if call.needs[-2] else None,
        x.new_empty(m, dtype=dtype) if call.needs[-1] else None,
        *found,
    )


# ---- autograd ----


def _gradients(call: Call, kept: Outputs, upstream: Outputs) -> Outputs:
    """The pass with upstream's gains: every row has a factor of its own."""
    dots, matrix, relative = kept[-1], _matrix(call, _backend(call)), call.settings[1]
    if dots is None:
        dots = _dots(matrix, relative)
    elif relative:
        matrix.params[2] = dots.sum() / max(len(dots), 1)
    n, m = (v.shape[0] for v in (call.problem.x, call.problem.y))
    factors = zip(upstream, (n, m) if call.extras[1] is not None else (n,))
    gains = [matrix.params.new_zeros(length) if g is None else g.contiguous() for g, length in factors]
    _, _, dx, dy, dscale, dbias, da, db, *_ = _pass(call, matrix, dots, *[*gains, None][:2])
    made = (dx, dy, dscale, dbias, None, None, None, None, None, None, da, db)
    found = zip(made, call.tensors, call.needs)
    return tuple([like(g, t) if need and g is not None else None for g, t, need in found])


def _dense(call: Call, rows: slice, turned: bool) -> Outputs:
    """The values of some rows (turned: columns), or their weighted sum, in operations of torch."""
    (term, relative, reduction), (a, b, row_gain, col_gain, *logits) = call.settings, call.extras
    z, z_pos = dense_logits(call.problem, rows, turned)
    if term == "sigmoid":
        values = torch.nn.functional.softplus(z, threshold=1e9).sum(1) - logsigmoid(z_pos)
        gain = row_gain
    else:
        normalizer, gain = (b, col_gain) if turned else (a, row_gain)
        shift, rest = dense_normalizer(z)
        logit = logits[turned]
        start = z_pos if relative else 0.0 if logit is None else logit[rows]
        values = torch.exp((shift - start) + (rest - normalizer[rows]))
    if reduction != "none":
        weighted = _share(call) * values if gain is None else gain[rows] * values
        return weighted.sum(), None
    return (None, values) if turned else (values, None)


weighted_sum = register(
    Primitive(
        "weighted_sum",
        results=2,
        outputs=11,
        forward=_forward,
        fake=_fake,
        gradients=_gradients,
        dense=_dense,
        two_sided=lambda call: call.extras[1] is not None,
        made=(0, 1, 2, 3, 10, 11),
        found=3,
    )
)
