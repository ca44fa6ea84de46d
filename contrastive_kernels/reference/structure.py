"""The definitions of the latent-structure losses and of the retrieval metrics: double sums, dense, in any precision.

As in ``reference.py``, these functions are what the fast implementations are compared with, in float64. Letters: V, T
[N, D] image and text features, superscript a an augmented view, i "independent" features of one modality alone.

References
----------
.. [1] Q. Jiang et al., "Understanding and constructing latent modality structures in multi-modal representation
   learning", CVPR 2023.
.. [2] S. Goel et al., "CyCLIP: Cyclic contrastive language-image pretraining", NeurIPS 2022.
.. [3] T. Wang, P. Isola, "Understanding contrastive representation learning through alignment and uniformity on the
   hypersphere", ICML 2020.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .losses import clip_loss, info_nce

__all__ = [
    "SHORTEST_MEAN",
    "brownian_bridge",
    "feature_separation",
    "geometric_consistency",
    "multimodal_contrastive",
    "ranks",
]


#: A bridge's mean is divided by its length, or by this where it is shorter: antipodal ends have no mean direction.
SHORTEST_MEAN = 1e-3


def geometric_consistency(
    image: Tensor,
    text: Tensor,
    image_aug: Tensor | None = None,
    text_aug: Tensor | None = None,
    *,
    cross: float = 1.0,
    intra: float = 1.0,
    augmented: float = 1.0,
) -> Tensor:
    """Geometric consistency [1]_, [2]_: image and text features have the same table of similarities.

    Parameters
    ----------
    image, text : Tensor
        Matching rows [N, D].
    image_aug, text_aug : Tensor, optional
        Their augmented views [N, D].
    cross : float
        Weight of sum_jk (<V_j, T_k> - <V_k, T_j>)^2 / N.
    intra : float
        Weight of sum_jk (<V_j, V_k> - <T_j, T_k>)^2 / N.
    augmented : float
        Weight of the same between a modality and its augmented view, and of sum_j (<V_j, T_j> - <Va_j, Ta_j>)^2 / N
        where there are both.

    Returns
    -------
    Tensor
        A scalar.
    """
    n = max(len(image), 1)
    z = image @ text.T
    total = cross * (z - z.T).square().sum() + intra * _intra(image, text)
    for feature, view in ((image, image_aug), (text, text_aug)):
        if view is not None:
            total = total + augmented * _intra(feature, view)
    if image_aug is not None and text_aug is not None:
        pairs = (image * text).sum(1) - (image_aug * text_aug).sum(1)
        total = total + augmented * pairs.square().sum()
    return total / n


def _intra(u: Tensor, v: Tensor) -> Tensor:
    return (u @ u.T - v @ v.T).square().sum()


def brownian_bridge(
    image: Tensor,
    text: Tensor,
    image_aug: Tensor | None = None,
    text_aug: Tensor | None = None,
    *,
    t: float | Tensor = 0.25,
) -> Tensor:
    """The Brownian bridge [1]_: an augmented view lies on the way between its own modality and the other one.

    Parameters
    ----------
    image, text : Tensor
        The bridge's ends [N, D].
    image_aug, text_aug : Tensor, optional
        The points on the way [N, D], at least one of them.
    t : float or Tensor
        The weight of the view's own modality in the mean: a number or one per sample [N].

    Returns
    -------
    Tensor
        The mean over the samples, and over both sides where there are both, of |view - mu_t|^2.
    """
    sides = [(image, text, image_aug), (text, image, text_aug)]
    return torch.stack([_bridge(*side, t) for side in sides if side[2] is not None]).mean()


def _bridge(own: Tensor, other: Tensor, view: Tensor | None, t: float | Tensor) -> Tensor:
    assert view is not None
    at = t[:, None] if isinstance(t, Tensor) else t
    mean = at * own + (1 - at) * other
    length = mean.square().sum(1, keepdim=True).clamp(min=SHORTEST_MEAN**2).sqrt()
    return (view - mean / length).square().sum() / max(len(own), 1)


def feature_separation(
    image: Tensor,
    text: Tensor,
    image_independent: Tensor,
    text_independent: Tensor,
    image_independent_aug: Tensor | None,
    text_independent_aug: Tensor | None,
    logit_scale: float | Tensor,
    *,
    orthogonality: float = 1.0,
    contrast: float = 1.0,
    uniformity: float = 1.0,
) -> Tensor:
    """Deep feature separation [1]_: independent features that are orthogonal, informative and spread out [3]_.

    Parameters
    ----------
    image, text : Tensor
        Shared features [N, D].
    image_independent, text_independent : Tensor
        Features of one modality alone [N, D].
    image_independent_aug, text_independent_aug : Tensor, optional
        The same of augmented views; without one, its modality has no contrastive term.
    logit_scale : float or Tensor
        The inverse temperature of the contrastive terms.
    orthogonality, contrast, uniformity : float
        The weights of the three terms.

    Returns
    -------
    Tensor
        A scalar.
    """
    n = max(len(image), 1)
    shared, independent = (image, text), (image_independent, text_independent)
    views = (image_independent_aug, text_independent_aug)
    total = image.new_zeros(())
    for u, v in zip(shared, independent):
        total = total + orthogonality * (u * v).sum(1).square().sum() / n
    for features, view in zip(independent, views):
        if view is not None:
            total = total + contrast * info_nce(features, view, logit_scale)
    kernels = torch.cat([(4 * (v @ v.T) - 4).flatten() for v in independent])
    if len(image):
        total = total + uniformity * (torch.logsumexp(kernels, 0) - torch.log(total.new_tensor(n)))
    return total


def multimodal_contrastive(
    image: Tensor,
    text: Tensor,
    image_aug: Tensor | None,
    text_aug: Tensor | None,
    logit_scale: float | Tensor,
) -> Tensor:
    """The base loss of [1]_: the mean of InfoNCE from V to T, T to V, V to Va and T to Ta.

    Parameters
    ----------
    image, text : Tensor
        Matching rows [N, D].
    image_aug, text_aug : Tensor, optional
        Their augmented views [N, D]; a view that is missing leaves its term out of the mean.
    logit_scale : float or Tensor
        The inverse temperature.

    Returns
    -------
    Tensor
        A scalar.
    """
    total, terms = 2 * clip_loss(image, text, logit_scale), 2
    for feature, view in ((image, image_aug), (text, text_aug)):
        if view is not None:
            total, terms = total + info_nce(feature, view, logit_scale), terms + 1
    return total / terms


def ranks(x: Tensor, y: Tensor, positives: Tensor) -> Tensor:
    """How many documents stand before each query's best positive; a tie stands before it, and so does NaN.

    Parameters
    ----------
    x, y : Tensor
        Queries [N, D] and documents [M, D].
    positives : Tensor
        Indices [N, K] of each query's positives, -1 where there are fewer. Positives never stand in the way.

    Returns
    -------
    Tensor
        Ranks from 0, [N] int64; -1 for a query without positives.
    """
    if not len(y):
        return torch.full((len(x),), -1, dtype=torch.int64, device=x.device)
    scores = x @ y.T
    documents = torch.arange(len(y), dtype=torch.int64, device=y.device)
    is_positive = (positives[:, :, None] == documents).any(1)
    best = scores.masked_fill(~is_positive | scores.isnan(), -torch.inf).amax(1, keepdim=True)
    before = (~(scores < best) & ~is_positive).sum(1)
    return before.masked_fill(~is_positive.any(1), -1)
