"""A logit scale of every row, as an individual temperature is: folded into the rows, in the dtype of the scores.

Those of both directions are told to the panels where these know of them: one score has two logits then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..arguments.checks import check_pair, check_scale, check_vector
from ..arguments.pairs import with_biases
from ..arguments.reduction import row_gains
from ..backends import registry
from ..distributed.group import Ranks
from ..distributed.losses import over_ranks
from ..distributed.rules import Softmax
from ..engine.matrix import Problem
from ..engine.strategy import one_walk_with_scales
from ..operators.softmax_scaled import scaled_softmax_loss
from ..panels.size import score_dtype
from .biased import one_way
from .ceilings import own_logits, with_margin
from .metrics import LossMetrics, metrics_of_both, with_metrics, with_metrics_over_ranks

__all__ = [
    "check_scales",
    "check_scales_of_both",
    "is_by_row",
    "pairs_with_scales",
    "pairs_with_scales_over_ranks",
    "require_no_corrections",
    "scaled",
    "widened",
]


def is_by_row(logit_scale: Any) -> bool:
    """Whether every row has a scale of its own."""
    return isinstance(logit_scale, Tensor) and logit_scale.dim() == 1 and logit_scale.numel() != 1


def check_scales(x: Tensor, y: Tensor, logit_scale: Any, padded: bool = False) -> tuple[Tensor, Tensor, Tensor | float]:
    """x [N, D], y and the scale; of scales [N], x times its rows' in the dtype of the scores, y in it too, and 1.

    Rounded to 16 bits, a row times its scale would be another row: its logits would be off by more than the products'
    own rounding. What comes back to the scales is exact then, and is so for a scale of 0.
    """
    if not is_by_row(logit_scale):
        return x, y, check_scale(x, logit_scale)
    scales = check_vector(logit_scale, "logit_scale", x.shape[0], x, differentiable=True)
    return *scaled(x, y, scales, padded), 1.0


def scaled(x: Tensor, y: Tensor, scales: Tensor, padded: bool = False) -> tuple[Tensor, Tensor]:
    """x [N, D] times its rows' scales [N], and y, in the dtype of the scores.

    `padded`: rows that hold NaN or infinity may be padding, and get no gradient.
    """
    dtype = score_dtype(x.dtype)
    x, y = x.to(dtype), y.to(dtype)
    if not padded:
        return x * scales[:, None], y
    unknown = ~x.isfinite().all(1, keepdim=True)
    by_row = scales[:, None]
    return torch.where(unknown, x.detach() * by_row.detach(), x.masked_fill(unknown, 0.0) * by_row), y


def check_scales_of_both(x: Tensor, logit_scale: Any) -> tuple[Tensor, Tensor]:
    """Scales of matching rows and columns [N], from a pair or one of both, in the dtype of the scores."""
    pair, numbers = (logit_scale, logit_scale), ("", "")
    if not isinstance(logit_scale, Tensor):
        pair, numbers = check_pair(logit_scale, "logit_scale"), ("[0]", "[1]")
    of_rows, of_cols = (
        check_vector(each, f"logit_scale{number}", x.shape[0], x, differentiable=True)
        for each, number in zip(pair, numbers)
    )
    return of_rows, of_cols


def _both_ways(problem: Problem, scales: tuple[Tensor, Tensor], *, padded: bool = False) -> tuple[Problem, Problem]:
    """Both directions of matching rows with scales of their own, as problems of features times their scales."""
    x, y = problem.x, problem.y
    there, back = scaled(x, y, scales[0], padded), scaled(y, x, scales[1], padded)
    plain = replace(problem, scale=1.0)
    turned = replace(plain, x=back[0], y=back[1], pairs=problem.pairs.turned())
    return replace(plain, x=there[0], y=there[1]), turned


def require_no_corrections(logit_scale: Any, **corrections: Any) -> None:
    """Those that take the features, or the one scale, themselves."""
    for name, value in corrections.items():
        if value is not None:
            raise ValueError(f"logit_scale: expected one number with {name}; got shape {list(logit_scale.shape)}")


def widened(features: Any, x: Tensor) -> Any:
    """Features that go with x in the dtype of the scores."""
    fits = isinstance(features, Tensor) and features.dtype == x.dtype
    return features.to(score_dtype(x.dtype)) if fits else features


def pairs_with_scales(
    problem: Problem,
    logit_scale: float | Tensor | Sequence[Tensor] | None,
    candidate_bias: Any,
    margin: Any,
    weight: Any,
    reduction: str,
    *,
    return_metrics: bool,
    **options: Any,
) -> Tensor | tuple[Tensor, LossMetrics]:
    """The mean of both directions of matching rows x, y [N, D], each with its own scales; perhaps with its metrics."""
    scales = check_scales_of_both(problem.x, logit_scale)
    loss = _mean_of_both(problem, scales, candidate_bias, margin, weight, reduction, options)
    if not return_metrics:
        return loss
    told = [with_metrics(loss, way, weight, reduction, **options)[1] for way in _both_ways(problem, scales)]
    return loss, metrics_of_both(*told)


def pairs_with_scales_over_ranks(
    problem: Problem,
    scales: tuple[Tensor, Tensor],
    weight: Tensor | None,
    reduction: str,
    ranks: Ranks,
    about: tuple[tuple[str, Any], ...],
    *,
    include_positive: bool,
    return_metrics: bool,
) -> Tensor | tuple[Tensor, LossMetrics]:
    """The same of the rows of all ranks, one direction after the other."""
    ways, rule = _both_ways(problem, scales), Softmax(include_positive=include_positive)
    about = (*rule.about, *about)
    there, back = (over_ranks(rule, ranks, "clip_loss", way, weight, reduction, about) for way in ways)
    loss = (there + back) / 2
    if not return_metrics:
        return loss
    told = [with_metrics_over_ranks(loss, way, weight, reduction, ranks, "clip_loss")[1] for way in ways]
    return loss, metrics_of_both(*told)


def _mean_of_both(
    problem: Problem,
    scales: tuple[Tensor, Tensor],
    candidate_bias: Any,
    margin: Any,
    weight: Any,
    reduction: str,
    options: dict[str, Any],
) -> Tensor:
    """One walk over the scores serves both, or each direction is one of its own, of features times their scales.

    See :func:`.strategy.one_walk_with_scales`.
    """
    x, y = problem.x, problem.y
    biases = (candidate_bias, candidate_bias) if isinstance(candidate_bias, Tensor) else candidate_bias
    if biases is not None:
        biases = check_pair(biases, "candidate_bias")
    dtype = score_dtype(x.dtype)
    problem = replace(problem, pairs=problem.pairs.guide_in(dtype))
    wide = replace(problem, x=x.to(dtype), y=y.to(dtype), scale=1.0)
    one_call = reduction != "none" and not options["smoothing"]
    backend = registry.get(registry.chosen_name(problem.engine.backend or None, x.device, dtype))
    if one_walk_with_scales(backend, x.shape[0], y.shape[0], biased=biases is not None, one_call=one_call):
        gains = row_gains(weight, x.shape[0], x, reduction)
        if margin is not None:
            logits = own_logits(wide)
            of_rows, of_cols = (logits * scale.detach() for scale in scales)
            wide = with_margin(wide, margin, both=True, logits=(of_rows, of_cols))
        return scaled_softmax_loss(wide, scales, gains, reduction, **options)
    losses = []
    of_columns = (None, None) if biases is None else (biases[1], biases[0])
    for direction, bias in zip(_both_ways(problem, scales, padded=biases is not None), of_columns):
        if bias is not None:
            pairs = with_biases(direction.pairs, bias, direction.x, direction.y)
            direction = replace(direction, pairs=pairs)
        if margin is not None:
            direction = with_margin(direction, margin)
        losses.append(one_way(direction, weight, reduction, options))
    return (losses[0] + losses[1]) / 2
