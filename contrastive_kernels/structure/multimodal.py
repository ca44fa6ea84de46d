"""The four-way contrastive base loss of a pair of modalities and their augmented views."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..arguments.checks import (
    check_features,
    require_equal_lengths,
)
from ..arguments.reduction import DEFAULT_WORKSPACE_BYTES
from ..arguments.temperature import scale_of
from ..distributed.group import ranks_of, told
from ..losses.clip import clip_loss
from ..losses.softmax import info_nce

__all__ = ["multimodal_contrastive"]


def multimodal_contrastive(
    image: Tensor,
    text: Tensor,
    image_aug: Tensor | None,
    text_aug: Tensor | None,
    logit_scale: float | Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    normalize: bool = False,
    backend: str | None = None,
    workspace_bytes: int | None = DEFAULT_WORKSPACE_BYTES,
    group: Any | None = None,
    gradients: str = "average",
    strategy: str = "auto",
    uneven: bool = False,
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
    temperature : float or Tensor, optional
        1 / logit_scale, in its place: above 0.
    normalize, backend, workspace_bytes, group, gradients, strategy, uneven
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

    With a `group` every rank returns the value of the concatenated batch; see docs/distributed.md.

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
    logit_scale = scale_of(image, logit_scale, temperature)
    ranks = ranks_of(group, gradients, strategy, uneven)
    views = [
        (feature, view, name)
        for feature, view, name in ((image, image_aug, "image"), (text, text_aug, "text"))
        if view is not None
    ]
    with told(ranks, image):
        check_features(image, text, ("image", "text"), normalize, matching=True)
        for feature, view, name in views:
            check_features(feature, view, (name, f"{name}_aug"), False)
            require_equal_lengths(feature, view, (name, f"{name}_aug"))
    if ranks is not None:  # how many losses there are
        ranks.agree_on_rows("multimodal_contrastive", image, ("views", [name for *_, name in views]))
    options: dict[str, Any] = {
        "normalize": normalize, "backend": backend, "workspace_bytes": workspace_bytes,
        "group": group, "gradients": gradients, "strategy": strategy, "uneven": uneven,
    }  # fmt: skip
    total = 2 * clip_loss(image, text, logit_scale, **options)
    for feature, view, _ in views:
        total = total + info_nce(feature, view, logit_scale, **options)
    return total / (2 + len(views))
