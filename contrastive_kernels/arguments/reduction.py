"""From the losses of rows to one number: weights, means, and the gains that a mean gives its rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ..panels.size import score_dtype
from .checks import check_vector

__all__ = ["DEFAULT_WORKSPACE_BYTES", "reduce_losses", "row_gains", "row_weights"]


#: Bound of the memory that holds panels of scores.
DEFAULT_WORKSPACE_BYTES = 64 * 2**20


def row_weights(weight: Tensor | None, length: int, x: Tensor) -> Tensor | None:
    """The weights [N] in the dtype of the scores."""
    return None if weight is None else check_vector(weight, "weight", length, x)


def reduce_losses(losses: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """The weighted mean (by the sum of weights; 0 of nothing), the weighted sum, or the weighted rows."""
    if weight is not None:
        losses = losses * weight
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if weight is None:
        return losses.sum() / max(losses.shape[0], 1)
    return losses.sum() / _nonzero_sum(weight)


def row_gains(weight: Tensor | None, reduction: str, x: Tensor) -> Tensor:
    """dL/d(loss of row i) [N] for a mean or a sum."""
    if weight is None:
        share = 1.0 / max(x.shape[0], 1) if reduction == "mean" else 1.0
        return torch.full((x.shape[0],), share, dtype=score_dtype(x.dtype), device=x.device)
    return weight / _nonzero_sum(weight) if reduction == "mean" else weight


def _nonzero_sum(weight: Tensor) -> Tensor:
    """The sum of the weights, or 1 where it is 0: a mean of nothing is 0, not NaN."""
    total = weight.sum()
    return total.masked_fill(total == 0, 1.0)
