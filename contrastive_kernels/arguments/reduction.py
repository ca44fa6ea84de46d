"""From the losses of rows to one number: weights, means, and the gains that a mean gives its rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import check_vector
from .options import DEFAULT_WORKSPACE_BYTES

__all__ = ["DEFAULT_WORKSPACE_BYTES", "reduce_losses", "row_gains", "row_weights"]


def row_weights(weight: Any, length: int, x: Tensor) -> Tensor | None:
    """The weights [N] in the dtype of the scores."""
    return None if weight is None else check_vector(weight, "weight", length, x)


def row_gains(weight: Any, length: int, x: Tensor, reduction: str) -> Tensor | None:
    """dL/d(loss of row i) [N] where rows have weights: a weighted mean divides by their sum; None without weights."""
    if weight is None:
        return None
    checked = check_vector(weight, "weight", length, x)
    return _shares(weight, checked.dtype) if reduction == "mean" else checked


def reduce_losses(losses: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """The weighted mean (by the sum of weights; 0 of nothing), the weighted sum, or the weighted rows."""
    if reduction == "mean":
        if weight is None:
            return losses.sum() / max(losses.shape[0], 1)
        return (losses * _shares(weight, losses.dtype)).sum()
    if weight is not None:
        losses = losses * weight
    return losses if reduction == "none" else losses.sum()


def _shares(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """weight / sum(weight) [N], 0 where the sum is 0: a mean of nothing is 0, not NaN.

    In float64 and relative to the largest weight, so that no sum overflows and no weight vanishes.
    """
    if not len(weight):
        return weight.to(dtype)
    wide = weight.to(torch.float32 if weight.device.type == "mps" else torch.float64)
    largest = wide.abs().amax()
    wide = wide / largest.masked_fill(largest == 0, 1.0)
    total = wide.sum()
    return (wide / total.masked_fill(total == 0, 1.0)).to(dtype)
