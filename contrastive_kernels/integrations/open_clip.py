"""open_clip's losses: ``ClipLoss``, ``SigLipLoss`` and ``CoCaLoss`` with the arguments that they have there."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..losses import clip_loss, info_nce, sigmoid
from .common import leave, missing, replace, replaced, scaled_gradient

try:
    from open_clip import loss as _theirs
except ImportError as _error:
    raise missing(__name__, "open_clip_torch", _error) from _error

__all__ = ["ClipLoss", "CoCaLoss", "SigLipLoss", "install", "patched"]

#: Methods that see logits: whose subclass has one of its own wants a matrix.
_OF_LOGITS = ("get_logits", "get_ground_truth")


class ClipLoss(_theirs.ClipLoss):
    """open_clip's ``ClipLoss`` without the matrix of logits.

    Parameters
    ----------
    local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod
        As in open_clip. Over ranks, value and features' gradients are those of every combination of the first two;
        the scale's are equal once they are averaged over ranks, as data parallelism does.

    Notes
    -----
    The default process group is used where ``world_size`` is more than 1. Left to open_clip, with a warning once:
    Horovod, and subclasses that have logits or labels of their own.
    """

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Any:
        """Matching rows [n, D] of this rank; a scalar, or a dict of it."""
        reason = _reason(self, _theirs.ClipLoss)
        if reason is None and self.world_size > 1 and self.use_horovod:
            reason = "a loss over Horovod"
        if reason is not None:
            leave("open_clip.ClipLoss", reason)
            return super().forward(image_features, text_features, logit_scale, logit_bias, output_dict)
        loss = self._contrast(image_features, text_features, logit_scale)
        if isinstance(logit_bias, Tensor) and logit_bias.requires_grad:  # it shifts all logits alike
            loss = loss + 0.0 * logit_bias.sum().to(loss.dtype)
        return {"contrastive_loss": loss} if output_dict else loss

    def _contrast(self, x: Tensor, y: Tensor, scale: Any) -> Tensor:
        """The loss of this rank, with the gradients of the two flags."""
        if self.world_size == 1:
            return clip_loss(x, y, scale)
        if self.gather_with_grad and self.local_loss:  # the mean over this rank's rows
            return clip_loss(x, y, scale, reduction="none", group="world").mean()
        if self.gather_with_grad:
            return clip_loss(x, y, scale, group="world")
        if not self.local_loss:
            # of the features only this rank's own part of the gradient; of the scale all of it on every rank
            return clip_loss(x, y, scaled_gradient(scale, self.world_size), group="world", gradients="sum")
        # other rows, and these as candidates of others, are constants
        every_x, every_y = _theirs.gather_features(x, y, True, False, self.rank, self.world_size, False)
        own = self.rank * len(x)
        there = info_nce(x, every_y.detach(), scale, positives=own)
        return (there + info_nce(y, every_x.detach(), scale, positives=own)) / 2


class CoCaLoss(_theirs.CoCaLoss, ClipLoss):
    """open_clip's ``CoCaLoss`` whose contrastive part has no matrix of logits.

    Parameters
    ----------
    caption_loss_weight, clip_loss_weight, pad_id
        As in open_clip.
    local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod
        As in :class:`ClipLoss`.
    """


class SigLipLoss(_theirs.SigLipLoss):
    """open_clip's ``SigLipLoss`` without the matrix of logits.

    Parameters
    ----------
    cache_labels, rank, world_size, dist_impl
        As in open_clip. How ranks' rows meet is this package's choice, whatever ``dist_impl`` says: its four ways have
        one value and one gradient.

    Notes
    -----
    The default process group is used where ``world_size`` is more than 1. Left to open_clip, with a warning once:
    subclasses that have logits, labels or a loss of pairs of their own.
    """

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        output_dict: bool = False,
    ) -> Any:
        """Matching rows [n, D] of this rank; a scalar, or a dict of it."""
        reason = _reason(self, _theirs.SigLipLoss)
        if reason is not None:
            leave("open_clip.SigLipLoss", reason)
            return super().forward(image_features, text_features, logit_scale, logit_bias, output_dict)
        bias = 0.0 if logit_bias is None else logit_bias
        if self.world_size == 1:
            loss = sigmoid(image_features, text_features, logit_scale, bias)
        else:  # the mean over this rank's images
            loss = sigmoid(image_features, text_features, logit_scale, bias, reduction="none", group="world").mean()
        return {"contrastive_loss": loss} if output_dict else loss


def _reason(module: torch.nn.Module, base: Any) -> str | None:
    """What a subclass wants that needs a matrix."""
    for name in (*_OF_LOGITS, "_loss"):
        if getattr(type(module), name, None) is not getattr(base, name, None):
            return f"{type(module).__name__} with {name} of its own"
    return None


_CLASSES = {_theirs.ClipLoss: ClipLoss, _theirs.SigLipLoss: SigLipLoss, _theirs.CoCaLoss: CoCaLoss}


def install() -> None:
    """Puts these losses into the place of open_clip's own: its ``create_loss`` makes them, in its training program too.

    Call it before names are imported from open_clip one by one. ``DistillClipLoss`` has soft targets and stays.
    """
    replace("open_clip", _CLASSES)


def patched() -> AbstractContextManager[None]:
    """The same until the end of a ``with`` block.

    Returns
    -------
    context manager
        Losses that are made within it stay these.
    """
    return replaced("open_clip", _CLASSES)
