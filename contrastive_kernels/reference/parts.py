"""What the definitions have in common: which pairs count, sums over them, and from losses of rows to one number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = ["Ids", "LogNormalizer", "Margin", "Scale"]

Scale = float | Tensor
LogNormalizer = Tensor | Sequence[Tensor]
Ids = Tensor | Sequence[Tensor]
Margin = float | tuple[str, float]


def _one_or_both(value: LogNormalizer) -> list[Tensor]:
    """Rows alone, or rows and columns."""
    return [value] if isinstance(value, Tensor) else list(value)


def _positive_indices(x: Tensor, positives: int | Tensor | None) -> Tensor:
    """p(i) as indices [N]."""
    if isinstance(positives, Tensor):
        return positives
    return torch.arange(len(x), dtype=torch.int64, device=x.device) + (positives or 0)


def _alike(ids: Ids | None) -> Tensor | None:
    """Which rows and columns have equal ids [N, M]."""
    if ids is None:
        return None
    rows, cols = (ids, ids) if isinstance(ids, Tensor) else ids
    return rows[:, None] == cols


def _too_high(z: Tensor, positives: Tensor | None, z_pos: Tensor | None, margin: Margin | None) -> Tensor | None:
    """Which candidates lie above the positive by more than the margin [N, M], z without what is added to columns."""
    if margin is None:
        return None
    if z_pos is None and positives is not None:
        z_pos = z.gather(1, positives[:, None])[:, 0]
    assert z_pos is not None, "relative to which positives?"
    own = z_pos.detach()
    return z > (own * (1 + margin[1]) if isinstance(margin, tuple) else own + margin)[:, None]


def _too_alike(guided: Sequence[Tensor] | None, positives: Tensor, margin: Margin) -> Tensor | None:
    """Which candidates a guide finds more alike than the positives, less a margin [N, M]; the positives stay."""
    if guided is None:
        return None
    scores = guided[0].detach() @ guided[1].detach().T
    own = scores.gather(1, positives[:, None])
    too_alike = scores > own - (own.abs() * margin[1] if isinstance(margin, tuple) else margin)
    return too_alike.scatter(1, positives[:, None], False)


def _either(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """What is in one of two masks, each of which may be none."""
    return b if a is None else a if b is None else a | b


def _biased(z: Tensor, candidate_bias: Tensor | None) -> Tensor:
    """Logits [N, M] with what is added to the columns'."""
    return z if candidate_bias is None else z + candidate_bias


def _without_padding(
    x: Tensor, y: Tensor, candidate_bias: Tensor | None, positives: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, y with zeros, and weights [N] with 0, for columns of -inf and rows whose positive they are."""
    if candidate_bias is None:
        return x, y, weight
    padding = candidate_bias.detach() == -torch.inf
    idle = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    if positives is not None:
        idle = padding[positives.clamp(min=0)] & (positives >= 0)
    weight = torch.ones(len(x), dtype=x.dtype, device=x.device) if weight is None else weight
    return x.masked_fill(idle[:, None], 0.0), y.masked_fill(padding[:, None], 0.0), weight.masked_fill(idle, 0.0)


def _positive_logits(z: Tensor, positives: Tensor) -> Tensor:
    """z_i,p(i) [N]; of padding, whose row does not count, 0."""
    z_pos = z.gather(1, positives[:, None])[:, 0]
    return z_pos.masked_fill(z_pos == -torch.inf, 0.0)


def _mask(z: Tensor, positives: Tensor, alike: Tensor | None = None) -> Tensor:
    """z with every row's positive, and what is alike, at -inf; an index of -1 masks nothing."""
    columns = torch.arange(z.shape[1], dtype=torch.int64, device=z.device)
    out = columns == positives[:, None]
    return z.masked_fill(out if alike is None else out | alike, -torch.inf)


def _logsumexp(z: Tensor) -> Tensor:
    """logsumexp over columns [N]; -inf, with gradient 0, for a row of nothing."""
    highest = z.detach().amax(1) if z.shape[1] else z.new_full((len(z),), -torch.inf)
    highest = highest.masked_fill(highest == -torch.inf, 0.0)
    total = torch.exp(z - highest[:, None]).sum(1)
    empty = total == 0
    return (total.masked_fill(empty, 1.0).log() + highest).masked_fill(empty, -torch.inf)


def _softmax_losses(
    z: Tensor, positives: Tensor, alike: Tensor | None, include_positive: bool, label_smoothing: float
) -> Tensor:
    """softplus(n_i - z_pos) [N] with the positive masked out of n_i: as many digits at loss 1e-6 as at loss 1.

    So is what is alike [N, M].
    """
    z_pos = _positive_logits(z, positives)
    negatives = _mask(z, positives, alike)
    n = _logsumexp(negatives)
    if not include_positive:
        return (n - z_pos).masked_fill(n == -torch.inf, 0.0)
    losses = -logsigmoid(z_pos - n)
    if not label_smoothing:
        return losses
    gaps = (z_pos[:, None] - negatives).masked_fill(negatives == -torch.inf, 0.0)
    return losses + label_smoothing * gaps.sum(1) / ((negatives != -torch.inf).sum(1) + 1)


def _reduce(losses: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """The weighted mean (by the sum of weights), the weighted sum, or the weighted rows."""
    if weight is not None:
        losses = losses * weight.to(losses.dtype)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    total = losses.new_tensor(len(losses)) if weight is None else weight.to(losses.dtype).sum()
    return losses.sum() / total.masked_fill(total == 0, 1.0)
