"""The losses that ``train_clip.py --loss`` knows: ours, and the dense formula that they are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
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


_FORMULAS: dict[str, Formula] = {
    "clip": lambda model, image, text: ck.clip_loss(image, text, model.logit_scale),
    "sigmoid": lambda model, image, text: ck.sigmoid(image, text, model.logit_scale, model.logit_bias),
    "dense": lambda model, image, text: dense_clip_loss(image, text, model.logit_scale),
}


class Decomposable:
    """The decomposable loss with a memory of every character's log-normaliser, one per direction.

    A batch is weighed by the normalisers stored *before* it: with its own ones the loss would be plain InfoNCE again,
    bias and all. Only a character that was never met takes the batch's own, from a pass without gradients.

    Parameters
    ----------
    num_samples : int
        Characters in the data set.
    device : torch.device or str
    power, floor : float
        Visit v moves the stored normaliser by ``max(v ** -power, floor)`` of the way. The average forgets as long as
        the towers learn, hence the floor.
    """

    def __init__(
        self, num_samples: int, device: torch.device | str = "cpu", power: float = 0.6, floor: float = 0.5
    ) -> None:
        self.log_z = torch.zeros(2, num_samples, device=device)
        self.visits = torch.zeros(num_samples, device=device)
        self.power, self.floor = power, floor
        self._all_met = False  # on the host, so that the warm loop never asks the device

    def __call__(self, model: TwoTowers, image: Tensor, text: Tensor, characters: Tensor) -> Tensor:
        """The mean loss, 0-d; moves the memory."""
        scale = model.logit_scale
        stored = self.log_z[:, characters]
        if not self._all_met:
            new = self.visits[characters] == 0
            if bool(new.any()):
                stored = torch.where(new, self._own(image, text, scale), stored)
            else:
                self._all_met = bool((self.visits > 0).all())
        loss, own = ck.decomposable(image, text, scale, (stored[0], stored[1]), return_log_normalizer=True)
        self._move(characters, stored, torch.stack(list(own)))
        return loss

    @torch.no_grad()
    def _own(self, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        """The batch's own log-normalisers [2, N]: the cross-entropies of both directions."""
        rows = ck.info_nce(image, text, scale, reduction="none")
        return torch.stack([rows, ck.info_nce(text, image, scale, reduction="none")])

    @torch.no_grad()
    def _move(self, characters: Tensor, stored: Tensor, own: Tensor) -> None:
        """Zbar <- (1 - g) Zbar + g Z, as logarithms."""
        self.visits[characters] += 1
        step = self.visits[characters].pow(-self.power).clamp_min(self.floor)
        self.log_z[:, characters] = torch.logaddexp(stored + torch.log1p(-step), own + step.log())

    def state_dict(self) -> dict[str, Any]:
        """The memory."""
        return {"log_z": self.log_z, "visits": self.visits}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the memory back."""
        self.log_z.copy_(state["log_z"])
        self.visits.copy_(state["visits"])


def make_objective(loss: str, num_samples: int, device: torch.device | str = "cpu") -> Objective:
    """One of ``LOSSES`` for a data set of so many characters."""
    if loss == "decomposable":
        return Decomposable(num_samples, device)
    if loss not in _FORMULAS:
        raise ValueError(f"loss: expected one of {LOSSES}, got {loss!r}")
    return _Stateless(_FORMULAS[loss])


def initial_logits(loss: str) -> tuple[float, float]:
    """Scale and bias to start from, as CLIP and SigLIP do."""
    return (10.0, -10.0) if loss == "sigmoid" else (1 / 0.07, 0.0)
