"""NT-Xent, the softmax loss of two views: the function and its module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from ..arguments.checks import (
    check_engine,
    check_features,
    check_flag,
    check_reduction,
    is_shared,
)
from ..arguments.margin import Margin, check_margin_of_loss, require_no_margin
from ..arguments.options import DEFAULT_WORKSPACE_BYTES
from ..arguments.pairs import check_smoothing, pairs_of_samples
from ..arguments.reduction import gains_or_weights
from ..arguments.temperature import scale_of
from ..distributed.group import ranks_of, tell
from ..distributed.losses import over_ranks
from ..distributed.rules import Softmax
from ..engine.matrix import Problem
from ..operators.softmax_loss import softmax_loss
from ..panels.pairs import EVERY_PAIR
from .biased import views_with_biases
from .ceilings import with_margin
from .composed import WeightFunction, check_corrections, weighted_views
from .gathered import gathered_loss, wants_all
from .guide import check_guide, check_guided_margin, require_no_guide, with_guide
from .keywords import NTXentKeywords
from .metrics import LossMetrics, check_metrics, with_metrics, with_metrics_over_ranks
from .module import SoftmaxLoss
from .scales import check_scales, is_by_row, require_no_corrections

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["NTXentLoss", "nt_xent"]


@overload
def nt_xent(
    z1: Tensor,
    z2: Tensor,
    logit_scale: float | Tensor | None = None,
    *,
    return_metrics: Literal[False] = False,
    **rest: Unpack[NTXentKeywords],
) -> Tensor: ...
@overload
def nt_xent(
    z1: Tensor,
    z2: Tensor,
    logit_scale: float | Tensor | None = None,
    *,
    return_metrics: Literal[True],
    **rest: Unpack[NTXentKeywords],
) -> tuple[Tensor, LossMetrics]: ...
@overload
def nt_xent(
    z1: Tensor,
    z2: Tensor,
    logit_scale: float | Tensor | None = None,
    *,
    return_metrics: bool,
    **rest: Unpack[NTXentKeywords],
) -> Tensor | tuple[Tensor, LossMetrics]: ...
def nt_xent(
    z1: Tensor,
    z2: Tensor,
    logit_scale: float | Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    ids: Tensor | None = None,
    candidate_bias: Tensor | None = None,
    margin: Margin | None = None,
    guided: Sequence[Tensor] | None = None,
    guided_margin: Margin = 0.0,
    include_positive: bool = True,
    label_smoothing: float = 0.0,
    weight_fn: WeightFunction | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    backend: str | None = None,
    workspace_bytes: int | None = DEFAULT_WORKSPACE_BYTES,
    group: Any | None = None,
    gradients: str = "average",
    strategy: str = "auto",
    uneven: bool = False,
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, LossMetrics]:
    """NT-Xent, SimCLR's loss: two views of every sample against all 2N views, each left out of its own denominator.

    Parameters
    ----------
    z1, z2 : Tensor
        Two views of the same samples [N, D] of one dtype and device.
    logit_scale : float or Tensor
        Multiplies the dot products: the inverse temperature, not its logarithm. One of [N] is every sample's own, of
        both its views; the matrix is not symmetric then, and 16-bit features are multiplied in float32.
    temperature : float or Tensor, optional
        1 / logit_scale, in its place: above 0.
    ids : Tensor, optional
        Ids (integers) of the samples [N]: the views of samples of one id are no negatives of one another.
    candidate_bias : Tensor, optional
        As in :func:`info_nce`, of the samples [N]; each serves both views. The matrix is not symmetric then: twice the
        products.
    margin : float or ("relative", float), optional
        As in :func:`info_nce`, of every view by its own positive, the sample's other view.
    guided, guided_margin
        As in :func:`info_nce`: a guide's features of both views [N, E].
    include_positive, label_smoothing
        As in :func:`info_nce`.
    weight_fn : callable, optional
        As in :func:`info_nce` (DCLW): called with ``z1`` and ``z2``, and with ``z2`` and ``z1``.
    weight : Tensor, optional
        Weights of the samples [N], not differentiated; of either sign. Each serves both views.
    reduction : {"mean", "sum", "none"}
        "none" gives [2N], the views of ``z1`` first. The mean of no views is 0.
    normalize, backend, workspace_bytes, group, gradients, strategy, uneven
        As in :func:`info_nce`.
    return_metrics : bool
        As in :func:`info_nce`, of every view; not with ``candidate_bias`` and ``weight_fn``.

    Returns
    -------
    Tensor, or (Tensor, LossMetrics)
        A scalar, or [2N]; float32 (float64 for float64 inputs).

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit, and for a named backend that cannot serve.
    NotImplementedError
        Over the ranks of a group in a grid or a ring, for biases, a margin, a guide, smoothing and weights of
        positives.

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
    if temperature is not None:
        logit_scale = scale_of(z1, logit_scale, temperature)
    shared = is_shared(group, gradients, strategy, uneven)
    ranks = ranks_of(group, gradients, strategy, uneven) if shared else None
    if return_metrics is not False:
        members: dict[str, Any] = {"candidate_bias": candidate_bias, "weight_fn": weight_fn}
        check_metrics(return_metrics, ranks, z1, **members)
    weighted = () if weight_fn is None else ("weight_fn",)
    if ranks is not None and (because := wants_all(label_smoothing, candidate_bias, margin, guided, *weighted)):
        rows = {"ids": ids, "candidate_bias": candidate_bias, "weight": weight, "guided": guided}
        given: dict[str, Any] = {"include_positive": include_positive, "label_smoothing": label_smoothing}
        given.update(
            margin=margin, guided_margin=guided_margin, weight_fn=weight_fn, reduction=reduction, normalize=normalize
        )
        given.update(backend=backend, workspace_bytes=workspace_bytes, return_metrics=return_metrics)
        sides = (z1, z2)
        return gathered_loss(ranks, nt_xent, sides, logit_scale, rows, given, because, views=True, matching=True)
    try:
        check_reduction(reduction), check_flag(include_positive, "include_positive")
        if type(label_smoothing) is not float or label_smoothing != 0.0:
            check_smoothing(label_smoothing, include_positive)
        if margin is not None:
            check_margin_of_loss(margin, label_smoothing)
        if weight_fn is not None:
            require_no_margin(margin, "weight_fn")
            if candidate_bias is not None:
                raise ValueError("weight_fn: expected None with candidate_bias; got a function")
        if type(guided_margin) is not float or guided_margin != 0.0:
            check_guided_margin(guided_margin, used=guided is not None)
        padded = candidate_bias is not None
        z1, z2 = check_features(z1, z2, ("z1", "z2"), normalize, matching=True, padded=padded)
        by_row = isinstance(logit_scale, Tensor) and is_by_row(logit_scale)
        if by_row:
            require_no_corrections(logit_scale, weight_fn=weight_fn)
        own, _, scale = check_scales(z1, z2, logit_scale, padded)
        engine, n = check_engine(backend, workspace_bytes), z1.shape[0]
        alone = by_row or candidate_bias is not None
        rank = 0 if ranks is None else ranks.rank
        pairs = EVERY_PAIR if ids is None and not alone else pairs_of_samples(ids, candidate_bias, z1, by_row, rank)
        gains = None if weight is None else gains_or_weights(weight, n, z1, reduction, ranks, repeats=2)
        guide = None
        if guided is not None:
            require_no_guide(guided, weight_fn=weight_fn, label_smoothing=label_smoothing or None)
            guide = torch.cat(check_guide(guided, z1, z2, normalize))
    except (TypeError, ValueError, NotImplementedError) as error:
        tell(ranks, error, z1)
        raise
    views = torch.cat([z1, z2])
    mirrored = ranks is None and not pairs.adds and not by_row
    index = None
    prepares = engine.backend == "triton" or not views.is_cpu  # whoever does, of the loss alone, needs no index
    if not (mirrored and prepares and margin is None and guided is None and weight_fn is None and not return_metrics):
        index = torch.arange(2 * n, dtype=torch.int64, device=views.device).roll(n)
    offset, anchors = n if mirrored else None, views
    if by_row:
        anchors, views = torch.cat([own, check_scales(z2, z1, logit_scale, padded)[0]]), views.to(own.dtype)
    problem = Problem(anchors, views, scale, offset=offset, index=index, symmetric=mirrored, pairs=pairs, engine=engine)
    if margin is not None:
        problem = with_margin(problem, margin)
    if guide is not None:
        problem = with_guide(problem, (guide, guide), guided_margin)
    if ranks is not None:
        rule = Softmax(mirrored=not by_row, include_positive=include_positive)
        about = (*rule.about, ("normalize", normalize), ("return_metrics", return_metrics), ("scales by row", by_row))
        loss = over_ranks(rule, ranks, "nt_xent", problem, gains, reduction, about, repeats=2)
        if not return_metrics:
            return loss
        over: dict[str, Any] = {"mirrored": not by_row, "repeats": 2}
        return with_metrics_over_ranks(loss, problem, gains, reduction, ranks, "nt_xent", **over)
    if weight_fn is not None:
        return weighted_views(problem, z1, z2, weight_fn, weight, reduction, include_positive)
    options: dict[str, Any] = {"include_positive": include_positive, "smoothing": label_smoothing}
    if pairs.adds or by_row:
        loss = views_with_biases(problem, weight, reduction, **options)
    else:
        loss = softmax_loss(problem, gains, reduction, **options)
    return with_metrics(loss, problem, weight, reduction, **options, repeats=2) if return_metrics else loss


class NTXentLoss(SoftmaxLoss):
    """NT-Xent, SimCLR's loss; see :func:`contrastive_kernels.nt_xent`.

    Parameters
    ----------
    reduction : {"mean", "sum", "none"}
        "none" gives the views' losses [2N].
    weight_fn
        As in :func:`contrastive_kernels.nt_xent`.
    include_positive, label_smoothing, margin, guided_margin, normalize, backend, workspace_bytes, return_metrics
        As in :func:`contrastive_kernels.info_nce`.
    group, gradients, strategy, uneven
        The same; by default all ranks of the default process group, if there is one.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> ck.NTXentLoss(reduction="none")(torch.randn(4, 8), torch.randn(4, 8), 2.0).shape
    torch.Size([8])
    """

    def __init__(self, *, weight_fn: WeightFunction | None = None, **options: Any) -> None:
        super().__init__(**options)
        check_corrections(weight_fn, None, None)
        self.options["weight_fn"] = weight_fn

    def forward(
        self,
        z1: Tensor,
        z2: Tensor,
        logit_scale: float | Tensor | None = None,
        weight: Tensor | None = None,
        ids: Tensor | None = None,
        candidate_bias: Tensor | None = None,
        guided: Sequence[Tensor] | None = None,
        temperature: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, LossMetrics]:
        """Two views of the same samples [N, D]."""
        members: dict[str, Any] = {"ids": ids, "candidate_bias": candidate_bias, "weight": weight}
        members.update(temperature=temperature, guided=guided)
        return nt_xent(z1, z2, logit_scale, **members, **self.options)
