"""The losses whose positives are those of a label: the functions and their modules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments.checks import check_engine, check_features, check_flag, check_reduction, check_scale
from ..arguments.options import DEFAULT_WORKSPACE_BYTES
from ..arguments.pairs import check_labels
from ..arguments.reduction import row_gains, row_weights
from ..arguments.temperature import scale_of
from ..distributed.group import ranks_of
from ..engine.matrix import Problem
from ..operators.label_loss import label_loss
from ..operators.multi_positive import multi_positive_loss
from ..panels.pairs import Pairs
from ..panels.panel import present
from ..panels.size import score_dtype
from .gathered import check_candidates, check_variant, gathered_labels
from .metrics import check_metrics, with_label_metrics
from .module import Loss
from .scales import check_scales

__all__ = ["MultiPositiveNCELoss", "SupConLoss", "multi_positive_nce", "sup_con"]


def sup_con(
    x: Tensor,
    labels: Tensor,
    logit_scale: float | Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    y: Tensor | None = None,
    y_labels: Tensor | None = None,
    variant: str = "outside",
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    backend: str | None = None,
    workspace_bytes: int | None = DEFAULT_WORKSPACE_BYTES,
    group: Any | None = None,
    gradients: str = "average",
    uneven: bool = False,
    return_metrics: bool = False,
) -> Tensor | Any:
    """Supervised contrastive loss: a row's positives are all others of its label.

    Parameters
    ----------
    x : Tensor
        Features [N, D]; float16, bfloat16, float32 or float64. Several views of a sample are rows of one label.
    labels : Tensor
        Their labels [N]: any integers, of which equality alone counts.
    logit_scale : float or Tensor
        Multiplies the dot products: the inverse temperature, not its logarithm. With ``y``, one of [N] is every row's
        own, as in :func:`info_nce`.
    temperature : float or Tensor, optional
        1 / logit_scale, in its place: above 0.
    y, y_labels : Tensor, optional
        Candidates [M, D] with labels [M]: rows of x are then compared with these alone, every one of equal label is a
        positive and nothing is left out. By default with all other rows of x.
    variant : {"outside", "inside"}
        Where the mean over a row's positives stands. "outside" of the logarithm: the log-sum-exp over all candidates
        less the mean of the positives' logits. "inside": the negative logarithm of the positives' mean probability.
    weight : Tensor, optional
        Weights of the rows [N], not differentiated; of either sign.
    reduction : {"mean", "sum", "none"}
        "none" gives [N]. A row without positives has loss 0, and is left out of the mean; the mean of no rows is 0.
    normalize, backend, workspace_bytes
        As in :func:`info_nce`.
    group, gradients, uneven
        As in :func:`info_nce`. Every rank computes the loss of all rows.
    return_metrics : bool
        As in :func:`info_nce`, of the mean outside of the logarithm; two products more.

    Returns
    -------
    Tensor, or (Tensor, LossMetrics)
        A scalar, or [N]; float32 (float64 for float64 inputs).

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit, and for a named backend that cannot serve.

    Notes
    -----
    As many products as :func:`info_nce` on the same rows, or half of them for one set of features, whose matrix is
    symmetric; "inside" takes twice as many. O((N + M) D) memory: labels never become a mask of pairs. A positive's
    share 1/k comes off its softmax in float32, before weights are rounded to 16 bits: in a nearly solved batch the two
    cancel.

    References
    ----------
    P. Khosla et al., "Supervised contrastive learning", NeurIPS 2020.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> features, labels = torch.eye(3)[[0, 0, 1, 2, 2]], torch.tensor([7, 7, 3, -1, -1])
    >>> ck.sup_con(features, labels, 2.0)
    tensor(0.3408)
    >>> ck.sup_con(features, labels, 2.0, reduction="none")[2]
    tensor(0.)
    """
    if temperature is not None:
        logit_scale = scale_of(x, logit_scale, temperature)
    ranks = ranks_of(group, gradients, "auto", uneven)
    if return_metrics is not False:
        check_metrics(return_metrics, ranks, x, **({"variant='inside'": True} if variant == "inside" else {}))
    if ranks is not None:
        options: dict[str, Any] = {"variant": variant, "reduction": reduction, "normalize": normalize}
        options.update(backend=backend)
        options.update(workspace_bytes=workspace_bytes, return_metrics=return_metrics)
        given = {"y": y, "labels": labels, "y_labels": y_labels, "weight": weight}
        return gathered_labels(ranks, sup_con, x, logit_scale, given, options)
    check_variant(variant)
    problem, positives = _problem(x, labels, logit_scale, y, y_labels, normalize, backend, workspace_bytes)
    count = positives.counts
    there = (count > 0).to(score_dtype(problem.x.dtype))
    if weight is None:  # (overhead dominates small batches)
        check_reduction(reduction)
        weights, gain = there, there / there.sum().clamp(min=1) if reduction == "mean" else there
    else:
        weights = _weights(weight, problem, reduction).masked_fill(count == 0, 0.0)
        gain = present(row_gains(weights, count.shape[0], problem.x, reduction))
    share = there / count.clamp(min=1)
    if variant == "outside":
        problem = replace(problem, index=positives.only(problem.symmetric))
    loss = label_loss(problem, gain, share, "none" if reduction == "none" else "sum", inside=variant == "inside")
    if not return_metrics:
        return loss
    shares = present(row_gains(weights, count.shape[0], problem.x, "mean"))
    total = weights.sum()
    mean = loss if reduction == "mean" else loss.sum() / total.masked_fill(total == 0, 1.0)
    return with_label_metrics(loss, problem, shares, mean, share)


def multi_positive_nce(
    x: Tensor,
    labels: Tensor,
    logit_scale: float | Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    y: Tensor | None = None,
    y_labels: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    backend: str | None = None,
    workspace_bytes: int | None = DEFAULT_WORKSPACE_BYTES,
    group: Any | None = None,
    gradients: str = "average",
    uneven: bool = False,
) -> Tensor:
    """Each positive by itself: InfoNCE of every pair of one label, against the candidates of other labels alone.

    Parameters
    ----------
    x, labels, logit_scale, temperature, y, y_labels
        As in :func:`sup_con`.
    weight : Tensor, optional
        Weights of the rows [N], not differentiated, of either sign; each serves all pairs of its row.
    reduction : {"mean", "sum", "none"}
        The mean runs over pairs of a row and one of its positives, and is 0 where there are none. "none" gives the sums
        over each row's pairs [N], "sum" their sum.
    normalize, backend, workspace_bytes
        As in :func:`info_nce`.
    group, gradients, uneven
        As in :func:`sup_con`.

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
    With N(i) the candidates of other labels, the loss of a pair is softplus(logsumexp_{j in N(i)} z_ij - z_ip).
    4 products of 2 N M D flop for value and all gradients (half for one set of features), and those of the pairs of
    equal labels once more, in float32; O((N + M) D) memory. On a GPU the host waits for the sorted labels.

    References
    ----------
    K. Musgrave, S. Belongie, S.-N. Lim, "PyTorch metric learning", 2020: its NTXentLoss.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> features, labels = torch.eye(3)[[0, 0, 1, 2, 2]], torch.tensor([7, 7, 3, -1, -1])
    >>> ck.multi_positive_nce(features, labels, 2.0)
    tensor(0.3408)
    """
    if temperature is not None:
        logit_scale = scale_of(x, logit_scale, temperature)
    ranks = ranks_of(group, gradients, "auto", uneven)
    if ranks is not None:
        options = {"reduction": reduction, "normalize": normalize, "backend": backend}
        options["workspace_bytes"] = workspace_bytes
        given = {"y": y, "labels": labels, "y_labels": y_labels, "weight": weight}
        return gathered_labels(ranks, multi_positive_nce, x, logit_scale, given, options)
    problem, positives = _problem(x, labels, logit_scale, y, y_labels, normalize, backend, workspace_bytes)
    count, weights = positives.counts, _weights(weight, problem, reduction)
    if reduction == "mean":  # a row's share of all pairs, over its own
        wide = torch.float32 if weights.device.type == "mps" else torch.float64
        weights = weights.to(wide) * count
    gain = present(row_gains(weights, count.shape[0], problem.x, reduction))
    if reduction == "mean":
        gain = gain / count.clamp(min=1)
    return multi_positive_loss(problem, gain, "none" if reduction == "none" else "sum")


def _problem(
    x: Any, labels: Any, logit_scale: Any, y: Any, y_labels: Any, normalize: Any, backend: Any, workspace_bytes: Any
) -> tuple[Problem, _Positives]:  # fmt: skip
    """The checked problem, and its positives."""
    alone = check_candidates(y, y_labels)
    x, y = check_features(x, x if alone else y, ("x", "x" if alone else "y"), normalize)
    if alone:  # (what is normalised is a tensor each)
        y = x
    rows = check_labels(labels, "labels", x)
    cols = rows if alone else check_labels(y_labels, "y_labels", y)
    engine = check_engine(backend, workspace_bytes)
    if alone:
        scale = check_scale(x, logit_scale)
    else:
        x, y, scale = check_scales(x, y, logit_scale)
    pairs = Pairs.of((None, rows, cols))
    return Problem(x, y, scale, symmetric=alone, pairs=pairs, engine=engine), _Positives.of(rows, cols, alone)


class _Positives(NamedTuple):
    """How many positives every row has [N], and where: the first of its class among the sorted columns."""

    counts: Tensor
    place: Tensor
    order: Tensor

    @classmethod
    def of(cls, rows: Tensor, cols: Tensor, alone: bool) -> _Positives:
        """Of these labels; `alone`: the rows are the columns, and none is its own positive."""
        ids, order = torch.sort(cols)
        place = torch.searchsorted(ids, rows)
        count = torch.searchsorted(ids, rows, right=True) - place
        return cls(count - 1 if alone else count, place, order)

    def only(self, alone: bool) -> Tensor:
        """The columns of the positives [N] of rows that have one, -1 of others."""
        columns, found = self.order.shape[0], self.place
        if alone:  # of a class of two, the other one
            first, second = (self.order[(found + k).clamp(max=max(columns - 1, 0))] for k in (0, 1))
            own = torch.arange(columns, dtype=torch.int64, device=found.device)
            found = torch.where(first == own, second, first)
        elif columns:
            found = self.order[found.clamp(max=columns - 1)]
        return torch.where(self.counts == 1, found, -1)


def _weights(weight: Any, problem: Problem, reduction: Any) -> Tensor:
    """The rows' weights [N], by default 1."""
    check_reduction(reduction)
    x = problem.x
    weights = row_weights(weight, x.shape[0], x)
    return torch.ones(x.shape[0], dtype=score_dtype(x.dtype), device=x.device) if weights is None else weights


class _LabelLoss(Loss):
    """What the losses by labels share: they are called with features and labels, and perhaps with candidates."""

    def __init__(
        self,
        *,
        reduction: str = "mean",
        normalize: bool = False,
        backend: str | None = None,
        workspace_bytes: int | None = DEFAULT_WORKSPACE_BYTES,
        group: Any | None = "auto",
        gradients: str = "average",
        uneven: bool = False,
    ) -> None:
        super().__init__(
            reduction=reduction, normalize=normalize, backend=backend, workspace_bytes=workspace_bytes, group=group,
            gradients=gradients, uneven=uneven,
        )  # fmt: skip
        del self.options["strategy"]


class MultiPositiveNCELoss(_LabelLoss):
    """Each positive by itself; see :func:`contrastive_kernels.multi_positive_nce`.

    Parameters
    ----------
    reduction, normalize, backend, workspace_bytes
        As in :func:`contrastive_kernels.multi_positive_nce`.
    group, gradients, uneven
        The same; by default all ranks of the default process group, if there is one.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> loss = ck.MultiPositiveNCELoss(normalize=True)
    >>> loss(torch.randn(8, 16), torch.arange(8) % 3, 10.0).shape
    torch.Size([])
    """

    def forward(
        self,
        x: Tensor,
        labels: Tensor,
        logit_scale: float | Tensor | None = None,
        y: Tensor | None = None,
        y_labels: Tensor | None = None,
        weight: Tensor | None = None,
        temperature: float | Tensor | None = None,
    ) -> Tensor:
        """Features [N, D] with labels [N], and perhaps candidates [M, D] with labels [M]."""
        return multi_positive_nce(
            x, labels, logit_scale, temperature=temperature, y=y, y_labels=y_labels, weight=weight, **self.options
        )


class SupConLoss(_LabelLoss):
    """Supervised contrastive loss; see :func:`contrastive_kernels.sup_con`.

    Parameters
    ----------
    variant : {"outside", "inside"}
        Where the mean over a row's positives stands.
    reduction, normalize, backend, workspace_bytes, return_metrics
        As in :func:`contrastive_kernels.sup_con`.
    group, gradients, uneven
        The same; by default all ranks of the default process group, if there is one.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> loss = ck.SupConLoss(normalize=True)
    >>> loss(torch.randn(8, 16), torch.arange(8) % 3, 10.0).shape
    torch.Size([])
    """

    def __init__(self, *, variant: str = "outside", return_metrics: bool = False, **options: Any) -> None:
        super().__init__(**options)
        check_variant(variant)
        self.options.update(variant=variant, return_metrics=check_flag(return_metrics, "return_metrics"))

    def forward(
        self,
        x: Tensor,
        labels: Tensor,
        logit_scale: float | Tensor | None = None,
        y: Tensor | None = None,
        y_labels: Tensor | None = None,
        weight: Tensor | None = None,
        temperature: float | Tensor | None = None,
    ) -> Tensor | Any:
        """Features [N, D] with labels [N], and perhaps candidates [M, D] with labels [M]."""
        return sup_con(
            x, labels, logit_scale, temperature=temperature, y=y, y_labels=y_labels, weight=weight, **self.options
        )
