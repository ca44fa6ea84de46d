"""Latent modality structures: one function per regulariser, and the base loss that they belong to.

All of them take unit-norm features of one dtype and give a float32 value (float64 for float64 features); the parts of
size N D are computed in that precision whatever comes in, under autocast too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._geometry import difference_sum
from .arguments.checks import (
    check_backend,
    check_features,
    check_number,
    check_workspace,
    make_params,
    require_equal_lengths,
)
from .arguments.reduction import DEFAULT_WORKSPACE_BYTES
from .losses.softmax import clip_loss, info_nce
from .operators.autograd import Options, log_sum
from .panels.size import score_dtype
from .reference.structure import SHORTEST_MEAN

__all__ = ["brownian_bridge", "feature_separation", "geometric_consistency", "multimodal_contrastive"]

#: The likelihood's weight 1 / (2 t (1 - t)) times the density 6 t (1 - t) of Beta(2, 2).
_SAMPLED_WEIGHT = 3.0


def multimodal_contrastive(
    image: Tensor,
    text: Tensor,
    image_aug: Tensor | None,
    text_aug: Tensor | None,
    logit_scale: float | Tensor,
    *,
    normalize: bool = False,
    backend: str | None = None,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> Tensor:
    """The four-way contrastive loss: the mean of InfoNCE from V to T, T to V, V to Va and T to Ta.

    Parameters
    ----------
    image, text : Tensor
        Matching rows V, T [N, D] of one dtype and device.
    image_aug, text_aug : Tensor or None
        Features of their augmented views Va, Ta [N, D], the keys of the in-modal terms: from the same encoder, or from
        a momentum encoder without gradient. A view that is None leaves its term out of the mean.
    logit_scale : float or Tensor
        Multiplies the dot products: the inverse temperature, not its logarithm.
    normalize, backend, workspace_bytes
        As in :func:`contrastive_kernels.info_nce`.

    Returns
    -------
    Tensor
        A scalar; float32 (float64 for float64 inputs).

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit, and for a named backend that cannot serve.

    Notes
    -----
    Three streams: the two cross-modal terms share one. O(N D) memory.

    References
    ----------
    Q. Jiang et al., "Understanding and constructing latent modality structures in multi-modal representation
    learning", CVPR 2023.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> features = torch.eye(4)
    >>> round(ck.multimodal_contrastive(features, features, features, features, 5.0).item(), 5)
    0.02001
    """
    options: dict[str, Any] = {"normalize": normalize, "backend": backend, "workspace_bytes": workspace_bytes}
    total, terms = 2 * clip_loss(image, text, logit_scale, **options), 2
    for feature, view, name in ((image, image_aug, "image_aug"), (text, text_aug, "text_aug")):
        if view is not None:
            check_features(feature, view, (name.removesuffix("_aug"), name), False)
            require_equal_lengths(feature, view, (name.removesuffix("_aug"), name))
            total, terms = total + info_nce(feature, view, logit_scale, **options), terms + 1
    return total / terms


def geometric_consistency(
    image: Tensor,
    text: Tensor,
    image_aug: Tensor | None = None,
    text_aug: Tensor | None = None,
    *,
    cross: float = 1.0,
    intra: float = 1.0,
    augmented: float = 1.0,
    normalize: bool = False,
) -> Tensor:
    """Geometric consistency: images and texts have the same table of similarities.

    Parameters
    ----------
    image, text : Tensor
        Matching rows V, T [N, D] of one dtype and device.
    image_aug, text_aug : Tensor, optional
        Features of their augmented views Va, Ta [N, D].
    cross : float
        Weight of sum_jk (<V_j, T_k> - <V_k, T_j>)^2 / N, at least 0.
    intra : float
        Weight of sum_jk (<V_j, V_k> - <T_j, T_k>)^2 / N, at least 0.
    augmented : float
        Weight of the same between a modality and its augmented view, and of sum_j (<V_j, T_j> - <Va_j, Ta_j>)^2 / N
        where there are both views; at least 0.
    normalize : bool
        Divide rows by their Euclidean norm first.

    Returns
    -------
    Tensor
        A scalar; float32 (float64 for float64 inputs).

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit.

    Notes
    -----
    Exact, in O(N D^2) time and O(N D + D^2) memory (O(N^2 D) and O(N^2) where N < D): with A = V - T, B = V + T, both
    double sums follow from the D x D matrices AT A, BT B and BT A (docs/structures.md). With ``cross == intra`` the
    third one is not needed, and the value keeps its digits however close V and T are. One sum alone is the difference
    of two: its error is relative to <AT A, BT B>, and a true 0 may come out as 1e-6 of that. It is never below 0.

    References
    ----------
    Q. Jiang et al., "Understanding and constructing latent modality structures in multi-modal representation
    learning", CVPR 2023. S. Goel et al., "CyCLIP: Cyclic contrastive language-image pretraining", NeurIPS 2022 (whose
    weights for the two sums are 0.25).

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> image, text = torch.eye(3), torch.eye(3)[[1, 2, 0]]
    >>> ck.geometric_consistency(image, text).item()
    2.0
    >>> ck.geometric_consistency(image, text, cross=0.0).item()
    0.0
    """
    weights = {"cross": cross, "intra": intra, "augmented": augmented}
    cross, intra, augmented = (check_number(value, name, positive=False) for name, value in weights.items())
    (v, t), (va, ta) = _matching(
        {"image": image, "text": text}, {"image_aug": image_aug, "text_aug": text_aug}, normalize
    )
    total = difference_sum(v, t, cross, intra)
    for feature, view in ((v, va), (t, ta)):
        if view is not None:
            total = total + augmented * difference_sum(feature, view, 0.0, 1.0)
    if va is not None and ta is not None:
        # <V, T> - <Va, Ta>, from differences that are exact where the views are close
        pairs = ((v - va) * t).sum(1) + (va * (t - ta)).sum(1)
        total = total + augmented * pairs.square().sum()
    return total / max(v.shape[0], 1)


def brownian_bridge(
    image: Tensor,
    text: Tensor,
    image_aug: Tensor | None = None,
    text_aug: Tensor | None = None,
    *,
    t: float | str = 0.25,
    generator: torch.Generator | None = None,
    normalize: bool = False,
) -> Tensor:
    """A Brownian bridge between the modalities: an augmented view lies on the way from its own to the other one.

    The view of sample j is compared with mu = normalise(t * own_j + (1 - t) * other_j).

    Parameters
    ----------
    image, text : Tensor
        The bridge's ends V, T [N, D], unit-norm, of one dtype and device.
    image_aug, text_aug : Tensor, optional
        The points on the way [N, D]: the image's augmented view, the text's, or both.
    t : float or "sampled"
        The weight of the view's own modality in [0, 1]. "sampled": drawn anew for every sample and side; see Notes.
    generator : torch.Generator, optional
        Source of the draws.
    normalize : bool
        Divide rows by their Euclidean norm first.

    Returns
    -------
    Tensor
        The mean over samples, and over both sides where there are both, of |view - mu|^2; a scalar, float32 (float64
        for float64 inputs).

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit.

    Notes
    -----
    The bridge's variance is t (1 - t), so maximum likelihood weighs the squared distance by 1 / (2 t (1 - t)), whose
    mean is infinite for a uniform t. Under t ~ Beta(2, 2) it is finite, and the same in expectation as a uniform t with
    the constant weight 3, which varies less: that is what "sampled" does. A fixed t has the weight 1.

    Antipodal ends at t = 1/2 have no mean direction: a mean shorter than 1e-3 is divided by 1e-3 instead of by its
    length, so that gradients stay finite.

    References
    ----------
    Q. Jiang et al., "Understanding and constructing latent modality structures in multi-modal representation
    learning", CVPR 2023 (the image's side, t = 0.25).

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> image, text = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> on_the_way = torch.tensor([[0.25, 0.75]]) / 0.625**0.5
    >>> ck.brownian_bridge(image, text, on_the_way).item() < 1e-12
    True
    """
    if image_aug is None and text_aug is None:
        raise ValueError("image_aug, text_aug: expected at least one augmented view; got None for both")
    at = None if t == "sampled" else check_number(t, "t", positive=False)
    if at is not None and at > 1:
        raise ValueError(f"t: expected a number in [0, 1] or 'sampled'; got {t}")
    (v, u), (va, ua) = _matching(
        {"image": image, "text": text}, {"image_aug": image_aug, "text_aug": text_aug}, normalize
    )
    sides = [(own, other, view) for own, other, view in ((v, u, va), (u, v, ua)) if view is not None]
    total = v.new_zeros(())
    for own, other, view in sides:
        if at is None:
            draws = torch.rand(own.shape[0], 1, generator=generator, device=own.device, dtype=own.dtype)
            total = total + _SAMPLED_WEIGHT * _squared_distance(view, own, other, draws)
        else:
            total = total + _squared_distance(view, own, other, at)
    return total / (len(sides) * max(v.shape[0], 1))


def _squared_distance(view: Tensor, own: Tensor, other: Tensor, t: float | Tensor) -> Tensor:
    """sum_j |view_j - mu_j|^2 with mu = normalise(t own + (1 - t) other)."""
    mean = t * own + (1 - t) * other
    length = mean.square().sum(1, keepdim=True).clamp(min=SHORTEST_MEAN**2).sqrt()
    return (view - mean / length).square().sum()


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
    return_terms: bool = False,
    normalize: bool = False,
    backend: str | None = None,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Deep feature separation: independent features hold what is orthogonal to the shared ones, and are spread out.

    Parameters
    ----------
    image, text : Tensor
        Shared features V, T [N, D], unit-norm, of one dtype and device.
    image_independent, text_independent : Tensor
        Features Vi, Ti [N, D] of one modality alone, unit-norm, from heads of their own
        (:class:`contrastive_kernels.SeparationHead`).
    image_independent_aug, text_independent_aug : Tensor or None
        The same of augmented views [N, D]. A view that is None leaves its contrastive term out.
    logit_scale : float or Tensor
        The inverse temperature of the contrastive terms. Detached, or one of their own: telling independent features
        apart is another task than matching shared ones, and would pull a common temperature away from these.
    orthogonality : float
        Weight of sum_j (<V_j, Vi_j>^2 + <T_j, Ti_j>^2) / N, at least 0.
    contrast : float
        Weight of InfoNCE(Vi, Via) + InfoNCE(Ti, Tia), at least 0.
    uniformity : float
        Weight of log (1/N) sum_jk (G(Vi_j, Vi_k) + G(Ti_j, Ti_k)) with G(u, v) = exp(4 <u, v> - 4), which is
        exp(-2 |u - v|^2) of unit vectors; at least 0.
    return_terms : bool
        Also return the three terms, unweighted and detached, by the names of their weights.
    normalize, backend, workspace_bytes
        As in :func:`contrastive_kernels.info_nce`.

    Returns
    -------
    Tensor or (Tensor, dict of Tensor)
        A scalar; float32 (float64 for float64 inputs).

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit, and for a named backend that cannot serve.

    Notes
    -----
    The uniformity term is one log-sum-exp over all pairs of both modalities, streamed by the engine: O(N D) memory. Of
    its symmetric tables only one half is computed; the pairs of a sample with itself count, and are added outside.
    A term of weight 0 is not computed.

    References
    ----------
    Q. Jiang et al., "Understanding and constructing latent modality structures in multi-modal representation
    learning", CVPR 2023. T. Wang, P. Isola, "Understanding contrastive representation learning through alignment and
    uniformity on the hypersphere", ICML 2020.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> shared, independent = torch.eye(6)[:3], torch.eye(6)[3:]
    >>> loss, terms = ck.feature_separation(
    ...     shared, shared, independent, independent, independent, independent, 10.0, return_terms=True
    ... )
    >>> {name: round(value.item(), 4) for name, value in terms.items()}
    {'orthogonality': 0.0, 'contrast': 0.0002, 'uniformity': 0.7291}
    """
    weights = {"orthogonality": orthogonality, "contrast": contrast, "uniformity": uniformity}
    weights = {name: check_number(value, name, positive=False) for name, value in weights.items()}
    features = {
        "image": image,
        "text": text,
        "image_independent": image_independent,
        "text_independent": text_independent,
    }
    views = {"image_independent_aug": image_independent_aug, "text_independent_aug": text_independent_aug}
    (v, t, vi, ti), _ = _matching(features, views, normalize)
    options: dict[str, Any] = {"normalize": normalize, "backend": backend, "workspace_bytes": workspace_bytes}
    terms: dict[str, Tensor] = {}
    if weights["orthogonality"]:
        squares = (v * vi).sum(1).square().sum() + (t * ti).sum(1).square().sum()
        terms["orthogonality"] = squares / max(v.shape[0], 1)
    if weights["contrast"]:
        pairs = ((image_independent, image_independent_aug), (text_independent, text_independent_aug))
        losses = [info_nce(own, view, logit_scale, **options) for own, view in pairs if view is not None]
        if losses:
            terms["contrast"] = torch.stack(losses).sum()
    if weights["uniformity"]:
        terms["uniformity"] = _uniformity(image_independent, text_independent, options)
    loss = v.new_zeros(())
    for name, value in terms.items():
        loss = loss + weights[name] * value
    return (loss, {name: value.detach() for name, value in terms.items()}) if return_terms else loss


def _uniformity(image: Tensor, text: Tensor, options: dict[str, Any]) -> Tensor:
    """log (1/N) sum_jk (G(V_j, V_k) + G(T_j, T_k)), a scalar; 0 for no rows."""
    names = ("image_independent", "text_independent")
    image, text = check_features(image, text, names, options["normalize"])
    stream = Options(check_backend(options["backend"]), check_workspace(options["workspace_bytes"]), symmetric=True)
    exponents = []
    for features in (image, text):
        params = make_params(features, 4.0, -4.0)
        others = log_sum(features, features, params, None, True, False, stream)[0]
        itself = 4 * features.to(params.dtype).square().sum(1) - 4
        exponents.append(torch.logaddexp(others, itself))
    rows = image.shape[0]
    if rows == 0:
        return image.new_zeros((), dtype=score_dtype(image.dtype))
    count = torch.full((), float(rows), dtype=params.dtype, device=image.device)
    return torch.logsumexp(torch.cat(exponents), 0) - count.log()


def _matching(
    features: dict[str, Tensor], views: dict[str, Tensor | None], normalize: bool
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Features and the views that there are, in the precision of the scores, all of the first one's shape and dtype.

    Autocast does not round them: what is of size N D gains nothing from 16 bits.
    """
    first_name, first = next(iter(features.items()))

    def checked(name: str, feature: Tensor) -> Tensor:
        x, y = check_features(first, feature, (first_name, name), normalize)
        require_equal_lengths(x, y, (first_name, name))
        return y.to(score_dtype(y.dtype))

    device = first.device.type if isinstance(first, Tensor) else "cpu"
    with torch.autocast(device, enabled=False):
        return (
            [checked(name, feature) for name, feature in features.items()],
            [None if view is None else checked(name, view) for name, view in views.items()],
        )
