"""Sums of exponentials whose normalisers are known beforehand: value and gradients of a sum in one pass.

value_i = k sum_j exp(z_ij - a_i) over negatives + c u_i - log u_i - e, of rows, and of columns with b_j; only the sum
has gradients. With a_i = z_i,p(i) - log u_i it is the decomposable loss's row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..backends.base import Prepared
from ..engine import strategy
from ..engine.driver import gradient_pass, neutral_state, normalizer_of, positive_dots, positive_logits, statistics_pass
from ..engine.matrix import COL_BIAS, PROBLEM_TENSORS, Problem, ScoreMatrix
from ..panels.panel import Side
from ..panels.size import saved_dtype, score_dtype
from ..panels.terms import EXPONENTIAL
from .parts import add_positive_params, params_of, wanted_of, whole_gradients, whole_scores
from .prepared import prepared_for
from .registration import register
from .second import dense_logits, dense_normalizer
from .shared import Call, Outputs, Primitive, like

__all__ = ["ExponentialSums", "constants_of", "exponential_sums", "printed", "rests_of", "two_sum"]


@dataclass(frozen=True)
class ExponentialSums:
    """What :func:`exponential_sums` gives."""

    #: a mean or a sum over rows, with two directions the mean of both; or the rows' values [N], weighted
    values: Tensor
    #: the log-sum-exps that were found, (shift, rest) [2, N] and [2, M]; not differentiable
    normalizers: list[Tensor]
    #: the positives' dot products [N]; not differentiable
    dots: Tensor


def exponential_sums(
    problem: Problem,
    given: list[Tensor],
    logits: list[Tensor] | None,
    gain: Tensor | None,
    reduction: str,
    numbers: tuple[float, float, float],
    *,
    values_alone: bool = False,
) -> ExponentialSums:
    """u_i (c + k sum_j exp(z_ij - z_i,p(i))) - log u_i - excess, the sum over negatives.

    Parameters
    ----------
    problem : Problem
        The score matrix.
    given : list of Tensor
        -log u of the rows [N], and perhaps of the columns [M]; not differentiated, and free to change before the
        backward pass.
    logits : list of Tensor, optional
        The positives' logits, as many, differentiable; without them they are the matrix's own.
    gain : Tensor, optional
        Weights [N] of rows, and of columns; with a mean, as shares of 1. Of rows of weight 0 nothing is computed.
    reduction : {"mean", "sum", "none"}
        A mean or a sum has gradients that come with it. With two directions it is the mean of both; so is every row's
        value ("none").
    numbers : tuple of float
        c, log k and what comes off every value.
    values_alone : bool
        Nobody asks for the normalisers and dot products that are found on the way.
    """
    two = len(given) == 2
    halved = gain / 2 if two and gain is not None else gain
    col_gain = halved.clone() if two and halved is not None else None
    extras = (*_padded(given), halved, col_gain, *_padded(logits))
    settings = logits is None, reduction, values_alone, printed(numbers)
    values, col_values, row, col, dots = weighted_sum(problem, extras, settings)
    if reduction == "none":
        values = (values + col_values) / 2 if two else values
        values = values if gain is None else gain * values
    return ExponentialSums(values, [row, col] if two else [row], dots)


def printed(numbers: Sequence[float]) -> str:
    """Numbers as text that keeps their bits: Dynamo takes no floats within what it prints."""
    return " ".join([number.hex() for number in numbers])


@lru_cache(maxsize=256)
def _rule(settings: tuple[Any, ...]) -> tuple[float, float, float]:
    """c, log k and the excess."""
    c, log_k, excess = map(float.fromhex, settings[3].split())
    return c, log_k, excess


def rests_of(given: Tensor, log_negative_scale: float, gain: Tensor | None) -> Tensor:
    """What u_i k sum_j exp(h_ij) = sum_j exp(h_ij - rest_i) counts from [n]; +inf: there are no negatives.

    So it is where a row does not count, for it must not overflow, however stale its normaliser.
    """
    rests = given if log_negative_scale == 0 else given - log_negative_scale
    return rests if gain is None else rests.masked_fill(gain == 0, math.inf)


def constants_of(given: Tensor, positive_constant: float, excess: float, gain: Tensor | None) -> Tensor:
    """c u - log u - excess [n], 0 where a row does not count; without a constant no u, however large, counts.

    By u - 1, so that values near 0 keep their digits.
    """
    c = positive_constant
    made = given
    if c:
        beside = torch.expm1(-given)
        made = given + (beside if c == 1 else c * beside)
    if c != excess:
        made = made + (c - excess)
    return made if gain is None else made.masked_fill(gain == 0, 0.0)


def _padded(vectors: list[Tensor] | None) -> list[Tensor | None]:
    """Two of them, None where there is none."""
    return [*(vectors or []), None, None][:2]


# ---- what is computed ----


def _two(call: Call) -> bool:
    """Whether columns have normalisers too."""
    return call.extras[1] is not None


def _share(call: Call) -> float:
    """What every row is multiplied by where rows have no weights of their own."""
    share = 1.0 / max(call.problem.x.shape[0], 1) if call.settings[1] == "mean" else 1.0
    return share / 2 if _two(call) else share


def _gains(call: Call) -> list[Tensor]:
    """The weights of rows [N], and of columns [M], of a sum."""
    x, y = call.problem.x, call.problem.y
    lengths = (x.shape[0], y.shape[0]) if _two(call) else (x.shape[0],)
    return [
        torch.full((n,), _share(call), dtype=score_dtype(x.dtype), device=x.device) if gain is None else gain
        for n, gain in zip(lengths, call.extras[2:4])
    ]


def _in_one_call(call: Call) -> bool:
    problem = call.problem
    return (
        call.settings[1] != "none"
        and not call.needs[COL_BIAS]
        and strategy.fits_one_call(problem.backend(), problem.x.shape[0], problem.y.shape[0], problem.workspace_bytes)
    )


def _prepared(call: Call) -> Prepared | None:
    """How a small matrix on a GPU is computed, gradients with the value."""
    relative, reduction, values_alone, _ = call.settings
    if not (relative and values_alone) or reduction == "none":
        return None
    share = 1.0 if call.extras[2] is not None else _share(call)
    return prepared_for(call, "ratio", share, _two(call), _rule(call.settings))


def _forward(call: Call) -> Outputs:
    """Values; the gradients of a sum, in the order of `_MADE`; found normalisers of rows, of columns, and dots."""
    if _in_one_call(call):
        return _whole(call)
    matrix = _matrix(call)
    dots = _dots(call, matrix)
    if call.settings[1] != "none" and True in call.needs:
        return _pass(call, matrix, dots, _gains(call))
    found = [normalizer_of(state) for state in statistics_pass(matrix, cols=_two(call)) if state is not None]
    values = [_ratio(own, given) for own, given in zip(found, _given(call, matrix, dots))]
    if call.settings[1] != "none":
        total = torch.stack([(gain * each).sum() for gain, each in zip(_gains(call), values)]).sum()
        return total + _constant(call), None, *(None,) * 7, *_both(found), dots
    values = [each + constant for each, constant in zip(values, _constants(call))]
    return *_both(values), *(None,) * 7, *_both(found), dots


def _rests(call: Call) -> list[Tensor | None]:
    """What exponentials of rows, and of columns, are relative to beside the positive's logit."""
    _, log_k, _ = _rule(call.settings)
    sides = zip(call.extras[:2], call.extras[2:4])
    return [None if given is None else rests_of(given, log_k, gain) for given, gain in sides]


def _constants(call: Call) -> list[Tensor]:
    """What the values of rows [N], and of columns, hold beside the stream."""
    c, _, excess = _rule(call.settings)
    sides = zip(call.extras[:2], call.extras[2:4])
    return [constants_of(given, c, excess, gain) for given, gain in sides if given is not None]


def _constant(call: Call) -> Tensor:
    """The same of a mean or a sum."""
    made, gains = _constants(call), [gain for gain in call.extras[2:4] if gain is not None]
    if gains:
        made = [gain * each for gain, each in zip(gains, made)]
    total = made[0].sum() if len(made) == 1 else made[0].sum() + made[1].sum()
    return total if gains else _share(call) * total


def _both(vectors: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Those of rows, and of columns if there are any."""
    return vectors[0], vectors[1] if len(vectors) == 2 else None


def _matrix(call: Call) -> ScoreMatrix:
    problem = call.problem
    backend, dtype = problem.backend(), saved_dtype(problem.x.dtype)
    return ScoreMatrix.of(problem, EXPONENTIAL, backend, dtype, centered=call.settings[0])


def _dots(call: Call, matrix: ScoreMatrix) -> Tensor:
    """The positives' dot products [N], 0 where there is none.

    Where a row's weights sum to 0 with its positive's, the dots' mean becomes the center of the scores.
    """
    if not matrix.positives.exist:
        return matrix.params.new_zeros(len(matrix.x))
    dots = positive_dots(matrix)
    if call.settings[0] and matrix.dots is None:
        matrix.params[2] = dots.sum() / max(len(dots), 1)
    return dots


def _given(call: Call, matrix: ScoreMatrix, dots: Tensor) -> list[Tensor]:
    """The given normalisers of rows, and of columns, as two numbers (shift, rest) [2, n]: nothing is rounded away."""
    logits = (positive_logits(matrix, dots),) * 2 if call.settings[0] else call.extras[4:]
    return [_two_numbers(rest, logit) for rest, logit in zip(_rests(call), logits) if rest is not None]


def _two_numbers(rest: Tensor, logit: Tensor | None) -> Tensor:
    """logit + rest as (shift, rest) [2, n], the shift finite; a rest of +inf says that there are no negatives."""
    if logit is None:
        endless = rest == torch.inf
        return torch.stack([rest.masked_fill(endless, 0.0), torch.zeros_like(rest).masked_fill_(endless, torch.inf)])
    return torch.stack(two_sum(logit, rest))


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a + b as (rounded sum, exact remainder) [n]; where one is infinite, as (a, b)."""
    total = a + b
    part = total - a
    rest = (a - (total - part)) + (b - part)
    infinite = (a.abs() == torch.inf) | (b.abs() == torch.inf)
    return torch.where(infinite, a, total), torch.where(infinite, b, rest)


def _ratio(found: Tensor, given: Tensor) -> Tensor:
    """exp(found - given) [n] of two normalisers (shift, rest); nothing found gives 0."""
    return torch.exp((found[0] - given[0]) + (found[1] - given[1]))


def _pass(call: Call, matrix: ScoreMatrix, dots: Tensor, gains: list[Tensor]) -> Outputs:
    """Values and gradients in one pass, for gains known beforehand."""
    given, relative = _given(call, matrix, dots), call.settings[0]
    states = [neutral_state(matrix, n.shape[1]) for n in given]
    sides = [Side(state, n, gain) for state, n, gain in zip(states, given, gains)]

    def sums() -> list[Tensor]:
        """gain * value, of rows and of columns."""
        return [gain * _ratio(normalizer_of(s), n) for s, n, gain in zip(states, given, gains)]

    def dz_pos() -> Tensor:
        """dL/dz_pos [N] = -(the weights' sums over the row, and over the column)."""
        return -torch.stack(sums()).sum(0)

    late = (lambda: dz_pos() * matrix.params[0]) if relative else None
    col = sides[1] if len(sides) == 2 else Side()
    made = gradient_pass(matrix, sides[0], col, wanted_of(call), late_positive=late)
    if relative:
        add_positive_params(matrix, made, dz_pos(), dots)
    weighted = sums()
    total = torch.stack([each.sum() for each in weighted]).sum()
    of_logits = [-each if need else None for each, need in zip([*weighted, *weighted], call.needs[-2:])]
    found = _both([normalizer_of(s) for s in states])
    params = params_of(call, made.dparams)
    if call.settings[1] != "none":
        total = total + _constant(call)
    return total, None, made.dx, made.dy, *params, made.dcandidates, *of_logits, *found, dots


def _whole(call: Call) -> Outputs:
    """A small matrix: the backend gives value and weights in one call."""
    problem, relative = call.problem, call.settings[0]
    rests, row_gain, col_gain, logits = _rests(call), *call.extras[2:4], call.extras[4:]
    whole = whole_scores(problem)
    given = rests
    if not relative:
        given = [None if rest is None else _two_numbers(rest, logit) for rest, logit in zip(rests, logits)]
    value, dscale, dbias, found, dots = problem.backend().weighted_matrix(
        whole.scores, problem, Side(None, given[0], row_gain), Side(None, given[1], col_gain), _share(call), relative,
        whole.positive_weights,
    )  # fmt: skip
    of_logits: list[Tensor | None] = [None, None]
    if True in call.needs[-2:]:
        sides = zip(_gains(call), found, given, call.needs[-2:])
        of_logits = [-gain * _ratio(own, n) if need and n is not None else None for gain, own, n, need in sides]
    padded = [*of_logits, None, None][:2]
    value = value + _constant(call)
    return value, None, *whole_gradients(call, whole, dscale, dbias), None, *padded, *_both(found), dots


def _fake(call: Call) -> Outputs:
    """The shapes of what `_forward` returns."""
    problem, reduction, two = call.problem, call.settings[1], _two(call)
    x, y, dtype = problem.x, problem.y, score_dtype(problem.x.dtype)
    n, m = x.shape[0], y.shape[0]
    found = (
        x.new_empty((2, n), dtype=dtype),
        x.new_empty((2, m), dtype=dtype) if two else None,
        x.new_empty(n, dtype=dtype),
    )
    if reduction == "none":
        col_values = x.new_empty(m, dtype=dtype) if two else None
        return x.new_empty(n, dtype=dtype), col_values, *(None,) * 7, *found
    saved, of_params = saved_dtype(x.dtype), dtype if _in_one_call(call) else torch.float64
    want_x, want_y, _ = call.wants
    return (
        x.new_empty((), dtype=dtype),
        None,
        x.new_empty(x.shape, dtype=saved) if want_x else None,
        y.new_empty(y.shape, dtype=saved) if want_y else None,
        *(x.new_empty((), dtype=of_params) if need else None for need in call.needs[2:4]),
        y.new_empty(m, dtype=dtype) if call.needs[COL_BIAS] else None,
        x.new_empty(n, dtype=dtype) if call.needs[-2] else None,
        x.new_empty(m, dtype=dtype) if call.needs[-1] else None,
        *found,
    )


# ---- autograd ----


def _gradients(call: Call, kept: Outputs, upstream: Outputs) -> Outputs:
    """The pass with upstream's gains: every row has a factor of its own."""
    matrix = _matrix(call)
    dots = _dots(call, matrix)
    n, m = call.problem.x.shape[0], call.problem.y.shape[0]
    factors = zip(upstream, (n, m) if _two(call) else (n,))
    gains = [matrix.params.new_zeros(length) if g is None else g.contiguous() for g, length in factors]
    made = _pass(call, matrix, dots, gains)
    by_place = dict(zip(_MADE, made[2:]))
    wanted = enumerate(zip(call.tensors, call.needs))
    return tuple([like(by_place[i], t) if need else None for i, (t, need) in wanted])


def _dense(call: Call, rows: slice, turned: bool) -> Outputs:
    """The same of some rows (turned: columns), or their weighted sum, without constants, in operations of torch."""
    relative, reduction, *_ = call.settings
    rest, gain, logit = _rests(call)[turned], call.extras[2 + turned], call.extras[4 + turned]
    z, z_pos = dense_logits(call.problem, rows, turned)
    shift, found = dense_normalizer(z)
    start = z_pos if relative else torch.zeros_like(z_pos) if logit is None else logit[rows]
    assert rest is not None
    values = torch.exp((shift - start) + (found - rest[rows]))
    if reduction != "none":
        weighted = _share(call) * values if gain is None else gain[rows] * values
        return weighted.sum(), None
    return (None, values) if turned else (values, None)


#: x, y, scale, bias, the columns' biases, and the logits of the rows' and the columns' positives, which come after four
#: other extras.
_MADE = (0, 1, 2, 3, COL_BIAS, PROBLEM_TENSORS + 4, PROBLEM_TENSORS + 5)

weighted_sum = register(
    Primitive(
        "weighted_sum",
        results=2,
        outputs=12,
        forward=_forward,
        fake=_fake,
        gradients=_gradients,
        dense=_dense,
        two_sided=_two,
        prepared=_prepared,
        made=_MADE,
        found=3,
        copied=(PROBLEM_TENSORS, PROBLEM_TENSORS + 1),
    )
)
