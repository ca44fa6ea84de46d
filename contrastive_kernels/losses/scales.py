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
from ..arguments.pairs import require_one_rank, with_biases
from ..arguments.reduction import row_gains
from ..backends import registry
from ..engine.matrix import Problem
from ..engine.strategy import one_walk_with_scales
from ..operators.softmax_scaled import scaled_softmax_loss
from ..panels.size import score_dtype
from .biased import one_way
from .ceilings import own_logits, with_margin

__all__ = ["check_scales", "is_by_row", "pairs_with_scales", "require_no_corrections", "scaled", "widened"]


def is_by_row(logit_scale: Any) -> bool:
    """Whether every row has a scale of its own."""
    return isinstance(logit_scale, Tensor) and logit_scale.dim() == 1 and logit_scale.numel() != 1


def check_scales(
    x: Tensor, y: Tensor, logit_scale: Any, ranks: object = None, padded: bool = False
) -> tuple[Tensor, Tensor, Tensor | float]:
    """x [N, D], y and the scale; of scales [N], x times its rows' in the dtype of the scores, y in it too, and 1.

    Rounded to 16 bits, a row times its scale would be another row: its logits would be off by more than the products'
    own rounding. What comes back to the scales is exact then, and is so for a scale of 0.
    """
    if not is_by_row(logit_scale):
        return x, y, check_scale(x, logit_scale)
    require_one_rank(ranks, "logit_scale of shape [N]")
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
    **options: Any,
) -> Tensor:
    """The mean of both directions of matching rows x, y [N, D], each with its own scales.

    One walk over the scores serves both, or each direction is one of its own, of features times their scales: see
    :func:`.strategy.one_walk_with_scales`.
    """
    x, y = problem.x, problem.y
    pair = (logit_scale, logit_scale) if isinstance(logit_scale, Tensor) else check_pair(logit_scale, "logit_scale")
    biases = (candidate_bias, candidate_bias) if isinstance(candidate_bias, Tensor) else candidate_bias
    if biases is not None:
        biases = check_pair(biases, "candidate_bias")
    numbers = ("", "") if isinstance(logit_scale, Tensor) else ("[0]", "[1]")
    scales = [
        check_vector(each, f"logit_scale{number}", x.shape[0], x, differentiable=True)
        for each, number in zip(pair, numbers)
    ]
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
        return scaled_softmax_loss(wide, (scales[0], scales[1]), gains, reduction, **options)
    there = replace(problem, scale=1.0)
    back = replace(there, x=y, y=x, pairs=problem.pairs.turned())
    losses = []
    for one, scale, bias in zip((there, back), scales, (None, None) if biases is None else (biases[1], biases[0])):
        own, others = scaled(one.x, one.y, scale, padded=bias is not None)
        direction = replace(one, x=own, y=others)
        if bias is not None:
            direction = replace(direction, pairs=with_biases(direction.pairs, bias, own, others))
        if margin is not None:
            direction = with_margin(direction, margin)
        losses.append(one_way(direction, weight, reduction, options))
    return (losses[0] + losses[1]) / 2
