"""The losses that ``train_clip.py --loss`` knows: ours, and the dense formula that they are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from files import Mistake
from processes import count
from torch import Tensor
from torch.nn.functional import cross_entropy
from towers import TwoTowers

import contrastive_kernels as ck

__all__ = ["LOSSES", "Decomposable", "Objective", "dense_clip_loss", "make_objective"]

LOSSES = ("clip", "sigmoid", "decomposable", "dense")


def dense_clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """open_clip's formula, which holds two N x N matrices of logits, their softmaxes and their gradients."""
    logits_per_image = logit_scale * image_features @ text_features.T
    logits_per_text = logit_scale * text_features @ image_features.T
    labels = torch.arange(len(image_features), device=image_features.device)
    return (cross_entropy(logits_per_image, labels) + cross_entropy(logits_per_text, labels)) / 2


class Objective(Protocol):
    """Loss of a batch: features [N, D] of pictures and captions, and which characters they are [N]."""

    def __call__(self, model: TwoTowers, image: Tensor, text: Tensor, characters: Tensor) -> Tensor:
        """The mean loss, 0-d."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to keep."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes it back."""


Formula = Callable[[TwoTowers, Tensor, Tensor], Tensor]


class _Stateless:
    """A loss that remembers nothing."""

    def __init__(self, formula: Formula) -> None:
        self.formula = formula

    def __call__(self, model: TwoTowers, image: Tensor, text: Tensor, characters: Tensor) -> Tensor:
        """The mean loss, 0-d."""
        return self.formula(model, image, text)

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take back."""


# of all processes' rows, if there are several; a batch need not divide evenly
_CLIP, _SIGMOID = ck.ClipLoss(uneven=True), ck.SigmoidLoss(uneven=True)
_FORMULAS: dict[str, Formula] = {
    "clip": lambda model, image, text: _CLIP(image, text, model.logit_scale),
    "sigmoid": lambda model, image, text: _SIGMOID(image, text, model.logit_scale, model.logit_bias),
    "dense": lambda model, image, text: dense_clip_loss(image, text, model.logit_scale),
}


class Decomposable:
    """The decomposable loss over all characters, with a memory of every character's normaliser, one per direction.

    By default the batch enters the average before it is weighed by it: at the temperatures that are learnt here a row's
    normaliser scatters by a factor of five from batch to batch, and rows weighed by what never saw the batch outweigh
    one another. docs/decomposable.md has figures.

    Parameters
    ----------
    num_samples : int
        Characters in the data set.
    device : torch.device or str
    options
        Of ``contrastive_kernels.DecomposableContrastiveLoss``.
    """

    def __init__(self, num_samples: int, device: torch.device | str = "cpu", **options: Any) -> None:
        options = {"weights": "updated", "floor": 0.6, "uneven": True, **options}
        self.loss = ck.DecomposableContrastiveLoss(num_samples, device=device, **options)

    def __call__(self, model: TwoTowers, image: Tensor, text: Tensor, characters: Tensor) -> Tensor:
        """The mean loss, 0-d; moves the memory."""
        return self.loss(image, text, characters, model.logit_scale)

    def state_dict(self) -> dict[str, Any]:
        """The memory."""
        return self.loss.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the memory back."""
        self.loss.load_state_dict(state)


def make_objective(loss: str, num_samples: int, device: torch.device | str = "cpu") -> Objective:
    """One of ``LOSSES`` for a data set of so many characters."""
    if loss == "decomposable":
        return Decomposable(num_samples, device)
    if loss not in _FORMULAS:
        raise ValueError(f"loss: expected one of {LOSSES}, got {loss!r}")
    if loss == "dense" and count() > 1:
        raise Mistake(f"--loss dense: expected one process, whose rows the formula knows; got {count()}")
    return _Stateless(_FORMULAS[loss])


def initial_logits(loss: str) -> tuple[float, float]:
    """Scale and bias to start from, as CLIP and SigLIP do."""
    return (10.0, -10.0) if loss == "sigmoid" else (1 / 0.07, 0.0)
