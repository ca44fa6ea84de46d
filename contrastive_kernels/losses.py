"""The losses as modules: parameters and documentation; the mathematics is in ``functional.py``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import functional as F
from .arguments.checks import check_backend, check_reduction, check_workspace

__all__ = ["ClipLoss", "DecomposableLoss", "InfoNCELoss", "NTXentLoss", "SigmoidLoss"]


class _Loss(nn.Module):
    """What every loss has: a reduction, normalisation on request, and the engine's two arguments."""

    def __init__(
        self,
        *,
        reduction: str = "mean",
        normalize: bool = False,
        backend: str | None = None,
        workspace_bytes: int = F.DEFAULT_WORKSPACE_BYTES,
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "reduction": check_reduction(reduction),
            "normalize": normalize,
            "backend": check_backend(backend) or None,
            "workspace_bytes": check_workspace(workspace_bytes),
        }

    def extra_repr(self) -> str:
        """The options, as they print."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class InfoNCELoss(_Loss):
    """InfoNCE in one direction; see :func:`contrastive_kernels.info_nce`.

    Parameters
    ----------
    reduction : {"mean", "sum", "none"}
        "none" gives the rows' losses [N].
    normalize : bool
        Divide rows by their Euclidean norm first.
    backend : str, optional
        A backend's name; by default the first that can serve.
    workspace_bytes : int
        Bound of the memory that holds panels of scores.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> loss = ck.InfoNCELoss(normalize=True)
    >>> loss(torch.randn(4, 8), torch.randn(6, 8), 20.0).shape
    torch.Size([])
    """

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        logit_scale: float | Tensor,
        positives: int | Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Anchors [N, D], candidates [M, D]."""
        return F.info_nce(x, y, logit_scale, positives=positives, weight=weight, **self.options)


class ClipLoss(_Loss):
    """CLIP's symmetric loss, called as open_clip calls its own; see :func:`contrastive_kernels.clip_loss`.

    Parameters
    ----------
    reduction : {"mean", "sum", "none"}
        "none" gives the pairs' losses [N].
    normalize : bool
        Divide rows by their Euclidean norm first.
    backend : str, optional
        A backend's name; by default the first that can serve.
    workspace_bytes : int
        Bound of the memory that holds panels of scores.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> loss = ck.ClipLoss()
    >>> out = loss(image_features=torch.eye(4), text_features=torch.eye(4), logit_scale=5.0, output_dict=True)
    >>> round(out["contrastive_loss"].item(), 5)
    0.02001
    """

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
        weight: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Matching rows [N, D]. A bias shifts all logits alike, so that it changes neither loss nor gradients.

        Raises
        ------
        NotImplementedError
            In a process group of more than one: the negatives of the other processes would be left out.
        """
        _require_one_process("ClipLoss")
        loss = F.clip_loss(image_features, text_features, logit_scale, weight=weight, **self.options)
        if isinstance(logit_bias, Tensor):
            # a gradient of zero: data parallelism wants every parameter used
            loss = loss + 0.0 * logit_bias.reshape(()).to(loss.dtype)
        return {"contrastive_loss": loss} if output_dict else loss


class NTXentLoss(_Loss):
    """NT-Xent, SimCLR's loss; see :func:`contrastive_kernels.nt_xent`.

    Parameters
    ----------
    reduction : {"mean", "sum", "none"}
        "none" gives the views' losses [2N].
    normalize : bool
        Divide rows by their Euclidean norm first.
    backend : str, optional
        A backend's name; by default the first that can serve.
    workspace_bytes : int
        Bound of the memory that holds panels of scores.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> ck.NTXentLoss(reduction="none")(torch.randn(4, 8), torch.randn(4, 8), 2.0).shape
    torch.Size([8])
    """

    def forward(self, z1: Tensor, z2: Tensor, logit_scale: float | Tensor, weight: Tensor | None = None) -> Tensor:
        """Two views of the same samples [N, D]."""
        return F.nt_xent(z1, z2, logit_scale, weight=weight, **self.options)


class SigmoidLoss(_Loss):
    """SigLIP's loss, called as open_clip calls its own; see :func:`contrastive_kernels.sigmoid`.

    Parameters
    ----------
    reduction : {"mean", "sum", "none"}
        "none" gives the row sums [N].
    normalize : bool
        Divide rows by their Euclidean norm first.
    backend : str, optional
        A backend's name; by default the first that can serve.
    workspace_bytes : int
        Bound of the memory that holds panels of scores.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> loss = ck.SigmoidLoss()
    >>> out = loss(image_features=torch.eye(4), text_features=torch.eye(4), logit_scale=10.0, logit_bias=-10.0)
    >>> round(out.item(), 5)
    0.69328
    """

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
        weight: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Matching rows [N, D].

        Raises
        ------
        NotImplementedError
            In a process group of more than one: the negatives of the other processes would be left out.
        """
        _require_one_process("SigmoidLoss")
        bias = 0.0 if logit_bias is None else logit_bias
        loss = F.sigmoid(image_features, text_features, logit_scale, bias, weight=weight, **self.options)
        return {"contrastive_loss": loss} if output_dict else loss


class DecomposableLoss(_Loss):
    """The decomposable loss from a given log-normaliser; see :func:`contrastive_kernels.decomposable`.

    Parameters
    ----------
    shape : float, optional
        None: u is its mean; a number: the shape of the gamma distribution that u is drawn from.
    positive_constant, negative_scale : float
        c and k of Z_i = c + k * sum over negatives.
    return_log_normalizer : bool
        Also return the batch's own log Z.
    reduction : {"mean", "sum", "none"}
        "none" gives the rows' losses [N].
    normalize : bool
        Divide rows by their Euclidean norm first.
    backend : str, optional
        A backend's name; by default the first that can serve.
    workspace_bytes : int
        Bound of the memory that holds panels of scores.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> loss = ck.DecomposableLoss(shape=1.0)
    >>> loss(torch.randn(4, 8), torch.randn(4, 8), 1.0, (torch.zeros(4), torch.zeros(4))).shape
    torch.Size([])
    """

    def __init__(
        self,
        *,
        shape: float | None = None,
        positive_constant: float = 1.0,
        negative_scale: float = 1.0,
        return_log_normalizer: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.options.update(
            shape=shape,
            positive_constant=positive_constant,
            negative_scale=negative_scale,
            return_log_normalizer=return_log_normalizer,
        )

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        logit_scale: float | Tensor,
        log_normalizer: Tensor | Sequence[Tensor],
        positive_logits: Tensor | Sequence[Tensor] | None = None,
        positives: int | Tensor | None = None,
        weight: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor | tuple[Tensor, Tensor | tuple[Tensor, Tensor]]:
        """Anchors [N, D], candidates [M, D], log Zbar [N] or a pair ([N], [M])."""
        return F.decomposable(
            x,
            y,
            logit_scale,
            log_normalizer,
            positive_logits=positive_logits,
            positives=positives,
            weight=weight,
            generator=generator,
            **self.options,
        )


def _require_one_process(name: str) -> None:
    """Negatives of other processes cannot be had yet, and leaving them out silently would train another loss."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise NotImplementedError(
            f"{name}: expected a single process; got a process group of {distributed.get_world_size()}: the negatives "
            "of the other processes would be left out. Gather the features with their gradients and call "
            "contrastive_kernels.info_nce with positives=rank * N, or clip_loss on the gathered features."
        )
