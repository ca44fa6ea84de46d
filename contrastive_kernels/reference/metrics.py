"""The definition of what losses tell beside their value: accuracies of the batch, logits, denominators."""

from __future__ import annotations

import torch
from torch import Tensor

from .parts import _either, _logsumexp, _mask, _positive_logits

__all__ = ["label_metrics_of_logits", "metrics_of_logits"]


def metrics_of_logits(
    z: Tensor,
    positives: Tensor,
    *,
    left_out: Tensor | None = None,
    too_high: Tensor | None = None,
    include_positive: bool = True,
    weight: Tensor | None = None,
) -> dict[str, Tensor]:
    """Means over the rows of one direction, weighted if they have weights; 0 of no rows.

    Parameters
    ----------
    z : Tensor
        Logits [N, M], with what is added to columns.
    positives : Tensor
        The columns of the rows' positives [N].
    left_out : Tensor, optional
        Pairs that are no negatives [N, M].
    too_high : Tensor, optional
        Pairs that a margin leaves out of denominators, and of nothing else [N, M].
    include_positive : bool
        The denominator has the positive; without it, that of a row without negatives counts as the positive.
    weight : Tensor, optional
        Weights of the rows [N].

    Returns
    -------
    dict
        "top1", "top5": the part of the rows with fewer than 1 (5) negatives whose logit is not lower than the
        positive's. "positive_logit". "log_sum_exp": the logarithm of the denominator.
    """
    z_pos, negatives = _positive_logits(z, positives), _mask(z, positives, left_out)
    before = (~(negatives < z_pos[:, None])).sum(1)
    n = _logsumexp(_mask(z, positives, _either(left_out, too_high)))
    whole = torch.logaddexp(n, z_pos) if include_positive else torch.where(n == -torch.inf, z_pos, n)
    weight = torch.ones_like(z_pos) if weight is None else weight.to(z.dtype)
    total = weight.sum()
    shares = weight / total.masked_fill(total == 0, 1.0)
    rows = {"top1": before < 1, "top5": before < 5, "positive_logit": z_pos, "log_sum_exp": whole}
    return {name: (shares * value).sum() for name, value in rows.items()}


def label_metrics_of_logits(z: Tensor, alike: Tensor, own: Tensor, weight: Tensor | None = None) -> dict[str, Tensor]:
    """The same of a supervised contrastive loss: means over the rows that have positives.

    Parameters
    ----------
    z : Tensor
        Logits [N, M].
    alike, own : Tensor
        Pairs of equal labels [N, M], and those of a row with itself.
    weight : Tensor, optional
        Weights of the rows [N].

    Returns
    -------
    dict
        "top1", "top5": the part of the rows with fewer than 1 (5) columns of other labels whose logit is not lower than
        the largest of a positive. "positive_logit": the mean of the rows' mean. "log_sum_exp": over all others.
    """
    alike = alike & ~own
    count = alike.sum(1)
    best = z.masked_fill(~alike, -torch.inf).amax(1)
    before = ((z >= best[:, None]) & ~alike & ~own).sum(1)
    mean = z.masked_fill(~alike, 0.0).sum(1) / count.clamp(min=1)
    weight = (torch.ones_like(best) if weight is None else weight.to(z.dtype)).masked_fill(count == 0, 0.0)
    shares = weight / weight.sum()
    rows = {
        "top1": before < 1,
        "top5": before < 5,
        "positive_logit": mean,
        "log_sum_exp": _logsumexp(z.masked_fill(own, -torch.inf)),
    }
    return {name: (shares * value).sum() for name, value in rows.items()}
