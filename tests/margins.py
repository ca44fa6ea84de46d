"""A margin about which rounding does not decide."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def margin_of(inputs: Any) -> Any:
    """The problem's margin, moved by up to a quarter, so that rounding does not decide about any candidate."""
    x, y, problem = inputs.x.double(), inputs.y.double(), inputs.problem
    sets = [(x, y, inputs.positives)]
    if "clip_loss" in problem.losses or "decomposable_pair" in problem.losses:
        sets.append((y, x, None))
    if "nt_xent" in problem.losses:
        views = torch.cat([x, y])
        sets.append((views, views, torch.arange(2 * len(x)).roll(len(x))))
    given = None if inputs.positive_logits is None else inputs.positive_logits[0].double()
    gaps = [_logits(*each, inputs.scale.double(), given) for each in sets]
    z, own, size = (torch.cat(v) for v in zip(*gaps))
    if not len(z):
        return problem.margin
    relative = isinstance(problem.margin, tuple)
    number = problem.margin[1] if relative else problem.margin
    moved = [number * (1 + 0.005 * k) for k in range(50)]
    nearest = [float(((z - (own * (1 + m) if relative else own + m)).abs() / size).min()) for m in moved]
    best = max(range(50), key=nearest.__getitem__)
    assert nearest[best] > 8 * torch.finfo(torch.float32).eps, f"{problem.name}: {nearest[best]:.3g}"
    return ("relative", moved[best]) if relative else moved[best]


def _logits(x: Tensor, y: Tensor, positives: Any, scale: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of every pair but the positives: the logit, the positive's, and what their rounding is relative to."""
    z, size = scale * (x @ y.T), scale.abs() * x.norm(dim=1)[:, None] * y.norm(dim=1)
    index = positives if isinstance(positives, Tensor) else torch.arange(len(x)) + (positives or 0)
    if own is None:
        own = z.gather(1, index[:, None])[:, 0]
    others = torch.arange(z.shape[1]) != index[:, None]
    own = own[:, None].expand_as(z)
    return z[others], own[others], (size + own.abs())[others] + 1e-30
