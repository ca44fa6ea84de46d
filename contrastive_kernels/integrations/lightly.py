"""lightly's losses: ``NTXentLoss`` with its memory bank, ``DCLLoss`` and ``DCLWLoss``."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from torch.nn.functional import normalize

from ..losses import info_nce, nt_xent
from .common import missing, replace, replaced

try:
    from lightly.loss import dcl_loss as _dcl
    from lightly.loss import ntx_ent_loss as _ntx_ent
    from lightly.utils import dist as _dist
except ImportError as _error:
    raise missing(__name__, "lightly", _error) from _error

__all__ = ["DCLLoss", "DCLWLoss", "NTXentLoss", "install", "patched"]


class NTXentLoss(_ntx_ent.NTXentLoss):
    """lightly's ``NTXentLoss`` without the matrices of similarities.

    Parameters
    ----------
    temperature, memory_bank_size, gather_distributed
        As in lightly.

    Notes
    -----
    The default process group is used where ``gather_distributed`` is set and there are several ranks. The memory bank
    is lightly's own.
    """

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """Two views [n, D]; a scalar."""
        out0, out1 = normalize(out0, dim=1), normalize(out1, dim=1)
        out1, bank = self.memory_bank.forward(out1, update=out0.requires_grad)
        scale = 1.0 / self.temperature
        if bank is None:
            return _two_views(out0, out1, scale, gather=self.gather_distributed)
        return _against_bank(out0, out1, bank.to(out0.device), scale)


class DCLLoss(_dcl.DCLLoss):
    """lightly's ``DCLLoss`` without the matrices of similarities.

    Parameters
    ----------
    temperature, weight_fn, gather_distributed
        As in lightly; weights may be differentiable.

    Notes
    -----
    The default process group is used where ``gather_distributed`` is set and there are several ranks. A single sample
    without any negative has a loss of 0, and not of minus infinity.
    """

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """Two views [n, D]; a scalar."""
        out0, out1 = normalize(out0, dim=1), normalize(out1, dim=1)
        scale = 1.0 / self.temperature
        loss = _two_views(out0, out1, scale, gather=self.gather_distributed, include_positive=False)
        if self.weight_fn:  # it weighs the positives' logits alone, which have a weight of 1 so far
            positive = scale * (out0.to(loss.dtype) * out1.to(loss.dtype)).sum(1)
            weights = [self.weight_fn(*views).to(loss.dtype) for views in ((out0, out1), (out1, out0))]
            loss = loss + ((1 - (weights[0] + weights[1]) / 2) * positive).mean()
        return loss


class DCLWLoss(_dcl.DCLWLoss, DCLLoss):
    """lightly's ``DCLWLoss`` without the matrices of similarities.

    Parameters
    ----------
    temperature, sigma, gather_distributed
        As in lightly.
    """


def _two_views(x: Tensor, y: Tensor, scale: float, gather: bool, **options: Any) -> Tensor:
    """The mean over this rank's 2n views, of which all ranks' are candidates if wanted."""
    if gather and _dist.world_size() > 1:
        return nt_xent(x, y, scale, reduction="none", group="world", **options).mean()
    return nt_xent(x, y, scale, **options)


def _against_bank(x: Tensor, y: Tensor, bank: Tensor, scale: float) -> Tensor:
    """Rows x [n, D] with their positives y [n, D] against a bank [D, K]; other rows' positives are no candidates."""
    return info_nce(x, bank.transpose(0, 1).to(y.dtype), scale, positive_features=y)


_CLASSES = {_ntx_ent.NTXentLoss: NTXentLoss, _dcl.DCLLoss: DCLLoss, _dcl.DCLWLoss: DCLWLoss}


def install() -> None:
    """Puts these losses into the place of lightly's own.

    Call it before names are imported from lightly one by one.
    """
    replace("lightly", _CLASSES)


def patched() -> AbstractContextManager[None]:
    """The same until the end of a ``with`` block.

    Returns
    -------
    context manager
        Losses that are made within it stay these.
    """
    return replaced("lightly", _CLASSES)
