"""From the losses of rows to one number: weights, means, and the gains that a mean gives its rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..panels.size import score_dtype
from .checks import require_vector
from .options import DEFAULT_WORKSPACE_BYTES

__all__ = ["DEFAULT_WORKSPACE_BYTES", "gains_or_weights", "reduce_losses", "row_gains", "row_weights"]


def row_weights(weight: Any, length: int, x: Tensor) -> Tensor | None:
    """The weights [N], at least as wide as scores: float64 ones may be smaller than float32 holds, and count."""
    if weight is None:
        return None
    require_vector(weight, "weight", length, x)
    return weight if weight.dtype == torch.float64 else weight.to(score_dtype(x.dtype)).contiguous()


def row_gains(weight: Any, length: int, x: Tensor, reduction: str, repeats: int = 1) -> Tensor | None:
    """dL/d(loss of row i) [repeats * N] where rows have weights: a weighted mean divides by their sum; None without."""
    weights = row_weights(weight, length, x)
    if weights is None:
        return None
    gains = _gains(weights, reduction, score_dtype(x.dtype))
    if repeats == 1:
        return gains
    return gains.repeat(repeats) / (repeats if reduction == "mean" else 1)


def gains_or_weights(
    weight: Any, length: int, x: Tensor, reduction: str, ranks: object, repeats: int = 1
) -> Tensor | None:
    """The gains of rows; where several ranks share the mean, the weights of this rank's."""
    if ranks is not None:
        return row_weights(weight, length, x)
    return row_gains(weight, length, x, reduction, repeats)


def reduce_losses(losses: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """The weighted mean (by the sum of weights; 0 of nothing), the weighted sum, or the weighted rows.

    A row that does not count may have overflowed.
    """
    if weight is None:
        total = losses.shape[0] if reduction == "mean" else 1
        return losses if reduction == "none" else losses.sum() / max(total, 1)
    gains = _gains(weight, reduction, losses.dtype)
    losses = losses.masked_fill(gains == 0, 0.0) * gains
    return losses if reduction == "none" else losses.sum()


def _gains(weights: Tensor, reduction: str, dtype: torch.dtype) -> Tensor:
    return _shares(weights, dtype) if reduction == "mean" else weights.to(dtype)


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
