"""InfoNCE: the function, and its module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

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
from ..arguments.margin import Margin, check_margin_of_loss
from ..arguments.options import DEFAULT_WORKSPACE_BYTES
from ..arguments.pairs import check_smoothing, pairs_of, without_padding
from ..arguments.reduction import gains_or_weights
from ..arguments.temperature import scale_of
from ..distributed.group import ranks_of, tell
from ..distributed.losses import over_ranks
from ..distributed.rules import Softmax
from ..engine.matrix import Problem
from ..operators.softmax_loss import softmax_loss
from ..panels.pairs import EVERY_PAIR
from .ceilings import with_margin
from .composed import Members, WeightFunction, check_corrections, composed
from .gathered import gathered_loss, wants_all
from .guide import check_guide, check_guided_margin, require_no_guide, with_guide
from .keywords import InfoNCEKeywords
from .metrics import LossMetrics, check_metrics, with_metrics, with_metrics_over_ranks
from .module import SoftmaxLoss
from .queue import FeatureQueue
from .scales import check_scales, is_by_row, require_no_corrections, widened

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["InfoNCELoss", "info_nce"]


@overload
def info_nce(
    x: Tensor,
    y: Tensor,
    logit_scale: float | Tensor | None = None,
    *,
    return_metrics: Literal[False] = False,
    **rest: Unpack[InfoNCEKeywords],
) -> Tensor: ...
@overload
def info_nce(
    x: Tensor,
    y: Tensor,
    logit_scale: float | Tensor | None = None,
    *,
    return_metrics: Literal[True],
    **rest: Unpack[InfoNCEKeywords],
) -> tuple[Tensor, LossMetrics]: ...
@overload
def info_nce(
    x: Tensor,
    y: Tensor,
    logit_scale: float | Tensor | None = None,
    *,
    return_metrics: bool,
    **rest: Unpack[InfoNCEKeywords],
) -> Tensor | tuple[Tensor, LossMetrics]: ...
def info_nce(
    x: Tensor,
    y: Tensor,
    logit_scale: float | Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    positives: int | Tensor | None = None,
    positive_logits: Tensor | None = None,
    positive_features: Tensor | None = None,
    queue: FeatureQueue | None = None,
    ids: Tensor | Sequence[Tensor] | None = None,
    candidate_bias: Tensor | None = None,
    margin: Margin | None = None,
    guided: Sequence[Tensor] | None = None,
    guided_margin: Margin = 0.0,
    include_positive: bool = True,
    label_smoothing: float = 0.0,
    weight_fn: WeightFunction | None = None,
    debiased: float | None = None,
    hardness_beta: float | None = None,
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
    """InfoNCE in one direction: each row of ``x`` finds its positive among the rows of ``y``.

    Parameters
    ----------
    x : Tensor
        Anchors [N, D]; float16, bfloat16, float32 or float64.
    y : Tensor
        Candidates [M, D] of the same dtype and device.
    logit_scale : float or Tensor
        Multiplies the dot products: the inverse temperature, not its logarithm. A 0-d tensor may require a gradient
        and is never read by the host. One of [N] is every row's own, and may require a gradient, too; 16-bit features
        are then multiplied in float32.
    temperature : float or Tensor, optional
        1 / logit_scale, in its place: above 0.
    positives : int or Tensor, optional
        Where row i's positive lies in ``y``: at ``i + positives`` (an int; 0 by default), or at ``positives[i]``
        (int64 [N]). Several are int64 [N, P], -1 where there are fewer: the loss is the mean over them of the
        log-sum-exp over all candidates less the positive's logit. One that is there twice counts once; a row of none is
        left out of the mean, and its loss is 0.
    positive_logits, positive_features : Tensor, optional
        The positive's logit [N], or the positive itself [N, D], of rows whose positive is no candidate: a momentum key
        beside a queue, say. Every candidate is a negative then, but for the one that ``positives`` names (an offset or
        [N], -1 for none). Differentiable; a logit of -inf has an infinite loss and no gradient, but for a row without
        negatives whose denominator has no positive or is corrected: 0.
    queue : FeatureQueue, optional
        Further negatives, without gradient: what is in the queue. With ``ids`` it has ids, too.
    ids : Tensor or pair of Tensor, optional
        Ids (integers) of the rows [N] and of the candidates [M], one tensor for both where N == M: a candidate whose id
        equals the row's is no negative of it. Labels, captions that occur twice, users, documents. The row's own
        positive counts whatever its id.
    candidate_bias : Tensor, optional
        Added to the logits of the candidates [M], the positives' too: -log q of a candidate drawn with probability q,
        say. It may require a gradient. A candidate of -inf is padding: its features are not used, not even if they are
        NaN, and a row whose own positive is padding is left out of the mean; its loss is 0.
    margin : float or ("relative", float), optional
        Candidates that score too high to be negatives are left out: those whose logit exceeds the positive's by more
        than ``margin``; with ("relative", m), whose dot product exceeds 1 + m times the positive's (at a positive
        scale). What ``candidate_bias`` adds does not count here. The positive itself always counts, and the choice has
        no gradient. At the margin itself a candidate counts, as far as rounding can tell: with a margin of 0 a copy of
        the positive lies there, and may count in one row and not in another; ``ids`` tell copies for certain.
    guided : pair of Tensor, optional
        Another model's features of the rows [N, E] and of the candidates [M, E]: a candidate that it finds more alike
        than it finds the row's positive is a false negative, and left out of the row's denominator, as in
        :func:`multiple_negatives_ranking` (GIST). Not differentiated; normalised with ``normalize``. Its scores are
        made beside those of the features: E/D of a product more in each pass. Not with smoothing, a queue, corrections,
        ``weight_fn``, several positives and positives that are no candidates.
    guided_margin : float or ("relative", float)
        Those above the guide's dot product with the positive less this are left out; ("relative", m): less m times its
        absolute value. Those at it stay, copies of the positive say: a rounding, 4 eps sqrt(E) of the lengths, is none.
    include_positive : bool
        False leaves the positive out of the denominator, too: the loss is the log-sum-exp over the negatives less the
        positive's logit (DCL), which may be negative, and 0 for a row without negatives.
    label_smoothing : float
        This share of the target lies on all of a row's candidates alike, the positive's among them, as in torch's
        cross-entropy; candidates that ids or a bias leave out have none. Needs the positive in the denominator.
    weight_fn : callable, optional
        With ``include_positive=False``, weights of the positives' logits (DCLW): called with the rows and their
        positives [N, D], it gives [N], as :func:`von_mises_fisher_weights` does.
    debiased : float, optional
        tau+, the probability that a negative is a false one: their mean exponential is corrected for it, and bounded by
        exp(-logit_scale) from below, as cosines are.
    hardness_beta : float, optional
        Negatives weigh exp(hardness_beta * logit) more in their mean exponential; it goes with ``debiased``. Twice the
        products, in float32 of 16-bit features.
    weight : Tensor, optional
        Weights of the rows [N], not differentiated; of either sign, for the loss is linear in them.
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
    strategy : {"auto", "replicated", "strips", "grid", "ring"}
        How ranks' rows meet: the grid waits less, the ring needs less memory; "auto" is the grid while gathered blocks
        take at most an eighth of the memory. Of a small batch every rank gathers all rows, which waits least, and
        computes all pairs, or (strips) those of its own rows and columns.
    uneven : bool
        Ranks may have different numbers of rows. On CUDA the host then waits for their sizes.
    return_metrics : bool
        Return (loss, :class:`LossMetrics`): in-batch accuracies, the mean positive logit and the mean logarithm of the
        denominator. A product more in every direction. Not with several positives, those that are no candidates, a
        queue and corrections.

    Returns
    -------
    Tensor, or (Tensor, LossMetrics)
        A scalar, or [N]; float32 (float64 for float64 inputs).

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit or do not go together, and for a named backend that cannot serve.
    NotImplementedError
        Over the ranks of a group in a grid or a ring, for smoothing, a bias, a margin, a guide, several positives and
        those that are no candidates, a queue and corrections, for which every rank computes all rows.

    Notes
    -----
    4 products of 2 N M D flop for value and all gradients (3 where ``y`` needs none), O((N + M) D) memory. One less for
    a mean or a sum where the workspace holds the scores of 512 rows: gradients then come with the value, and are kept.
    The positive is left out of the streamed sum and added in float32, so that a nearly solved batch keeps its digits.

    With a `group` every rank returns the value of the concatenated batch; see docs/distributed.md.

    References
    ----------
    A. van den Oord, Y. Li, O. Vinyals, "Representation learning with contrastive predictive coding", 2018. C.-H. Yeh et
    al., "Decoupled contrastive learning", ECCV 2022. C.-Y. Chuang et al., "Debiased contrastive learning", NeurIPS
    2020. J. Robinson et al., "Contrastive learning with hard negative samples", ICLR 2021.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> queries, documents = torch.eye(3), torch.eye(5)[:, :3]
    >>> round(ck.info_nce(queries, documents, 10.0).item(), 6)
    0.000182
    """
    if temperature is not None:
        logit_scale = scale_of(x, logit_scale, temperature)
    shared = is_shared(group, gradients, strategy, uneven)
    ranks = ranks_of(group, gradients, strategy, uneven) if shared else None
    given = (positive_logits, positive_features, queue, weight_fn, debiased, hardness_beta)
    if return_metrics is not False:
        told = Members(*given).told(positives)
        check_metrics(return_metrics, ranks, x, **dict.fromkeys(told[:1], True))
    if ranks is not None:
        members = Members(*given)
        if because := wants_all(label_smoothing, candidate_bias, margin, guided, *members.told(positives)):
            rows: dict[str, Any] = {"positives": positives, "ids": ids, "candidate_bias": candidate_bias}
            rows.update(guided=guided)
            rows.update(weight=weight, positive_logits=positive_logits, positive_features=positive_features)
            options: dict[str, Any] = {"include_positive": include_positive, "label_smoothing": label_smoothing}
            options.update(
                margin=margin, guided_margin=guided_margin, queue=queue, weight_fn=weight_fn, debiased=debiased
            )
            options.update(hardness_beta=hardness_beta, reduction=reduction, normalize=normalize)
            options.update(backend=backend, workspace_bytes=workspace_bytes, return_metrics=return_metrics)
            return gathered_loss(ranks, info_nce, (x, y), logit_scale, rows, options, because)
    try:
        check_reduction(reduction), check_flag(include_positive, "include_positive")
        if type(label_smoothing) is not float or label_smoothing != 0.0:
            check_smoothing(label_smoothing, include_positive)
        if margin is not None:
            check_margin_of_loss(margin, label_smoothing)
        if type(guided_margin) is not float or guided_margin != 0.0:
            check_guided_margin(guided_margin, used=guided is not None)
        x, y = check_features(x, y, ("x", "y"), normalize, padded=candidate_bias is not None)
        by_row = isinstance(logit_scale, Tensor) and logit_scale.ndim == 1 and is_by_row(logit_scale)
        if by_row:
            corrections: dict[str, Any] = {"debiased": debiased, "hardness_beta": hardness_beta}
            require_no_corrections(logit_scale, weight_fn=weight_fn, **corrections)
            given = (positive_logits, widened(positive_features, x), *given[2:])
            x, y, logit_scale = check_scales(x, y, logit_scale, candidate_bias is not None)
        scale, engine = check_scale(x, logit_scale), check_engine(backend, workspace_bytes)
        if any(v is not None for v in given) or (isinstance(positives, Tensor) and positives.dim() == 2):
            members = Members(*given)
            require_no_guide(guided, **dict.fromkeys(members.told(positives)[:1], True))
            if label_smoothing:
                raise ValueError(
                    f"label_smoothing: expected 0 with {members.told(positives)[0]}; got {label_smoothing}"
                )
            of_ids = EVERY_PAIR if ids is None else pairs_of(ids, None, x, y)
            problem = Problem(x, y, scale, pairs=of_ids, engine=engine)
            said = (candidate_bias, weight, reduction, include_positive, normalize, margin)
            return composed(problem, positives, members, *said)
        index, offset = check_positives(positives, x, y)
        pairs = EVERY_PAIR if ids is None and candidate_bias is None else pairs_of(ids, candidate_bias, x, y)
        if pairs.adds:
            x, y, weight = without_padding(x, y, pairs, offset, index, weight)
        problem = Problem(x, y, scale, offset=offset, index=index, pairs=pairs, engine=engine)
        if margin is not None:
            problem = with_margin(problem, margin)
        if guided is not None:
            require_no_guide(guided, label_smoothing=label_smoothing or None)
            problem = with_guide(problem, check_guide(guided, x, y, normalize), guided_margin)
        gains = None if weight is None else gains_or_weights(weight, x.shape[0], x, reduction, ranks)
    except (TypeError, ValueError, NotImplementedError) as error:
        tell(ranks, error, x)
        raise
    if ranks is not None:
        rule = Softmax(include_positive=include_positive)
        about = (*rule.about, ("normalize", normalize), ("return_metrics", return_metrics), ("scales by row", by_row))
        loss = over_ranks(rule, ranks, "info_nce", problem, gains, reduction, about)
        if not return_metrics:
            return loss
        return with_metrics_over_ranks(loss, problem, gains, reduction, ranks, "info_nce")
    options = {"include_positive": include_positive, "smoothing": label_smoothing}
    loss = softmax_loss(problem, gains, reduction, **options)
    return with_metrics(loss, problem, weight, reduction, **options) if return_metrics else loss


class InfoNCELoss(SoftmaxLoss):
    """InfoNCE in one direction; see :func:`contrastive_kernels.info_nce`.

    Parameters
    ----------
    weight_fn, debiased, hardness_beta
        As in :func:`contrastive_kernels.info_nce`.
    reduction : {"mean", "sum", "none"}
        "none" gives the rows' losses [N].
    include_positive, label_smoothing, margin, guided_margin, normalize, backend, workspace_bytes, return_metrics
        As in :func:`contrastive_kernels.info_nce`.
    group, gradients, strategy, uneven
        The same; by default all ranks of the default process group, if there is one.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> loss = ck.InfoNCELoss(normalize=True)
    >>> loss(torch.randn(4, 8), torch.randn(6, 8), 20.0).shape
    torch.Size([])
    """

    def __init__(
        self,
        *,
        weight_fn: WeightFunction | None = None,
        debiased: float | None = None,
        hardness_beta: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_corrections(weight_fn, debiased, hardness_beta)
        self.options.update(weight_fn=weight_fn, debiased=debiased, hardness_beta=hardness_beta)

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        logit_scale: float | Tensor | None = None,
        *,
        positives: int | Tensor | None = None,
        weight: Tensor | None = None,
        ids: Tensor | Sequence[Tensor] | None = None,
        candidate_bias: Tensor | None = None,
        positive_logits: Tensor | None = None,
        positive_features: Tensor | None = None,
        queue: FeatureQueue | None = None,
        guided: Sequence[Tensor] | None = None,
        temperature: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, LossMetrics]:
        """Anchors [N, D], candidates [M, D]."""
        members: dict[str, Any] = {"ids": ids, "candidate_bias": candidate_bias, "weight": weight, "guided": guided}
        members.update(
            temperature=temperature, positive_logits=positive_logits, positive_features=positive_features, queue=queue
        )
        return info_nce(x, y, logit_scale, positives=positives, **members, **self.options)
