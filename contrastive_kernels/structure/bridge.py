"""The Brownian bridge between an augmented view and the other modality."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments.checks import check_generator, check_number, shown
from .matching import matching

__all__ = ["brownian_bridge", "check_time"]


#: The likelihood's weight 1 / (2 t (1 - t)) times the density 6 t (1 - t) of Beta(2, 2).
_SAMPLED_WEIGHT = 3.0
#: A mean is divided by its length, or by this where it is shorter: antipodal ends have no mean direction.
SHORTEST_MEAN = 1e-3


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

    A mean over samples: it compares no two of them, and needs no `group`. Averaged over ranks with as many samples
    each, its gradients are those of the mean over all.

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
    at = check_time(t)
    (v, u), (va, ua) = matching(
        {"image": image, "text": text}, {"image_aug": image_aug, "text_aug": text_aug}, normalize
    )
    check_generator(generator, v.device)
    sides = [(own, other, view) for own, other, view in ((v, u, va), (u, v, ua)) if view is not None]
    total = v.new_zeros(())
    for own, other, view in sides:
        if at is None:
            draws = torch.rand(own.shape[0], 1, generator=generator, device=own.device, dtype=own.dtype)
            total = total + _SAMPLED_WEIGHT * _squared_distance(view, own, other, draws)
        else:
            total = total + _squared_distance(view, own, other, at)
    return total / (len(sides) * max(v.shape[0], 1))


def check_time(t: Any) -> float | None:
    """A number in [0, 1], or None for "sampled"."""
    at = None if isinstance(t, str) and t == "sampled" else check_number(t, "t", positive=False)
    if at is not None and at > 1:
        raise ValueError(f"t: expected a number in [0, 1] or 'sampled'; got {shown(t)}")
    return at


def _squared_distance(view: Tensor, own: Tensor, other: Tensor, t: float | Tensor) -> Tensor:
    """sum_j |view_j - mu_j|^2 with mu = normalise(t own + (1 - t) other)."""
    mean = t * own + (1 - t) * other
    length = mean.square().sum(1, keepdim=True).clamp(min=SHORTEST_MEAN**2).sqrt()
    return (view - mean / length).square().sum()
