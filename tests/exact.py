"""Logits that are equal and as large as one likes: what float64 says is known to the last digits, and so is ours.

The rule of tolerance.py allows for a logit's own rounding, which at 1e8 is more than the loss. Here no logit is
rounded, and nothing is allowed for it.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from problems import BY_NAME, Inputs, Outcome, Problem, run, upstream_like
from tolerance import UNITS

from contrastive_kernels import reference

__all__ = ["EQUAL", "TOLERANCE", "assert_exact", "equal"]

EQUAL = ("equal-1e4", "equal-1e6", "equal-1e8")
#: Of values and of dscale, absolute or relative, whatever the logits.
TOLERANCE = 1e-6


def equal(name: str, n: int) -> Problem:
    """The problem of one of these names with n equal logits."""
    return replace(BY_NAME[name], name=f"{name}-of-{n}", n=n)


def assert_exact(inputs: Inputs, loss: str, reduction: str, ours: Outcome) -> None:
    """Value and gradients are float64's, where logits are equal."""
    n, eps = len(inputs.x), torch.finfo(inputs.x.dtype).eps
    want = run(reference, inputs, loss, torch.float64, reduction=reduction)
    if loss in ("info_nce", "clip_loss"):  # the truth itself, and not only what the reference makes of it
        torch.testing.assert_close(want.value, torch.full_like(want.value, math.log(n)), rtol=1e-7, atol=0)
    for name in ("value", "scale", "bias"):
        if name == "value" or want.gradients.get(name) is not None:
            torch.testing.assert_close(ours[name].double(), want[name], rtol=TOLERANCE, atol=TOLERANCE)
    # dx and dy are features times sums of |w|, which for a row's loss is at most 2 in each direction; sigmoids: N
    upstream = upstream_like(want.value, inputs.problem.seed).abs().max() / (n if reduction == "mean" else 1)
    weights = upstream * (n if loss == "sigmoid" else 4)
    allowed = UNITS * eps * weights * inputs.x.abs().max().double() * inputs.scale.double()
    for name in ("x", "y"):
        error = (ours[name].double() - want[name]).abs().max()
        assert error <= allowed, f"{loss}, {reduction}: d{name} is off by {error}, of {allowed} allowed"
