"""The softmax losses: each function, and its module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments.checks import (
    check_engine,
    check_features,
    check_flag,
    check_positives,
    check_reduction,
    check_scale,
    is_shared,
)
from ..arguments.options import DEFAULT_WORKSPACE_BYTES
from ..arguments.reduction import gains_or_weights
from ..distributed.group import ranks_of, tell
from ..distributed.losses import over_ranks
from ..distributed.rules import Softmax
from ..engine.matrix import Problem
from ..operators.softmax_loss import softmax_loss
from .module import PAIR_NAMES, Loss

__all__ = ["ClipLoss", "InfoNCELoss", "NTXentLoss", "clip_loss", "info_nce", "nt_xent"]


def info_nce(
    x: Tensor,
    y: Tensor,
    logit_scale: float | Tensor,
    *,
    positives: int | Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    backend: str | None = None,
    workspace_bytes: int | None = DEFAULT_WORKSPACE_BYTES,
    group: Any | None = None,
    gradients: str = "average",
    strategy: str = "auto",
    uneven: bool = False,
) -> Tensor:
    """InfoNCE in one direction: each row of ``x`` finds its positive among the rows of ``y``.

    Parameters
    ----------
    x : Tensor
        Anchors [N, D]; float16, bfloat16, float32 or float64.
    y : Tensor
        Candidates [M, D] of the same dtype and device.
    logit_scale : float or Tensor
        Multiplies the dot products: the inverse temperature, not its logarithm. A 0-d tensor may require a gradient
        and is never read by the host.
    positives : int or Tensor, optional
        Where row i's positive lies in ``y``: at ``i + positives`` (an int; 0 by default), or at ``positives[i]``
        (int64 [N]).
    weight : Tensor, optional
        Weights of the rows [N], not differentiated.
    reduction : {"mean", "sum", "none"}
        A weighted mean divides by the sum of the weights. The mean of no rows is 0.
    normalize : bool
        Divide rows by their Euclidean norm first; otherwise inputs are used as they come.
    backend : str, optional
        A backend's name; by default the first that can serve.
    workspace_bytes : int, optional
        Bound of the memory that holds panels of scores; by default 64 MiB, and on a GPU 512 MiB or 1/64 of its memory,
        whichever is less.
    group : ProcessGroup, DeviceMesh or "world", optional
        The ranks whose rows make up the batch; None: this process's rows alone. "world" is the default group, "auto"
        the same if it has more than one rank, False the same as None. A mesh of two dimensions is the grid.
    gradients : {"average", "sum"}
        What ranks hold of the gradients. "average": times the number of ranks, for whoever averages parameters'
        gradients over ranks, as DistributedDataParallel and FSDP do. "sum": every rank its share.
    strategy : {"auto", "grid", "ring"}
        How ranks' rows meet: the grid waits less, the ring needs less memory; "auto" is the grid while gathered blocks
        take at most an eighth of the memory.
    uneven : bool
        Ranks may have different numbers of rows. On CUDA the host then waits for their sizes.

    Returns
    -------
    Tensor
        A scalar, or [N]; float32 (float64 for float64 inputs).

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit, and for a named backend that cannot serve.

    Notes
    -----
    4 products of 2 N M D flop for value and all gradients (3 where ``y`` needs none), O((N + M) D) memory. One less for
    a mean or a sum where the workspace holds the scores of 512 rows: gradients then come with the value, and are kept.
    The positive is left out of the streamed sum and added in float32, so that a nearly solved batch keeps its digits.

    With a `group` every rank returns the value of the concatenated batch; see docs/distributed.md.

    References
    ----------
    A. van den Oord, Y. Li, O. Vinyals, "Representation learning with contrastive predictive coding", 2018.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> queries, documents = torch.eye(3), torch.eye(5)[:, :3]
    >>> round(ck.info_nce(queries, documents, 10.0).item(), 6)
    0.000182
    """
    shared = is_shared(group, gradients, strategy, uneven)
    ranks = ranks_of(group, gradients, strategy, uneven) if shared else None
    try:
        check_reduction(reduction)
        x, y = check_features(x, y, ("x", "y"), normalize)
        index, offset = check_positives(positives, x, y)
        scale, engine = check_scale(x, logit_scale), check_engine(backend, workspace_bytes)
        problem = Problem(x, y, scale, offset=offset, index=index, engine=engine)
        gains = None if weight is None else gains_or_weights(weight, x.shape[0], x, reduction, ranks)
    except (TypeError, ValueError) as error:
        tell(ranks, error, x)
        raise
    if ranks is not None:
        return over_ranks(Softmax(), ranks, "info_nce", problem, gains, reduction)
    return softmax_loss(problem, gains, reduction)


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    backend: str | None = None,
    workspace_bytes: int | None = DEFAULT_WORKSPACE_BYTES,
    group: Any | None = None,
    gradients: str = "average",
    strategy: str = "auto",
    uneven: bool = False,
) -> Tensor:
    """CLIP's symmetric loss: the mean of InfoNCE from images to texts and from texts to images.

    Parameters
    ----------
    image_features, text_features : Tensor
        Matching rows [N, D] of one dtype and device.
    logit_scale : float or Tensor
        Multiplies the dot products: the inverse temperature, not its logarithm.
    weight : Tensor, optional
        Weights of the pairs [N], not differentiated.
    reduction : {"mean", "sum", "none"}
        "none" gives every pair's mean of both directions. The mean of no pairs is 0.
    normalize, backend, workspace_bytes, group, gradients, strategy, uneven
        As in :func:`info_nce`.

    Returns
    -------
    Tensor
        A scalar, or [N]; float32 (float64 for float64 inputs).

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit, and for a named backend that cannot serve.

    Notes
    -----
    One pass gives the normalisers of rows and columns, a second one the gradients: 4 products, O(N D) memory. Where all
    scores fit a quarter of the workspace they are made once for a mean or a sum: 3 products.

    With a `group` every rank returns the value of the concatenated batch; see docs/distributed.md.

    References
    ----------
    A. Radford et al., "Learning transferable visual models from natural language supervision", ICML 2021.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> features = torch.eye(4, requires_grad=True)
    >>> loss = ck.clip_loss(features, torch.eye(4), 5.0)
    >>> loss.backward()
    >>> round(loss.item(), 5), tuple(features.grad.shape)
    (0.02001, (4, 4))
    """
    shared = is_shared(group, gradients, strategy, uneven)
    ranks = ranks_of(group, gradients, strategy, uneven) if shared else None
    try:
        check_reduction(reduction)
        x, y = check_features(image_features, text_features, PAIR_NAMES, normalize, matching=True)
        scale, engine = check_scale(x, logit_scale), check_engine(backend, workspace_bytes)
        problem = Problem(x, y, scale, offset=0, engine=engine)
        gains = None if weight is None else gains_or_weights(weight, x.shape[0], x, reduction, ranks)
    except (TypeError, ValueError) as error:
        tell(ranks, error, image_features)
        raise
    if ranks is not None:
        return over_ranks(Softmax(both_ways=True), ranks, "clip_loss", problem, gains, reduction)
    return softmax_loss(problem, gains, reduction, both=True)


def nt_xent(
    z1: Tensor,
    z2: Tensor,
    logit_scale: float | Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    backend: str | None = None,
    workspace_bytes: int | None = DEFAULT_WORKSPACE_BYTES,
    group: Any | None = None,
    gradients: str = "average",
    strategy: str = "auto",
    uneven: bool = False,
) -> Tensor:
    """NT-Xent, SimCLR's loss: two views of every sample against all 2N views, each left out of its own denominator.

    Parameters
    ----------
    z1, z2 : Tensor
        Two views of the same samples [N, D] of one dtype and device.
    logit_scale : float or Tensor
        Multiplies the dot products: the inverse temperature, not its logarithm.
    weight : Tensor, optional
        Weights of the samples [N], not differentiated; each serves both views.
    reduction : {"mean", "sum", "none"}
        "none" gives [2N], the views of ``z1`` first. The mean of no views is 0.
    normalize, backend, workspace_bytes, group, gradients, strategy, uneven
        As in :func:`info_nce`.

    Returns
    -------
    Tensor
        A scalar, or [2N]; float32 (float64 for float64 inputs).

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit, and for a named backend that cannot serve.

    Notes
    -----
    The matrix of all views is symmetric, so a panel above the diagonal serves its mirror image too: half of the
    products of InfoNCE on the same 2N rows. Where all scores fit a quarter of the workspace they are made once for a
    mean or a sum.

    With a `group` every rank returns the value of the concatenated batch; see docs/distributed.md.

    References
    ----------
    T. Chen, S. Kornblith, M. Norouzi, G. Hinton, "A simple framework for contrastive learning of visual
    representations", ICML 2020.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> round(ck.nt_xent(torch.eye(3), torch.eye(3), 2.0).item(), 3)
    0.433
    """
    shared = is_shared(group, gradients, strategy, uneven)
    ranks = ranks_of(group, gradients, strategy, uneven) if shared else None
    try:
        check_reduction(reduction)
        z1, z2 = check_features(z1, z2, ("z1", "z2"), normalize, matching=True)
        scale, engine = check_scale(z1, logit_scale), check_engine(backend, workspace_bytes)
        n = z1.shape[0]
        gains = None if weight is None else gains_or_weights(weight, n, z1, reduction, ranks, repeats=2)
    except (TypeError, ValueError) as error:
        tell(ranks, error, z1)
        raise
    views = torch.cat([z1, z2])
    index = torch.arange(2 * n, dtype=torch.int64, device=views.device).roll(n)
    if ranks is not None:
        problem = Problem(views, views, scale, index=index, engine=engine)
        return over_ranks(Softmax(mirrored=True), ranks, "nt_xent", problem, gains, reduction, repeats=2)
    problem = Problem(views, views, scale, offset=n, index=index, symmetric=True, engine=engine)
    return softmax_loss(problem, gains, reduction)


class InfoNCELoss(Loss):
    """InfoNCE in one direction; see :func:`contrastive_kernels.info_nce`.

    Parameters
    ----------
    reduction : {"mean", "sum", "none"}
        "none" gives the rows' losses [N].
    normalize : bool
        Divide rows by their Euclidean norm first.
    backend : str, optional
        A backend's name; by default the first that can serve.
    workspace_bytes : int, optional
        Bound of the memory that holds panels of scores.
    group, gradients, strategy, uneven
        As in :func:`contrastive_kernels.info_nce`; by default all ranks of the default process group, if there is one.

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
        return info_nce(x, y, logit_scale, positives=positives, weight=weight, **self.options)


class ClipLoss(Loss):
    """CLIP's symmetric loss, called as open_clip calls its own; see :func:`contrastive_kernels.clip_loss`.

    Parameters
    ----------
    reduction : {"mean", "sum", "none"}
        "none" gives the pairs' losses [N].
    normalize : bool
        Divide rows by their Euclidean norm first.
    backend : str, optional
        A backend's name; by default the first that can serve.
    workspace_bytes : int, optional
        Bound of the memory that holds panels of scores.
    group, gradients, strategy, uneven
        As in :func:`contrastive_kernels.info_nce`; by default all ranks of the default process group, if there is one.

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
        """Matching rows [N, D]. A bias shifts all logits alike, so that it changes neither loss nor gradients."""
        check_flag(output_dict, "output_dict")
        loss = clip_loss(image_features, text_features, logit_scale, weight=weight, **self.options)
        if logit_bias is not None:
            bias = check_scale(image_features, logit_bias, "logit_bias")
            if isinstance(bias, Tensor):  # a gradient of zero: data parallelism wants every parameter used
                loss = loss + 0.0 * bias.reshape(()).to(loss.dtype)
        return {"contrastive_loss": loss} if output_dict else loss


class NTXentLoss(Loss):
    """NT-Xent, SimCLR's loss; see :func:`contrastive_kernels.nt_xent`.

    Parameters
    ----------
    reduction : {"mean", "sum", "none"}
        "none" gives the views' losses [2N].
    normalize : bool
        Divide rows by their Euclidean norm first.
    backend : str, optional
        A backend's name; by default the first that can serve.
    workspace_bytes : int, optional
        Bound of the memory that holds panels of scores.
    group, gradients, strategy, uneven
        As in :func:`contrastive_kernels.info_nce`; by default all ranks of the default process group, if there is one.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> ck.NTXentLoss(reduction="none")(torch.randn(4, 8), torch.randn(4, 8), 2.0).shape
    torch.Size([8])
    """

    def forward(self, z1: Tensor, z2: Tensor, logit_scale: float | Tensor, weight: Tensor | None = None) -> Tensor:
        """Two views of the same samples [N, D]."""
        return nt_xent(z1, z2, logit_scale, weight=weight, **self.options)
