"""The definition of the losses whose positives are those of a label; see :mod:`contrastive_kernels.reference.losses`.

u_i are the labels of the rows and v_j those of the columns, P(i) = {j : v_j = u_i} the positives of row i and N(i) the
columns of other labels; where x is compared with itself, a row's own column is in neither. k_i = |P(i)|.

References
----------
.. [1] P. Khosla et al., "Supervised contrastive learning", NeurIPS 2020.
.. [2] K. Musgrave, S. Belongie, S.-N. Lim, "PyTorch metric learning", 2020: its NTXentLoss.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .parts import Scale, _logsumexp, _reduce

__all__ = ["multi_positive_nce", "multi_positive_of_logits", "sup_con", "sup_con_of_logits"]


def sup_con(
    x: Tensor,
    labels: Tensor,
    logit_scale: Scale,
    *,
    y: Tensor | None = None,
    y_labels: Tensor | None = None,
    variant: str = "outside",
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Supervised contrastive loss [1]_.

    "outside", their L_out: loss_i = logsumexp_{a in P(i) + N(i)} z_ia - mean_{p in P(i)} z_ip. "inside", their L_in:
    loss_i = -log(mean_{p in P(i)} exp z_ip / sum_{a in P(i) + N(i)} exp z_ia).

    Parameters
    ----------
    x : Tensor
        Features [N, D].
    labels : Tensor
        Integers [N].
    logit_scale : float or Tensor
        The inverse temperature.
    y, y_labels : Tensor, optional
        Candidates [M, D] and their labels [M]; by default the rows of x themselves.
    variant : {"outside", "inside"}
        Where the mean over the positives stands: outside of the logarithm, or inside.
    weight : Tensor, optional
        Weights of the rows [N].
    reduction : {"mean", "sum", "none"}
        A row without positives has loss 0, and is left out of the mean.

    Returns
    -------
    Tensor
        A scalar, or [N].
    """
    z, own = _logits(x, y, logit_scale)
    return sup_con_of_logits(z, labels, labels if y_labels is None else y_labels, own, variant, weight, reduction)


def sup_con_of_logits(
    z: Tensor, labels: Tensor, of_cols: Tensor, own: Tensor, variant: str, weight: Tensor | None, reduction: str
) -> Tensor:
    """The same of logits [N, M] and of the pairs that are left out [N, M]."""
    alike = (labels[:, None] == of_cols) & ~own
    count = alike.sum(1)
    if variant == "outside":
        a = _logsumexp(z.masked_fill(own, -torch.inf))
        losses = ((a[:, None] - z).masked_fill(~alike, 0.0)).sum(1) / count.clamp(min=1)
    else:
        m, n = (_logsumexp(z.masked_fill(out, -torch.inf)) for out in (~alike, alike | own))
        losses = count.clamp(min=1).to(z.dtype).log() - logsigmoid(m - n)
    counts = (count > 0).to(z.dtype)
    losses = losses.masked_fill(count == 0, 0.0)
    return _reduce(losses, counts if weight is None else counts * weight.to(z.dtype), reduction)


def multi_positive_nce(
    x: Tensor,
    labels: Tensor,
    logit_scale: Scale,
    *,
    y: Tensor | None = None,
    y_labels: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Each positive by itself [2]_: the mean over pairs (i, p in P(i)) of softplus(logsumexp_{j in N(i)} z_ij - z_ip).

    Parameters
    ----------
    x, labels, logit_scale, y, y_labels, weight
        As in :func:`sup_con`.
    reduction : {"mean", "sum", "none"}
        "none" gives the sum over each row's pairs [N], "mean" divides by the number of pairs, each counted by the
        weight of its row.

    Returns
    -------
    Tensor
        A scalar, or [N].
    """
    z, own = _logits(x, y, logit_scale)
    return multi_positive_of_logits(z, labels, labels if y_labels is None else y_labels, own, weight, reduction)


def multi_positive_of_logits(
    z: Tensor, labels: Tensor, of_cols: Tensor, own: Tensor, weight: Tensor | None, reduction: str
) -> Tensor:
    """The same of logits [N, M] and of the pairs that are left out [N, M]."""
    alike = (labels[:, None] == of_cols) & ~own
    n = _logsumexp(z.masked_fill(alike | own, -torch.inf))
    losses = -logsigmoid((z - n[:, None]).masked_fill(~alike, torch.inf)).sum(1)
    weight = torch.ones_like(losses) if weight is None else weight.to(z.dtype)
    pairs = (weight * alike.sum(1)).sum()
    total = _reduce(losses, weight, "none" if reduction == "none" else "sum")
    return total / pairs.masked_fill(pairs == 0, 1.0) if reduction == "mean" else total


def _logits(x: Tensor, y: Tensor | None, logit_scale: Scale) -> tuple[Tensor, Tensor]:
    """z [N, M], and which of its pairs are a row with itself."""
    z = logit_scale * (x @ (x if y is None else y).T)
    if y is None:
        return z, torch.eye(len(x), dtype=torch.bool, device=x.device)
    return z, torch.zeros(z.shape, dtype=torch.bool, device=z.device)
