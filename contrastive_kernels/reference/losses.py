"""The definition of every loss: dense, differentiable by plain autograd, in whatever precision comes in.

These functions are what the streaming implementation is compared with, in float64. They store the N x M matrix of
logits and make no attempt at speed. Letters: x [N, D] anchors, y [M, D] candidates, z = logit_scale * x yT [N, M],
p(i) the column of row i's positive.

References
----------
.. [1] A. van den Oord, Y. Li, O. Vinyals, "Representation learning with contrastive predictive coding", 2018.
.. [2] A. Radford et al., "Learning transferable visual models from natural language supervision", ICML 2021.
.. [3] T. Chen, S. Kornblith, M. Norouzi, G. Hinton, "A simple framework for contrastive learning of visual
   representations", ICML 2020.
.. [4] X. Zhai, B. Mustafa, A. Kolesnikov, L. Beyer, "Sigmoid loss for language image pre-training", ICCV 2023.
.. [5] C. Chen, J. Zhang, Y. Xu, L. Chen, J. Duan, Y. Chen, S. Tran, B. Zeng, T. Chilimbi, "Why do we need large
   batch sizes in contrastive learning? A gradient-bias perspective", NeurIPS 2022.
.. [6] C.-H. Yeh, C.-Y. Hong, Y.-C. Hsu, T.-L. Liu, Y. Chen, Y. LeCun, "Decoupled contrastive learning", ECCV 2022.
.. [7] A. V. Solatorio, "GISTEmbed: guided in-sample selection of training negatives for text embedding fine-tuning",
   2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..draws.gamma import draw_log_weights, expected_excess, log_or_minus_infinity
from .parts import (
    Ids,
    LogNormalizer,
    Margin,
    Scale,
    _alike,
    _biased,
    _either,
    _logsumexp,
    _mask,
    _one_or_both,
    _positive_indices,
    _positive_logits,
    _reduce,
    _softmax_losses,
    _too_alike,
    _too_high,
    _without_padding,
)

__all__ = ["LogNormalizer", "Scale", "clip_loss", "decomposable", "info_nce", "log_sum_exp", "nt_xent", "sigmoid"]


def info_nce(
    x: Tensor,
    y: Tensor,
    logit_scale: Scale,
    *,
    positives: int | Tensor | None = None,
    ids: Ids | None = None,
    candidate_bias: Tensor | None = None,
    margin: Margin | None = None,
    guided: Sequence[Tensor] | None = None,
    guided_margin: Margin = 0.0,
    include_positive: bool = True,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """InfoNCE in one direction [1]_: loss_i = softplus(logsumexp_{j in N(i)} z_ij - z_i,p(i)).

    N(i) are all columns but p(i) and, with ids, those of the row's id.

    Parameters
    ----------
    x, y : Tensor
        Anchors [N, D] and candidates [M, D].
    logit_scale : float or Tensor
        The inverse temperature.
    positives : int or Tensor, optional
        p(i): an offset (p(i) = i + offset; 0 by default) or indices [N].
    ids : Tensor or pair of Tensor, optional
        Integers of the rows [N] and the columns [M]; one tensor for both.
    candidate_bias : Tensor, optional
        Added to the columns' logits [M]. -inf: the column is padding; so is a row whose positive it is, with loss 0.
    margin : float or ("relative", float), optional
        Columns of z_ij > z_i,p(i) + margin are left out of N(i); of ("relative", m), those of
        z_ij > (1 + m) z_i,p(i). Both without biases.
    guided : pair of Tensor, optional
        A guide's features g of the rows and of the columns [7]_: columns of <g_i, g_j> > <g_i, g_p(i)> - guided_margin
        are left out of N(i).
    guided_margin : float or ("relative", float)
        The margin; relative: times |<g_i, g_p(i)>|.
    include_positive : bool
        False: loss_i = logsumexp_{j in N(i)} z_ij - z_i,p(i) [6]_, and 0 without negatives.
    label_smoothing : float
        This share of the target lies on p(i) and N(i) alike, as in torch's cross-entropy.
    weight : Tensor, optional
        Weights of the rows [N].
    reduction : {"mean", "sum", "none"}
        A weighted mean divides by the sum of the weights.

    Returns
    -------
    Tensor
        A scalar, or [N].
    """
    p = _positive_indices(x, positives)
    x, y, weight = _without_padding(x, y, candidate_bias, p, weight)
    z = logit_scale * (x @ y.T)
    out = _either(_alike(ids), _either(_too_high(z, p, None, margin), _too_alike(guided, p, guided_margin)))
    losses = _softmax_losses(_biased(z, candidate_bias), p, out, include_positive, label_smoothing)
    return _reduce(losses, weight, reduction)


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Scale,
    *,
    ids: Ids | None = None,
    candidate_bias: Tensor | Sequence[Tensor] | None = None,
    margin: Margin | None = None,
    guided: Sequence[Tensor] | None = None,
    guided_margin: Margin = 0.0,
    include_positive: bool = True,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """CLIP's symmetric loss [2]_: the mean of InfoNCE from images to texts and from texts to images.

    Parameters
    ----------
    image_features, text_features : Tensor
        Matching rows [N, D].
    logit_scale : float or Tensor
        The inverse temperature.
    ids : Tensor or pair of Tensor, optional
        As in :func:`info_nce`, in both directions.
    candidate_bias : Tensor or pair of Tensor, optional
        Of the images and of the texts, as candidates; one tensor for both.
    margin, guided, guided_margin, include_positive, label_smoothing
        As in :func:`info_nce`.
    weight : Tensor, optional
        Weights of the pairs [N].
    reduction : {"mean", "sum", "none"}
        "none" gives each pair's mean of both directions.

    Returns
    -------
    Tensor
        A scalar, or [N].
    """
    if candidate_bias is not None:
        of_images, of_texts = (candidate_bias,) * 2 if isinstance(candidate_bias, Tensor) else candidate_bias
        there = back = ids
        if ids is not None and not isinstance(ids, Tensor):
            back = (ids[1], ids[0])
        x, y = image_features, text_features
        options: dict[str, Any] = {"include_positive": include_positive, "label_smoothing": label_smoothing}
        options |= {"weight": weight, "reduction": reduction, "margin": margin, "guided_margin": guided_margin}
        first = info_nce(x, y, logit_scale, ids=there, candidate_bias=of_texts, guided=guided, **options)
        turned = guided and guided[::-1]
        second = info_nce(y, x, logit_scale, ids=back, candidate_bias=of_images, guided=turned, **options)
        return (first + second) / 2
    z = logit_scale * (image_features @ text_features.T)
    p = _positive_indices(image_features, None)
    alike = _alike(ids)
    alike_turned = None if alike is None else alike.T
    masks = _either(alike, _too_high(z, p, None, margin)), _either(alike_turned, _too_high(z.T, p, None, margin))
    known = _too_alike(guided, p, guided_margin), _too_alike(guided and guided[::-1], p, guided_margin)
    masks = _either(masks[0], known[0]), _either(masks[1], known[1])
    there, back = (_softmax_losses(v, p, m, include_positive, label_smoothing) for v, m in zip((z, z.T), masks))
    return _reduce((there + back) / 2, weight, reduction)


def nt_xent(
    z1: Tensor,
    z2: Tensor,
    logit_scale: Scale,
    *,
    ids: Tensor | None = None,
    candidate_bias: Tensor | None = None,
    margin: Margin | None = None,
    guided: Sequence[Tensor] | None = None,
    guided_margin: Margin = 0.0,
    include_positive: bool = True,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """NT-Xent [3]_: InfoNCE of 2N views against one another, each view left out of its own denominator.

    Parameters
    ----------
    z1, z2 : Tensor
        Two views of the same samples [N, D].
    logit_scale : float or Tensor
        The inverse temperature.
    ids : Tensor, optional
        Integers of the samples [N]: views of equal ones are left out too.
    candidate_bias : Tensor, optional
        As in :func:`info_nce`, of the samples [N].
    margin, guided, guided_margin, include_positive, label_smoothing
        As in :func:`info_nce`.
    weight : Tensor, optional
        Weights of the samples [N]; each serves both views.
    reduction : {"mean", "sum", "none"}
        "none" gives the views of z1, then those of z2: [2N].

    Returns
    -------
    Tensor
        A scalar, or [2N].
    """
    n = len(z1)
    views = torch.cat([z1, z2])
    itself = torch.arange(2 * n, dtype=torch.int64, device=views.device)
    p = (itself + n) % max(2 * n, 1)
    both, bias = (None if v is None else v.repeat(2) for v in (weight, candidate_bias))
    views, others, both = _without_padding(views, views, bias, p, both)
    z = logit_scale * (views @ others.T)
    out = _too_high(z, p, None, margin)
    z = _biased(z, bias).masked_fill(itself[:, None] == itself, -torch.inf)
    out = _either(None if ids is None else _alike(torch.cat([ids, ids])), out)
    if guided is not None:
        of_views = torch.cat([*guided])
        out = _either(out, _too_alike((of_views, of_views), p, guided_margin))
    return _reduce(_softmax_losses(z, p, out, include_positive, label_smoothing), both, reduction)


def sigmoid(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Scale,
    logit_bias: Scale,
    *,
    ids: Ids | None = None,
    candidate_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The sigmoid loss [4]_: the sum over all pairs of softplus(-s_ij z_ij), s = 1 for matching pairs, else -1.

    Parameters
    ----------
    image_features, text_features : Tensor
        Matching rows [N, D].
    logit_scale, logit_bias : float or Tensor
        z = logit_scale * <x, y> + logit_bias.
    ids : Tensor or pair of Tensor, optional
        Integers of the rows [N] and the columns [M]: the matching pairs are those of equal ones, and not the diagonal.
    candidate_bias : Tensor, optional
        Added to the columns' logits [M]. -inf: the column's pairs are left out; so is, without ids, its row.
    weight : Tensor, optional
        Weights of the rows [N].
    reduction : {"mean", "sum", "none"}
        "mean" divides the sum over all pairs by N; "none" gives the row sums.

    Returns
    -------
    Tensor
        A scalar, or [N].
    """
    alike = _alike(ids)
    own = _positive_indices(image_features, None) if alike is None else None
    x, y, weight = _without_padding(image_features, text_features, candidate_bias, own, weight)
    z = logit_scale * (x @ y.T) + logit_bias
    matching = torch.eye(len(z), dtype=torch.bool, device=z.device) if alike is None else alike
    sign = 2 * matching.to(z.dtype) - 1
    if candidate_bias is None:
        return _reduce(-logsigmoid(sign * z).sum(1), weight, reduction)
    padding = candidate_bias == -torch.inf
    losses = -logsigmoid(sign * (z + candidate_bias.masked_fill(padding, 0.0)))
    return _reduce(losses.masked_fill(padding, 0.0).sum(1), weight, reduction)


def decomposable(
    x: Tensor,
    y: Tensor,
    logit_scale: Scale,
    log_normalizer: LogNormalizer,
    *,
    shape: float | None = None,
    positive_constant: float = 1.0,
    negative_scale: float = 1.0,
    positive_logits: LogNormalizer | None = None,
    positives: int | Tensor | None = None,
    ids: Ids | None = None,
    candidate_bias: Tensor | None = None,
    margin: Margin | None = None,
    weight: Tensor | None = None,
    generator: torch.Generator | None = None,
    return_log_normalizer: bool = False,
    reduction: str = "mean",
) -> Tensor | tuple[Tensor, LogNormalizer]:
    """The decomposable loss, after [5]_ (derivation in docs/mathematics.md): a sum of weighted sub-losses over pairs.

    With h_ij = z_ij - z_i,p(i) and Z_i = c + k sum_{j != p(i)} exp(h_ij), the loss of row i is
    ``u_i Z_i - log u_i - 1`` for a given u_i, an upper bound of log Z_i with equality at u_i = 1/Z_i.

    Parameters
    ----------
    x, y : Tensor
        Anchors [N, D] and candidates [M, D].
    logit_scale : float or Tensor
        The inverse temperature.
    log_normalizer : Tensor or pair of Tensor
        log Zbar_i [N] known beforehand; a pair ([N], [M]) trains both directions (N == M).
    shape : float, optional
        None: u_i = 1 / Zbar_i. A number a: u_i is drawn from Gamma(a, rate = a * Zbar_i), and the value's expected
        excess log a - digamma(a) is subtracted.
    positive_constant, negative_scale : float
        c and k above.
    positive_logits : Tensor or pair of Tensor, optional
        z_i,p(i) where the columns do not hold row i's positive.
    positives : int or Tensor, optional
        As in :func:`info_nce`; with ``positive_logits``, an index of -1 says that the columns do not hold it.
    ids, margin
        As in :func:`info_nce`, with a pair in both directions.
    candidate_bias : Tensor, optional
        As in :func:`info_nce`, for one direction.
    weight : Tensor, optional
        Weights of the rows [N].
    generator : torch.Generator, optional
        Source of the draws.
    return_log_normalizer : bool
        Also return the batch's own log Z, in the form of ``log_normalizer``.
    reduction : {"mean", "sum", "none"}
        As in :func:`info_nce`.

    Returns
    -------
    Tensor or (Tensor, Tensor or pair of Tensor)
        The loss, and the batch's own log Z where asked for.
    """
    normalizers = _one_or_both(log_normalizer)
    given = [None] * len(normalizers) if positive_logits is None else _one_or_both(positive_logits)
    nowhere = positive_logits is not None and positives is None
    held = torch.full((len(x),), -1, dtype=torch.int64, device=x.device) if nowhere else _positive_indices(x, positives)
    x, y, weight = _without_padding(x, y, candidate_bias, held, weight)
    unbiased = logit_scale * (x @ y.T)
    z = _biased(unbiased, candidate_bias)
    log_k = log_or_minus_infinity(negative_scale)
    losses, log_zs, alike = [], [], _alike(ids)
    alikes = (None, None) if alike is None else (alike, alike.T)
    sides = zip((unbiased, unbiased.T), given, alikes)
    masks = [_either(mask, _too_high(v, held, own, margin)) for v, own, mask in sides]
    for scores, log_zbar, z_pos, mask in zip((z, z.T), normalizers, given, masks):
        log_zbar = log_zbar.detach().to(z.dtype)
        log_weight = draw_log_weights(log_zbar, shape, generator)
        if z_pos is None:
            z_pos = _positive_logits(scores, held)
        h = _mask(scores, held, mask) - z_pos[:, None]
        log_u = log_weight - log_zbar
        exponents = h + (log_u + log_k)[:, None]
        if weight is not None:  # a row that does not count must not overflow, neither in its value nor in gradients
            exponents = exponents.masked_fill((weight == 0)[:, None], -torch.inf)
            log_u = log_u.masked_fill(weight == 0, 0.0)
        terms = torch.exp(exponents).sum(1)
        own = torch.exp(log_u + log_or_minus_infinity(positive_constant))  # u c, and 0 for c = 0 however large u is
        losses.append(terms + own - log_u - 1 - expected_excess(shape))
        log_z = _logsumexp(h) + log_k
        log_zs.append(torch.logaddexp(log_z, torch.full_like(log_z, log_or_minus_infinity(positive_constant))).detach())
    loss = _reduce(torch.stack(losses).mean(0), weight, reduction)
    if not return_log_normalizer:
        return loss
    return loss, (tuple(log_zs) if len(log_zs) == 2 else log_zs[0])


def log_sum_exp(
    x: Tensor,
    y: Tensor,
    logit_scale: Scale,
    *,
    positives: int | Tensor | None = None,
    ids: Ids | None = None,
    candidate_bias: Tensor | None = None,
) -> Tensor:
    """log sum_j exp(z_ij) [N] over the columns but the row's positive, if any, and those of its id.

    Parameters
    ----------
    x, y : Tensor
        Anchors [N, D] and candidates [M, D].
    logit_scale : float or Tensor
        The inverse temperature.
    positives : int or Tensor, optional
        An offset, or indices [N] with -1 for none; by default no row has one.
    ids, candidate_bias
        As in :func:`info_nce`.

    Returns
    -------
    Tensor
        [N]; -inf, with gradient 0, for a row of nothing.
    """
    held = torch.full((len(x),), -1, dtype=torch.int64, device=x.device)
    if positives is not None:
        held = _positive_indices(x, positives)
    x, y, _ = _without_padding(x, y, candidate_bias, None, None)
    return _logsumexp(_mask(_biased(logit_scale * (x @ y.T), candidate_bias), held, _alike(ids)))
