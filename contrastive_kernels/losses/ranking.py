"""Multiple negatives ranking: the queries' softmax over documents, and over the pairs of other directions if asked."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..arguments.checks import (
    check_engine,
    check_features,
    check_number,
    check_reduction,
    scale_tensor,
    shown,
)
from ..arguments.options import DEFAULT_WORKSPACE_BYTES
from ..arguments.reduction import reduce_losses, row_weights
from ..arguments.temperature import scale_of
from ..distributed.group import Ranks, ranks_of, told
from ..distributed.losses import over_ranks
from ..distributed.rules import Softmax
from ..distributed.whole import row_of
from ..engine.matrix import Problem
from ..operators.second import dense_normalizer
from ..operators.softmax_loss import softmax_loss
from ..panels.pairs import EVERY_PAIR, Pairs
from ..panels.size import score_dtype
from .gathered import gathered_ranking
from .guide import Guide, check_guided_margin, hard_negatives, with_thresholds
from .module import Loss
from .ratios import negatives_of, relative_log_sum, softplus
from .softmax import info_nce

__all__ = ["MultipleNegativesRankingLoss", "gist", "multiple_negatives_ranking"]

_DIRECTIONS = ("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc")
_PARTITIONS = ("joint", "per_direction")
_HARDNESS = ("in_batch_negatives", "hard_negatives", "all_negatives")


def multiple_negatives_ranking(
    anchor: Tensor,
    positive: Tensor,
    logit_scale: float | Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    negatives: Tensor | None = None,
    directions: Sequence[str] = ("query_to_doc",),
    partition: str = "joint",
    hardness_mode: str | None = None,
    hardness_strength: float = 0.0,
    guided: Sequence[Tensor] | None = None,
    guided_margin: float | tuple[str, float] = 0.0,
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
    """Each anchor finds its positive among the documents of all anchors, hard negatives included.

    Parameters
    ----------
    anchor, positive : Tensor
        Queries and their documents [N, D] of one dtype and device.
    logit_scale : float or Tensor
        Multiplies the dot products: the inverse temperature, not its logarithm.
    temperature : float or Tensor, optional
        1 / logit_scale, in its place: above 0.
    negatives : Tensor, optional
        Hard negatives [N, K, D]: documents of row i that do not answer it, and negatives of all other rows as well.
    directions : sequence of str
        Which pairs are in the denominator beside the positive's. "query_to_doc", always there: the query with the
        documents of all rows. "doc_to_query": the positive with all queries. "query_to_query": the query with the
        queries of other rows. "doc_to_doc": the positive with the documents of other rows.
    partition : {"joint", "per_direction"}
        One softmax over the pairs of all directions, or the mean of a softmax for each, of which there are then
        "query_to_doc" and perhaps "doc_to_query".
    hardness_mode : {"in_batch_negatives", "hard_negatives", "all_negatives"}, optional
        Add ``hardness_strength`` times the dot product, not differentiated, to the logits of these documents of the
        direction "query_to_doc": those of other rows, the row's own hard negatives, or both.
    hardness_strength : float
        At least 0.
    guided : sequence of Tensor, optional
        A guide's features of the anchors and of the positives [N, E], and of the negatives [N, K, E] if there are any:
        a pair that the guide finds more alike than it finds row i's anchor and positive is a false negative, and is
        left out of the row's denominators. Not differentiated. (GIST)
    guided_margin : float or tuple
        Those above the dot product of anchor and positive less this are left out; ("relative", m): less m times its
        absolute value.
    weight : Tensor, optional
        Weights of the rows [N], not differentiated; of either sign.
    reduction : {"mean", "sum", "none"}
        A weighted mean divides by the sum of the weights. The mean of no rows is 0.
    normalize, backend, workspace_bytes
        As in :func:`info_nce`.
    group, gradients, strategy, uneven
        As in :func:`info_nce`: the queries and documents of all ranks, K negatives a row on each of them, also where
        they have different numbers of rows. With other directions, a hardness or a guide every rank computes all rows,
        and the strategy is "auto" or "replicated".

    Returns
    -------
    Tensor
        A scalar, or [N]; float32 (float64 for float64 inputs).

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit or do not go together, and for a named backend that cannot serve.
    NotImplementedError
        Over the ranks of a group in strips, a grid or a ring, for all but the plain loss of queries and documents.

    Notes
    -----
    A walk over the scores of every direction, as :func:`log_sum_exp` makes it, in O((1 + K) N D) memory; own hard
    negatives whose logits differ from those of others take O(K N D) more. With `guided` the guide's dot products are
    made in the same panels, in the dtype of the scores, and never kept: those of equal documents may differ in their
    last digits. A row is never its own negative, whatever the guide says. In a joint softmax with
    "doc_to_query" the positive's pair is there twice, and so the loss at least log 2. With a hardness there are no
    second derivatives.

    References
    ----------
    M. Henderson et al., "Efficient natural language response suggestion for smart reply", 2017. Z. Li et al., "Towards
    general text embeddings with multi-stage contrastive learning", 2023 (directions). Z. Lan et al., "LLaVE: large
    language and vision embedding models with hardness-weighted contrastive learning", 2025. A. V. Solatorio,
    "GISTEmbed: guided in-sample selection of training negatives for text embedding fine-tuning", 2024.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> queries, documents = torch.eye(3), torch.eye(3)
    >>> hard = 0.5 * torch.eye(3)[:, None]
    >>> ck.multiple_negatives_ranking(queries, documents, 5.0, negatives=hard)
    tensor(0.1035)
    """
    ranks = ranks_of(group, gradients, strategy, uneven)
    with told(ranks, anchor):
        if temperature is not None:
            logit_scale = scale_of(anchor, logit_scale, temperature)
        check_reduction(reduction)
        check_ways(directions, partition)
        check_hardness(hardness_mode, hardness_strength)
        x, y = check_features(anchor, positive, ("anchor", "positive"), normalize, matching=True)
        hard = None if negatives is None else hard_negatives(negatives, x, normalize)
        problem = Problem(x, y, scale_tensor(x, logit_scale), engine=check_engine(backend, workspace_bytes))
        hardness = float(hardness_strength) if hardness_mode is not None else 0.0
        guide = None if guided is None else Guide.of(guided, guided_margin, x, hard, normalize)
        if guide is None:
            check_guided_margin(guided_margin, used=False)
        elif hardness:
            raise ValueError(f"hardness_strength: expected 0 with guided; got {shown(hardness_strength)}")
        weight = row_weights(weight, x.shape[0], x)
    rows = Ranking(problem, hard, tuple(directions), hardness_mode if hardness else None, hardness, guide)
    engine: dict[str, Any] = {"backend": backend, "workspace_bytes": workspace_bytes}
    if rows.is_plain and (guide is None or ranks is None):
        if ranks is not None:
            return _plain_over_ranks(ranks, rows, weight, reduction, normalize)
        of_guide: dict[str, Any] = {}
        if guide is not None:
            of_guide = {"guided": (guide.anchor, guide.documents), "guided_margin": guided_margin}
        return info_nce(x, rows.documents(), logit_scale, weight=weight, reduction=reduction, **engine, **of_guide)
    if ranks is not None:
        options = {"directions": tuple(directions), "partition": partition, "hardness_mode": hardness_mode,
                   "hardness_strength": hardness, "guided_margin": guided_margin, "reduction": reduction,
                   "normalize": normalize}  # fmt: skip
        given = {"negatives": negatives, "weight": weight}
        because = "guided" if guide is not None else "a hardness_mode" if hardness else "these directions"
        pair, this = (anchor, positive), multiple_negatives_ranking
        return gathered_ranking(ranks, this, pair, problem.scale, given, guided, {**options, **engine}, because)
    return reduce_losses(rows.losses(partition), weight, reduction)


def _plain_over_ranks(ranks: Ranks, rows: Ranking, weight: Tensor | None, reduction: str, normalize: bool) -> Tensor:
    """InfoNCE of all ranks' queries and documents, of as many hard negatives a row on every rank."""
    problem, rule = replace(rows.problem, y=rows.documents(), offset=0), Softmax()
    about: list[tuple[str, Any]] = [*rule.about, ("normalize", normalize)]
    if rows.hard is not None:  # in the words of the others, which gather them
        about.append(("negatives", row_of(rows.hard)))
    return over_ranks(rule, ranks, "multiple_negatives_ranking", problem, weight, reduction, tuple(about))


def gist(
    columns: Sequence[Tensor], of_guide: Sequence[Tensor], scale: float, margin: Any, anchors: bool, positives: bool
) -> Tensor:
    """The mean of GISTEmbed's loss, as it was published: queries, positives and columns of hard negatives [N, D] each.

    `anchors`, `positives`: queries repel one another, and so do positives, but for hard negatives.
    """
    x, y, *others = columns
    hard = torch.stack(others, 1) if others else None
    guided = (*of_guide[:2], torch.stack(list(of_guide[2:]), 1)) if others else tuple(of_guide)
    directions = ["query_to_doc", *["query_to_query"] * anchors, *["doc_to_doc"] * positives]
    guide = Guide.of(guided, margin, x, hard, False)
    problem = Problem(x, y, scale_tensor(x, scale))
    return Ranking(problem, hard, directions, guide=guide, positives_alone=True).losses("joint").mean()


def check_ways(directions: Any, partition: Any) -> None:
    """Directions, and how they share a softmax."""
    if isinstance(directions, str) or not isinstance(directions, (Sequence, set, frozenset)):
        raise TypeError(f"directions: expected a sequence of {_DIRECTIONS}; got {type(directions).__name__}")
    for each in directions:
        if not isinstance(each, str) or each not in _DIRECTIONS:
            raise ValueError(f"directions: expected some of {_DIRECTIONS}; got {shown(each)}")
    if "query_to_doc" not in directions or len(set(directions)) < len(directions):
        raise ValueError(
            f"directions: expected 'query_to_doc' and perhaps others, each once; got {shown(tuple(directions))}"
        )
    if not isinstance(partition, str) or partition not in _PARTITIONS:
        raise ValueError(f"partition: expected 'joint' or 'per_direction'; got {shown(partition)}")
    if partition == "per_direction" and not {"query_to_doc", "doc_to_query"} >= set(directions):
        raise ValueError(
            "directions: expected 'query_to_doc' and perhaps 'doc_to_query' with partition='per_direction', since the "
            f"others have no positive of their own; got {shown(tuple(directions))}"
        )


def check_hardness(mode: Any, strength: Any) -> None:
    """Whose logits are raised, and by how much."""
    if mode is not None and not (isinstance(mode, str) and mode in _HARDNESS):
        raise ValueError(f"hardness_mode: expected None or one of {_HARDNESS}; got {shown(mode)}")
    strength = check_number(strength, "hardness_strength", positive=False)
    if mode is None and strength:
        raise ValueError(f"hardness_strength: expected 0 without a hardness_mode; got {shown(strength)}")


def _log_sum(z: Tensor) -> Tensor:
    """log sum_k exp(z_k) [N] of z [N, K], whose gradient's parts add up to 1 however large z is."""
    shift, rest = dense_normalizer(z)
    return shift + rest


class _FactorOfGradient(torch.autograd.Function):
    """The same features, whose gradient is multiplied by a factor; nothing beyond, which it would not be right for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        (factor,) = ctx.saved_tensors
        return (upstream * factor).to(upstream.dtype), None


@dataclass(frozen=True)
class Ranking:
    """Queries and their positives, without a word of which pairs count; hard negatives [N, K, D] beside."""

    problem: Problem
    hard: Tensor | None
    directions: Collection[str]
    hardness_mode: str | None = None
    hardness: float = 0.0
    guide: Guide | None = None
    #: "doc_to_doc" without hard negatives
    positives_alone: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether it is InfoNCE, with a guide or without."""
        return len(self.directions) == 1 and self.hardness_mode is None

    def losses(self, partition: str) -> Tensor:
        """[N]."""
        x, y = self.problem.x, self.problem.y
        ratios = [self.query_to_doc()]
        if "query_to_query" in self.directions:
            ratios.append(self.ratio(x, x, "anchor", "anchor"))
        if "doc_to_doc" in self.directions:
            if self.hard is None or self.positives_alone:
                ratios.append(self.ratio(y, y, "positive", "positive"))
            else:
                ratios.append(self.of_others(y, "positive"))
        both = "doc_to_query" in self.directions
        if both:
            ratios.append(self.ratio(y, x, "positive", "anchor"))
        if partition == "per_direction":
            return torch.stack([softplus(ratio) for ratio in ratios]).mean(0)
        total = ratios[0] if len(ratios) == 1 else _log_sum(torch.stack(ratios, 1))
        # the positive is left out of the sums, so that a nearly solved row keeps its digits; it is there once or twice
        log_times = torch.full_like(total, 2.0 if both else 1.0).log()
        return log_times + softplus(total - log_times)

    def query_to_doc(self) -> Tensor:
        """log sum_j exp(z_ij - z_pos) [N] of the queries with all documents but their own positive."""
        x, mode = self.problem.x, self.hardness_mode
        if mode == "hard_negatives" and self.hard is None:
            mode = None
        if mode is None or mode == "all_negatives" or self.hard is None:
            return self.ratio(x, self.documents(), "anchor", "documents", raised=mode is not None)
        others = self.of_others(x, "anchor", raised=mode == "in_batch_negatives")
        own = self.of_own(raised=mode == "hard_negatives")
        return _log_sum(torch.cat([others[:, None], own], 1))

    def documents(self) -> Tensor:
        """The positives, and the hard negatives of all rows [(1 + K) N, D]."""
        y = self.problem.y
        return y if self.hard is None else torch.cat([y, self.hard.reshape(-1, y.shape[1])])

    def of_others(self, x: Tensor, rows: str, raised: bool = False) -> Tensor:
        """log sum exp(z_ij - z_pos) [N] of x [N, D] with the documents of other rows, hard negatives among them."""
        assert self.hard is not None
        n, count = self.hard.shape[:2]
        own = torch.arange(n, dtype=torch.int64, device=x.device)
        pairs = Pairs.of((None, own, torch.cat([own, own.repeat_interleave(count)])))
        return self.ratio(x, self.documents(), rows, "documents", raised=raised, pairs=pairs)

    def of_own(self, raised: bool) -> Tensor:
        """z_ik - z_pos [N, K] of the queries with their own hard negatives."""
        assert self.hard is not None
        dtype = score_dtype(self.problem.x.dtype)
        x, y, hard = (v.to(dtype) for v in (self.problem.x, self.problem.y, self.hard))
        logits = self.problem.scale * (x[:, None] * (hard - y[:, None])).sum(2)
        if raised:
            logits = logits + self.hardness * (x[:, None] * hard).sum(2).detach()
        return logits

    def ratio(
        self, x: Tensor, y: Tensor, rows: str, cols: str, *, raised: bool = False, pairs: Pairs = EVERY_PAIR
    ) -> Tensor:
        """log sum_{j != i} exp(z_ij - z_pos) [N] of x [N, D] with y [M, D], whom the guide knows by these names."""
        scale = scale_tensor(x, self.problem.scale)
        problem = replace(self.problem, x=x, y=y, offset=0, pairs=pairs)
        if raised:
            if x.dtype == torch.float16:  # whose gradient may be far from the factor's
                x, y = x.float(), y.float()
            total = scale + self.hardness
            # where nothing is left of the scale, the logits are 0 to all digits, and there is a factor still
            total = total + torch.where(total == 0, torch.finfo(scale.dtype).eps ** 2 * scale, 0.0).detach()
            factor = (scale / total).detach()
            x, y = (_FactorOfGradient.apply(v, factor) for v in (x, y))
            problem = replace(problem, x=x, y=y, scale=total)
        elif rows == cols:
            problem = replace(problem, offset=None, symmetric=True)
        elif self.guide is None and pairs is EVERY_PAIR:
            found = softmax_loss(problem, None, "none", include_positive=False)
            return found.masked_fill(negatives_of(problem) == 0, -torch.inf)
        z_pos = scale * (self.problem.x.to(score_dtype(x.dtype)) * self.problem.y.to(score_dtype(x.dtype))).sum(1)
        if self.guide is not None:
            features = self.guide.named(rows), self.guide.named(cols)
            problem = with_thresholds(problem, features, self.guide.threshold)
        return relative_log_sum(problem, z_pos)


class MultipleNegativesRankingLoss(Loss):
    """Each anchor finds its positive; see :func:`contrastive_kernels.multiple_negatives_ranking`.

    Parameters
    ----------
    directions, partition, hardness_mode, hardness_strength, guided_margin
        As in :func:`contrastive_kernels.multiple_negatives_ranking`.
    reduction, normalize, backend, workspace_bytes
        As in :func:`contrastive_kernels.multiple_negatives_ranking`.
    group, gradients, strategy, uneven
        The same; by default all ranks of the default process group, if there is one.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> loss = ck.MultipleNegativesRankingLoss(directions=("query_to_doc", "query_to_query"), normalize=True)
    >>> loss(torch.randn(8, 16), torch.randn(8, 16), 20.0, negatives=torch.randn(8, 2, 16)).shape
    torch.Size([])
    """

    def __init__(
        self,
        *,
        directions: Sequence[str] = ("query_to_doc",),
        partition: str = "joint",
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
        guided_margin: float | tuple[str, float] = 0.0,
        reduction: str = "mean",
        normalize: bool = False,
        backend: str | None = None,
        workspace_bytes: int | None = DEFAULT_WORKSPACE_BYTES,
        group: Any | None = "auto",
        gradients: str = "average",
        strategy: str = "auto",
        uneven: bool = False,
    ) -> None:
        super().__init__(
            reduction=reduction, normalize=normalize, backend=backend, workspace_bytes=workspace_bytes, group=group,
            gradients=gradients, strategy=strategy, uneven=uneven,
        )  # fmt: skip
        check_ways(directions, partition)
        check_hardness(hardness_mode, hardness_strength)
        check_guided_margin(guided_margin)
        self.options |= {
            "directions": tuple(directions),
            "partition": partition,
            "hardness_mode": hardness_mode,
            "hardness_strength": hardness_strength,
            "guided_margin": guided_margin,
        }

    def forward(
        self,
        anchor: Tensor,
        positive: Tensor,
        logit_scale: float | Tensor | None = None,
        negatives: Tensor | None = None,
        guided: Sequence[Tensor] | None = None,
        weight: Tensor | None = None,
        temperature: float | Tensor | None = None,
    ) -> Tensor:
        """Queries and documents [N, D], perhaps hard negatives [N, K, D], and a guide's features of each."""
        return multiple_negatives_ranking(
            anchor,
            positive,
            logit_scale,
            temperature=temperature,
            negatives=negatives,
            guided=guided,
            weight=weight,
            **self.options,
        )
