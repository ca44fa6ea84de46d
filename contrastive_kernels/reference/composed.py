"""The definition of InfoNCE with several positives or none among the columns, a queue, and corrections of its sums.

References
----------
.. [1] K. He et al., "Momentum contrast for unsupervised visual representation learning", CVPR 2020.
.. [2] C.-H. Yeh et al., "Decoupled contrastive learning", ECCV 2022.
.. [3] C.-Y. Chuang, J. Robinson, L. Yen-Chen, A. Torralba, S. Jegelka, "Debiased contrastive learning", NeurIPS 2020.
.. [4] J. Robinson, C.-Y. Chuang, S. Sra, S. Jegelka, "Contrastive learning with hard negative samples", ICLR 2021.
.. [5] A. Kusupati et al., "Matryoshka representation learning", NeurIPS 2022.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from .parts import Ids, Margin, Scale, _alike, _biased, _logsumexp, _positive_indices, _reduce, _too_high

__all__ = ["info_nce", "matryoshka", "von_mises_fisher_weights"]


def info_nce(
    x: Tensor,
    y: Tensor,
    logit_scale: Scale,
    *,
    positives: int | Tensor | None = None,
    positive_logits: Tensor | None = None,
    positive_features: Tensor | None = None,
    queue: tuple[Tensor, Tensor | None] | None = None,
    ids: Ids | None = None,
    candidate_bias: Tensor | None = None,
    margin: Margin | None = None,
    include_positive: bool = True,
    weight_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
    debiased: float | None = None,
    hardness_beta: float | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """InfoNCE in one direction: the mean over a row's positives p of log sum_j exp(z_ij) - z_ip.

    Parameters
    ----------
    x, y : Tensor
        Anchors [N, D] and candidates [M, D].
    logit_scale : float or Tensor
        The inverse temperature.
    positives : int or Tensor, optional
        An offset, indices [N], or [N, P] with -1; repeats count once. A row of none is left out of the mean.
    positive_logits, positive_features : Tensor, optional
        The positive's logit [N], or the positive itself [N, D], where no column is it: all are negatives then, but for
        those that `positives` names.
    queue : pair of Tensor, optional
        More columns [Q, D], without gradient [1]_, and their ids [Q].
    ids : Tensor or pair of Tensor, optional
        Columns of the row's id are no negatives.
    candidate_bias : Tensor, optional
        Added to the columns' logits [M]; -inf is padding, which is neither a negative nor a positive.
    margin : float or ("relative", float), optional
        Columns above the positive by more, biases not counted, are no negatives.
    include_positive : bool
        False: without the positive in the sum [2]_.
    weight_fn : callable, optional
        Gives w_i [N] of the rows and their positives: lse_j z_ij - w_i z_ip [2]_.
    debiased : float, optional
        tau+: with g_i = max((mean_j e^{z_ij} - tau+ e^{z_ip}) / (1 - tau+), e^{-scale}) over the M_i negatives the loss
        is -log(e^{z_ip} / (e^{z_ip} + M_i g_i)) [3]_.
    hardness_beta : float, optional
        The mean over negatives in g_i has weights e^{beta z_ij} [4]_.
    weight : Tensor, optional
        Weights of the rows [N].
    reduction : {"mean", "sum", "none"}
        A weighted mean divides by the sum of the weights.

    Returns
    -------
    Tensor
        A scalar, or [N].
    """
    given = positive_logits is not None or positive_features is not None
    index = torch.full((len(x), 1), -1, dtype=torch.int64, device=x.device)
    if not given or positives is not None:
        index = _positive_indices(x, positives)
        index = index[:, None] if index.dim() == 1 else index
    held = (index[:, :, None] == torch.arange(len(y), dtype=torch.int64, device=y.device)).any(1)
    if candidate_bias is not None:
        padding = candidate_bias.detach() == -torch.inf
        y, held = y.masked_fill(padding[:, None], 0.0), held & ~padding
    idle = torch.zeros(len(x), dtype=torch.bool, device=x.device) if given else ~held.any(1)
    unbiased, alike = logit_scale * (x @ y.T), _alike(ids)
    z = _biased(unbiased, candidate_bias)
    left_out = held if alike is None else held | alike
    if queue is not None:
        of_queue = logit_scale * (x @ queue[0].detach().T)
        z, unbiased = (torch.cat([v, of_queue], 1) for v in (z, unbiased))
        none = torch.zeros(len(x), len(queue[0]), dtype=torch.bool, device=x.device)
        rows = None if ids is None else (ids if isinstance(ids, Tensor) else ids[0])
        same = none if rows is None or queue[1] is None else rows[:, None] == queue[1]
        held, left_out = torch.cat([held, none], 1), torch.cat([left_out, same], 1)
    if positive_features is not None:
        z_pos = logit_scale * (x * positive_features).sum(1)
    elif positive_logits is not None:
        z_pos = positive_logits
    else:
        z_pos = z.masked_fill(~held, 0.0).sum(1) / held.sum(1).clamp(min=1)
    own = z_pos if given else unbiased.masked_fill(~held, 0.0).sum(1)
    too_high = _too_high(unbiased, None, own, margin)
    left_out = left_out if too_high is None else left_out | too_high
    n = _logsumexp(z.masked_fill(left_out, -torch.inf))
    if int(held.sum(1).max() if len(x) else 0) > 1 and not given:
        both = torch.stack([n, _logsumexp(z.masked_fill(~held, -torch.inf)).masked_fill(idle, 0.0)], 1)
        losses = _logsumexp(both) - z_pos
    elif debiased is not None or hardness_beta is not None:
        losses = _corrected(z, left_out, n, z_pos, logit_scale, debiased, hardness_beta, include_positive)
    elif weight_fn is not None:
        partners = y[index[:, 0].clamp(min=0)] if positive_features is None else positive_features
        losses = (n - weight_fn(x, partners) * z_pos).masked_fill(n == -torch.inf, 0.0)
    else:
        losses = -logsigmoid(z_pos - n) if include_positive else (n - z_pos).masked_fill(n == -torch.inf, 0.0)
    weight = torch.ones(len(x), dtype=z.dtype, device=x.device) if weight is None else weight
    return _reduce(losses.masked_fill(idle, 0.0), weight.masked_fill(idle, 0.0), reduction)


def _corrected(
    z: Tensor,
    left_out: Tensor,
    n: Tensor,
    z_pos: Tensor,
    scale: Scale,
    tau: float | None,
    beta: float | None,
    include_positive: bool,
) -> Tensor:
    """-log(e^{z_pos} / (e^{z_pos} + M g)) [N], everything relative to e^{z_pos}; 0 without negatives."""
    counted = (~left_out & (z != -torch.inf)).sum(1)
    nothing = counted == 0
    log_count = counted.clamp(min=1).to(z.dtype).log()
    if beta is None:
        log_mean = n - log_count
    else:
        log_mean = _logsumexp(((1 + beta) * z).masked_fill(left_out, -torch.inf))
        log_mean = log_mean - _logsumexp((beta * z).masked_fill(left_out, -torch.inf))
    log_g = (log_mean - z_pos).masked_fill(nothing, 0.0)
    if tau is not None:
        rest = 1 - tau * torch.exp(-log_g.clamp(min=-80))  # (e^log_g - tau) / e^log_g
        corrected = rest.masked_fill(rest <= 0, 1.0).log() + log_g - math.log(1 - tau)
        log_g = torch.maximum(corrected.masked_fill(rest <= 0, -torch.inf), -scale - z_pos)
    losses = -logsigmoid(-(log_count + log_g)) if include_positive else log_count + log_g
    return losses.masked_fill(nothing, 0.0)


def von_mises_fisher_weights(x: Tensor, y: Tensor, sigma: float = 0.5) -> Tensor:
    """DCLW's weights [2]_: 2 - N softmax_i(<x_i, y_i> / sigma) [N], not differentiated."""
    return 2 - len(x) * torch.softmax((x.detach() * y.detach()).sum(1) / sigma, 0)


def matryoshka(
    loss: Callable[..., Tensor],
    x: Tensor,
    y: Tensor,
    *arguments: Any,
    dims: Sequence[int],
    weights: Sequence[float] | None = None,
    normalized: bool = False,
    **options: Any,
) -> Tensor:
    """sum_d c_d loss(the first d features of x, and of y) [5]_.

    Parameters
    ----------
    loss : callable
        Of two matrices of features, and the rest.
    x, y : Tensor
        Features [N, D], [M, D].
    arguments
        The rest.
    dims : sequence of int
        The numbers of features.
    weights : sequence of float, optional
        c_d; 1 by default.
    normalized : bool
        Rows are divided by their norm after cutting.
    options
        The rest, by name.

    Returns
    -------
    Tensor
        As the loss has it.
    """
    total = x.new_zeros(())
    for d, weight in zip(dims, weights or [1.0] * len(dims)):
        cut = [normalize(v[:, :d], dim=1) if normalized else v[:, :d] for v in (x, y)]
        total = total + weight * loss(*cut, *arguments, **options)
    return total
