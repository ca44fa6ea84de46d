"""What the E-step knows, and the small questions that the loss over a data set asks of its arguments."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..arguments.checks import (
    check_count,
    check_dense,
    check_number,
    check_positives,
    check_vector,
    is_number,
    scale_tensor,
    shown,
)

__all__ = [
    "Expectation",
    "check_choice",
    "check_expectation",
    "check_negatives",
    "positive_scores",
    "ratio_of",
    "wide",
]


#: Numbers of a block of products of features, a megabyte of float32.
_BLOCK = 2**18


@dataclass(frozen=True)
class Expectation:
    """What the E-step knows of a batch before it is seen, [N, directions] each, on the index's device."""

    index: Tensor
    #: logarithm of the stored mean of exp(z) over negatives, and visits so far
    log_mean: Tensor
    visits: Tensor
    #: log(u Zbar): the draw, or 0
    log_weight: Tensor
    direction: int | None
    #: some sample may not have been met yet
    cold: bool

    def to(self, device: torch.device) -> Expectation:
        """The same on the features' device; the index stays where it is."""
        numbers = {name: getattr(self, name).to(device, wide(device)) for name in ("log_mean", "log_weight")}
        values = {"visits": self.visits.to(device), **numbers}
        return replace(self, **values)


def check_expectation(expectation: Any) -> Expectation:
    """What `e_step` gave."""
    if not isinstance(expectation, Expectation):
        raise TypeError(f"expectation: expected what e_step returns; got {type(expectation).__name__}")
    return expectation


def wide(device: torch.device) -> torch.dtype:
    """What logarithms of means are computed in: float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def check_negatives(negatives: Any) -> str | int:
    if isinstance(negatives, str):
        if negatives not in ("dataset", "batch"):
            raise ValueError(f"negatives: expected 'dataset', 'batch' or an int; got {negatives!r}")
        return negatives
    if isinstance(negatives, bool) or not isinstance(negatives, int):
        raise TypeError(f"negatives: expected 'dataset', 'batch' or an int; got {type(negatives).__name__}")
    return check_count(negatives, "negatives")


def check_choice(value: Any, name: str, choices: tuple[str, ...]) -> str | float:
    """One of the names, or a finite number."""
    if isinstance(value, str):
        if value in choices:
            return value
    elif is_number(value) and abs(value) <= sys.float_info.max:
        return float(value)
    raise ValueError(f"{name}: expected {', '.join(map(repr, choices))} or a finite number; got {shown(value)}")


@torch.no_grad()
def positive_scores(
    x: Tensor, y: Tensor, logit_scale: float | Tensor, positives: int | Tensor | None, given: Tensor | None
) -> Tensor:
    """z_i,p(i) [N] in the dtype of the scores."""
    if given is not None:
        return check_vector(given, "positive_logits", len(x), x, differentiable=True).detach()
    scale = scale_tensor(x, logit_scale)
    index, offset = check_positives(positives, x, y)
    parts, rows = [], max(1, _BLOCK // x.shape[1])
    for start in range(0, len(x), rows):
        stop = min(start + rows, len(x))
        partner = y[start + (offset or 0) : stop + (offset or 0)] if index is None else y[index[start:stop]]
        parts.append((x[start:stop].to(scale.dtype) * partner.to(scale.dtype)).sum(1))
    return scale * torch.cat(parts) if parts else x.new_zeros(0, dtype=scale.dtype)


def ratio_of(ratio: Any) -> Tensor:
    """A number above 0, or a tensor of one element."""
    if not isinstance(ratio, Tensor):
        return torch.tensor(check_number(ratio, "ratio", positive=True), dtype=torch.float64, device="cpu")
    check_dense(ratio, "ratio")
    if ratio.numel() != 1 or not ratio.is_floating_point():
        raise TypeError(
            f"ratio: expected a number or a floating-point tensor of one element; got {ratio.dtype} of shape "
            f"{list(ratio.shape)}"
        )
    if ratio.is_meta:
        raise ValueError("ratio: expected a tensor that holds a value; got one on the meta device")
    return ratio.detach().reshape(())
