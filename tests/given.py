"""What goes with a problem's features: a guide's, and normalisers of the rows and columns."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from contrastive_kernels import reference


def guide_of(problem: Any, n: int, m: int, dtype: torch.dtype) -> dict[str, Any]:
    """A guide's features of rows and columns and its margin, as the losses take them; nothing without one.

    Features are small whole numbers, and margins are none: no rounding decides about a candidate, in any dtype.
    """
    if problem.guide is None:
        return {}
    g = torch.Generator().manual_seed(problem.seed + 2)
    x, y = (torch.randint(-2, 3, (k, 6), generator=g).float() for k in (n, m))
    y[: min(n, m)] += x[: min(n, m)]
    return {"guided": (x.to(dtype), y.to(dtype)), "guided_margin": problem.guide}


def normalizers_of(inputs: Any, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """The batch's own log Z by rows and by columns (or something as long), made stale."""
    problem = inputs.problem
    x, y, scale = inputs.x.double(), inputs.y.double(), inputs.scale.double()
    inputs.log_normalizer = (torch.zeros(len(x)), torch.zeros(len(y)))
    pair = "decomposable_pair" in problem.losses and len(x) == len(y)
    loss = "decomposable_pair" if pair else "decomposable"
    _, log_z = inputs.call(reference, loss, x, y, scale, 0.0, return_log_normalizer=True)
    rows, cols = log_z if pair else (log_z, torch.zeros(len(y)))
    noise = [0.3 * bool(problem.staleness) * torch.randn(len(v), generator=g) for v in (rows, cols)]
    made = [(v + problem.staleness + e).to(inputs.scale.dtype) for v, e in zip((rows, cols), noise)]
    return tuple(v.masked_fill(v == -math.inf, 0.0) for v in made)
