"""Deep feature separation: independent features beside the shared ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments.checks import check_engine, check_features, check_flag, check_number, check_scale
from ..arguments.options import DEFAULT_WORKSPACE_BYTES
from ..arguments.temperature import scale_of
from ..distributed.group import ranks_of, told
from ..distributed.losses import over_ranks
from ..distributed.rules import LogSumExp
from ..distributed.sums import Sums
from ..engine.matrix import Problem
from ..losses import info_nce
from ..operators.logsumexp import logsumexp
from ..panels.size import score_dtype
from .matching import matching

__all__ = ["feature_separation"]


def feature_separation(
    image: Tensor,
    text: Tensor,
    image_independent: Tensor,
    text_independent: Tensor,
    image_independent_aug: Tensor | None,
    text_independent_aug: Tensor | None,
    logit_scale: float | Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    orthogonality: float = 1.0,
    contrast: float = 1.0,
    uniformity: float = 1.0,
    return_terms: bool = False,
    normalize: bool = False,
    backend: str | None = None,
    workspace_bytes: int | None = DEFAULT_WORKSPACE_BYTES,
    group: Any | None = None,
    gradients: str = "average",
    strategy: str = "auto",
    uneven: bool = False,
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
    temperature : float or Tensor, optional
        1 / logit_scale, in its place: above 0.
    orthogonality : float
        Weight of sum_j (<V_j, Vi_j>^2 + <T_j, Ti_j>^2) / N, at least 0.
    contrast : float
        Weight of InfoNCE(Vi, Via) + InfoNCE(Ti, Tia), at least 0.
    uniformity : float
        Weight of log (1/N) sum_jk (G(Vi_j, Vi_k) + G(Ti_j, Ti_k)) with G(u, v) = exp(4 <u, v> - 4), which is
        exp(-2 |u - v|^2) of unit vectors; at least 0.
    return_terms : bool
        Also return the three terms, unweighted and detached, by the names of their weights.
    normalize, backend, workspace_bytes, group, gradients, strategy, uneven
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

    With a `group` every rank returns the value of the concatenated batch; see docs/distributed.md.

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
    logit_scale = scale_of(image, logit_scale, temperature)
    ranks = ranks_of(group, gradients, strategy, uneven)
    with told(ranks, image):
        weights = {"orthogonality": orthogonality, "contrast": contrast, "uniformity": uniformity}
        weights = {name: check_number(value, name, positive=False) for name, value in weights.items()}
        features = {
            "image": image,
            "text": text,
            "image_independent": image_independent,
            "text_independent": text_independent,
        }
        views = {"image_independent_aug": image_independent_aug, "text_independent_aug": text_independent_aug}
        (v, t, vi, ti), _ = matching(features, views, normalize)
        # (terms that would check them may have weight 0)
        check_engine(backend, workspace_bytes)
        check_scale(v, logit_scale)
        check_flag(return_terms, "return_terms")
    options: dict[str, Any] = {"normalize": normalize, "backend": backend, "workspace_bytes": workspace_bytes}
    there = [name for name, view in views.items() if view is not None]
    about = (("weights", weights), ("views", there), ("normalize", normalize))
    grads = Sums.differentiated(v, t, vi, ti)
    sums = None if ranks is None else Sums.of(ranks, "feature_separation", v, *about, grads)
    terms: dict[str, Tensor] = {}
    if weights["orthogonality"]:
        squares = (v * vi).sum(1).square().sum() + (t * ti).sum(1).square().sum()
        terms["orthogonality"] = squares / max(v.shape[0], 1) if sums is None else sums.mean(squares)
    if weights["contrast"]:
        pairs = ((image_independent, image_independent_aug), (text_independent, text_independent_aug))
        over: dict[str, Any] = {"group": group, "gradients": gradients, "strategy": strategy, "uneven": uneven}
        losses = [info_nce(own, view, logit_scale, **options, **over) for own, view in pairs if view is not None]
        if losses:
            terms["contrast"] = torch.stack(losses).sum()
    if weights["uniformity"]:
        terms["uniformity"] = _uniformity(image_independent, text_independent, options, sums)
    loss = v.new_zeros(())
    for name, value in terms.items():
        loss = loss + weights[name] * value
    return (loss, {name: value.detach() for name, value in terms.items()}) if return_terms else loss


def _uniformity(image: Tensor, text: Tensor, options: dict[str, Any], sums: Sums | None) -> Tensor:
    """log (1/N) sum_jk (G(V_j, V_k) + G(T_j, T_k)), a scalar; 0 for no rows."""
    names = ("image_independent", "text_independent")
    image, text = check_features(image, text, names, options["normalize"])
    engine = check_engine(options["backend"], options["workspace_bytes"])
    exponents = []
    for features in (image, text):
        problem = Problem(features, features, 4.0, -4.0, symmetric=sums is None, engine=engine)
        if sums is None:
            others = logsumexp(problem)
        else:
            others = over_ranks(LogSumExp(), sums.ranks, "uniformity", problem, None, "none")
        itself = 4 * features.to(others.dtype).square().sum(1) - 4
        exponents.append(torch.logaddexp(others, itself))
    rows = image.shape[0] if sums is None else sums.rows
    if rows == 0:
        return image.new_zeros((), dtype=score_dtype(image.dtype))
    count = torch.full((), float(rows), dtype=exponents[0].dtype, device=image.device)
    every = torch.cat(exponents)
    return (torch.logsumexp(every, 0) if sums is None else sums.logsumexp(every)) - count.log()
