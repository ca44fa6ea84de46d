"""The definition of a step of the global contrastive losses, of two towers or of two views of one.

References
----------
.. [1] Z. Yuan et al., "Provable stochastic optimization for global contrastive learning: small batch does not harm
   performance", ICML 2022.
.. [2] Z.-H. Qiu et al., "Not all semantics are created equal: contrastive self-supervised learning with automatic
   temperature individualization", ICML 2023.
.. [3] X. Wei et al., "FastCLIP: a suite of optimization techniques to accelerate CLIP training with limited resources",
   2024.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["GlobalStep", "global_contrastive"]


class GlobalStep(NamedTuple):
    """The loss of a batch, and what the samples have after it [N, towers]."""

    loss: Tensor
    #: logarithms of the normalisers
    log_u: Tensor
    #: of the samples' temperatures
    gradient: Tensor


def global_contrastive(
    x: Tensor,
    y: Tensor,
    temperature: Tensor,
    stored: Tensor,
    gamma: float,
    *,
    towers: int = 2,
    index: Tensor | None = None,
    rho: float | None = None,
) -> GlobalStep:
    """The mean of log u_i + g_i / u_i - 1 over rows that look for their positives, u_i moved by gamma to g_i.

    Of two towers the rows are those of x and of y, the negatives of row i all rows j of the other tower, and g_i the
    mean of exp((s_ij - s_ii) / tau). Of one tower the rows are all views, the negatives the views of other samples, g_i
    the mean of exp(s_ij / tau), and the positive's s_ip / tau is subtracted from the loss; both views of a sample have
    one u, which each moves for itself, and their mean is kept [1]_.

    Parameters
    ----------
    x, y : Tensor
        Matching rows [N, D], or two views of each sample.
    temperature : Tensor
        A number, or of every sample [N, towers] [2]_.
    stored : Tensor
        Logarithms of u [N, towers]; NaN where a sample is met for the first time.
    gamma : float
        In 0 ... 1.
    towers : int
        2 or 1.
    index : Tensor, optional
        The samples [N] of one tower; by default all different.
    rho : float, optional
        With it the loss is the mean of tau (... + rho), whose gradient in one temperature for all has log u for
        log u + g / u - 1 [3]_.

    Returns
    -------
    GlobalStep
        With the gradients of temperatures, log u_i + rho - mean_j (h_ij exp(h_ij)) / u_i, h_ij the exponents of g_i.
    """
    n = len(x)
    if towers == 2:
        scores = torch.cat([x @ y.T, y @ x.T])
        own = (x * y).sum(1).repeat(2)
        negative = ~torch.eye(n, dtype=torch.bool, device=x.device).repeat(2, 1)
    else:
        views = torch.cat([x, y])
        scores, own = views @ views.T, (x * y).sum(1).repeat(2)
        samples = torch.arange(n, dtype=torch.int64, device=x.device) if index is None else index
        negative = samples.repeat(2)[:, None] != samples.repeat(2)
    tau = temperature.expand(n, 2).T.reshape(-1) if temperature.dim() else temperature.expand(2 * n)
    before = stored.expand(n, 2).T.reshape(-1)
    h = (scores - own[:, None] if towers == 2 else scores) / tau[:, None]
    g = (h.exp() * negative).sum(1) / negative.sum(1)
    u = torch.where(before.isnan(), g, (1 - gamma) * before.exp() + gamma * g).detach()
    losses = u.log() + g / u - 1 - (0 if towers == 2 else own / tau)
    if rho is not None:
        fixed = tau.detach()
        relative = u.log() - (0 if towers == 2 else own.detach() / fixed)
        losses = fixed * losses + (tau - fixed) * relative + rho * tau
    slopes = (h * h.exp() * negative).sum(1) / negative.sum(1) / u
    gradient = (u.log() + (rho or 0.0) - slopes).detach().view(2, n).T
    log_u = u.log().view(2, n).T
    if towers == 1:
        log_u = torch.logsumexp(log_u, 1, keepdim=True) - math.log(2)
        gradient = gradient.mean(1, keepdim=True)
    return GlobalStep(losses.mean(), log_u, gradient)
