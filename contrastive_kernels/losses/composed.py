"""InfoNCE composed of the stream's log-sums: several positives, positives that are no column, a queue, corrections."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..arguments.checks import (
    check_features,
    check_number,
    check_positives,
    check_several_positives,
    check_vector,
    is_number,
    normalized,
    require_vector,
    scale_tensor,
    shown,
)
from ..arguments.margin import Margin, require_no_margin, upper_bounds
from ..arguments.pairs import with_biases, without_padding
from ..arguments.reduction import reduce_losses, row_gains, row_weights
from ..engine.matrix import Problem
from ..operators.softmax_loss import softmax_loss
from ..panels.pairs import Pairs
from ..panels.size import score_dtype
from .ceilings import with_ceilings
from .queue import FeatureQueue, check_queue
from .ratios import debiased_mean, joined, negatives_of, pair_dots, relative_log_sum, softplus, without_infinity

__all__ = ["Members", "WeightFunction", "check_corrections", "composed", "von_mises_fisher_weights", "weighted_views"]

#: Of rows x [N, D] and their positives [N, D]: weights [N].
WeightFunction = Callable[[Tensor, Tensor], Tensor]


#: Members that go with a margin.
_WITH_MARGIN = ("positive_logits", "positive_features", "queue")


@dataclass(frozen=True)
class Members:
    """What a softmax loss of rows may be told beyond one positive per row among the columns."""

    positive_logits: Any = None
    positive_features: Any = None
    queue: Any = None
    weight_fn: Any = None
    debiased: Any = None
    hardness_beta: Any = None

    def told(self, positives: Any) -> list[str]:
        """The names of those that are there."""
        several = ["positives of shape [N, P]"] if isinstance(positives, Tensor) and positives.dim() == 2 else []
        return [name for name, value in vars(self).items() if value is not None] + several

    def checked(
        self, x: Tensor, include_positive: bool, several: bool = False, biased: bool = False, with_ids: bool = False
    ) -> Members:
        """The same, checked, and that they go together."""
        logits, features = self.positive_logits, self.positive_features
        if logits is not None and features is not None:
            raise ValueError("positive_features: expected None where positive_logits is given; got both")
        if logits is not None:
            logits = check_vector(logits, "positive_logits", x.shape[0], x, differentiable=True)
        corrections = [name for name in ("weight_fn", "debiased", "hardness_beta") if getattr(self, name) is not None]
        if several:
            others = {"positive_logits": logits, "positive_features": features}
            for name in (*corrections, *(name for name, value in others.items() if value is not None)):
                raise ValueError(f"{name}: expected None with positives of shape [N, P]; got a value")
            if not include_positive:
                raise ValueError("include_positive: expected True with positives of shape [N, P]; got False")
        check_corrections(self.weight_fn, self.debiased, self.hardness_beta)
        if self.weight_fn is not None:
            if include_positive:
                raise ValueError("weight_fn: expected None with include_positive=True (DCLW has no positive there)")
            if len(corrections) > 1:
                raise ValueError(f"weight_fn: expected None with {corrections[1]}; got a function")
            if logits is not None:
                raise ValueError("weight_fn: expected None with positive_logits, for it wants features; got a function")
        if biased and (self.debiased is not None or self.hardness_beta is not None):
            raise ValueError(f"candidate_bias: expected None with {corrections[0]}; got a tensor")
        if biased and self.queue is not None:
            raise ValueError("candidate_bias: expected None with queue, whose features have none; got a tensor")
        queue = None if self.queue is None else check_queue(self.queue, x, with_ids)
        return Members(logits, features, queue, self.weight_fn, self.debiased, self.hardness_beta)


def check_corrections(weight_fn: Any, debiased: Any, hardness_beta: Any) -> None:
    """What may be said of a loss before it is called."""
    if weight_fn is not None and not callable(weight_fn):
        raise TypeError(f"weight_fn: expected a callable; got {type(weight_fn).__name__}")
    if debiased is not None and not (is_number(debiased) and 0 <= debiased < 1):
        kind = ValueError if is_number(debiased) else TypeError
        raise kind(f"debiased: expected None or tau+, a number in [0, 1); got {shown(debiased)}")
    if hardness_beta is not None:
        check_number(hardness_beta, "hardness_beta", positive=False)


def composed(
    problem: Problem,
    positives: Any,
    members: Members,
    candidate_bias: Any,
    weight: Any,
    reduction: str,
    include_positive: bool,
    normalize: bool,
    margin: Margin | None = None,
) -> Tensor:
    """InfoNCE of the rows, or their mean or sum; the problem without positives and biases, its features normalised."""
    if members.hardness_beta is not None:
        # two log-sums' gradients nearly cancel: they must not be rounded to 16 bits before they are added
        x, y = (v.to(score_dtype(v.dtype)) for v in (problem.x, problem.y))
        problem = replace(problem, x=x, y=y)
        features = members.positive_features
        if isinstance(features, Tensor) and features.dtype in (torch.float16, torch.bfloat16):
            members = replace(members, positive_features=features.to(torch.float32))
    x, y, scale = problem.x, problem.y, scale_tensor(problem.x, problem.scale)
    several = isinstance(positives, Tensor) and positives.dim() == 2
    with_ids = problem.pairs.tensors[1] is not None
    members = members.checked(x, include_positive, several, candidate_bias is not None, with_ids)
    if margin is not None:
        for name in members.told(positives):
            if name not in _WITH_MARGIN:
                require_no_margin(margin, name)
    weights = row_weights(weight, x.shape[0], x)
    infinite = None
    if members.positive_logits is not None:
        infinite = members.positive_logits.detach() == -torch.inf
        members = replace(members, positive_logits=without_infinity(members.positive_logits))
    if several:
        problem = replace(problem, index=_distinct(positives, x, y))
    elif positives is not None or (members.positive_logits is None and members.positive_features is None):
        missing = members.positive_logits is not None or members.positive_features is not None
        index, offset = check_positives(positives, x, y, allow_missing=missing)
        problem = replace(problem, index=index, offset=offset)
    partners = None
    if members.positive_features is not None:
        _, partners = check_features(x, members.positive_features, ("x", "positive_features"), False, matching=True)
        partners = normalized(partners) if normalize else partners
    if candidate_bias is not None:
        problem = replace(problem, pairs=with_biases(problem.pairs, candidate_bias, x, y))
        outside = partners is not None or members.positive_logits is not None
        problem, weights = _unpadded(problem, weights, missing=outside)
    if several:
        there = problem.index[:, 0] >= 0  # type: ignore[index]
        ones = torch.ones(x.shape[0], dtype=score_dtype(x.dtype), device=x.device)
        weights = (ones if weights is None else weights).masked_fill(~there, 0.0)
    rows = _Rows(problem, scale, members, partners, normalize, infinite)
    if margin is not None:
        rows.problem = with_ceilings(problem, upper_bounds(rows.z_pos().detach(), margin), None)
    if several and weights is not None:
        return rows.of_several(weights, reduction)
    return reduce_losses(rows.losses(include_positive), weights, reduction)


class _Rows:
    """The losses of rows, and what they are made of."""

    def __init__(
        self,
        problem: Problem,
        scale: Tensor,
        members: Members,
        partners: Tensor | None,
        normalize: bool,
        infinite: Tensor | None,
    ) -> None:
        self.problem, self.scale, self.members, self.partners = problem, scale, members, partners
        self.normalize = normalize
        #: the rows whose positive's logit is -inf [N]
        self.infinite = infinite

    def losses(self, include_positive: bool) -> Tensor:
        """[N]."""
        members = self.members
        corrected = members.debiased is not None or members.hardness_beta is not None
        outside = self.partners is not None or members.positive_logits is not None
        if include_positive and not corrected and not outside:  # (with a queue)
            own = softmax_loss(self.problem, None, "none")
            return joined(own, self.of_queue(self.problem, self.z_pos()))
        if corrected:
            return self.corrected(include_positive)
        ratio = self.log_ratio(1.0)
        if include_positive:
            return self.with_infinity(softplus(ratio))
        losses = ratio
        if members.weight_fn is not None:
            losses = ratio + (1 - self.weights()) * self.z_pos()
        return self.with_infinity(losses).masked_fill(ratio == -torch.inf, 0.0)

    def with_infinity(self, losses: Tensor) -> Tensor:
        """Losses [N], infinite where the positive has no logit; a row without negatives has none of that."""
        if self.infinite is None:
            return losses
        return losses + torch.zeros_like(losses).masked_fill(self.infinite, torch.inf)

    def of_several(self, weights: Tensor, reduction: str) -> Tensor:
        """The mean over positives of log sum_j exp(z_ij) - z_ip [N], or the mean or sum of rows with weights [N].

        In the denominator a row's positives are its first one, lifted: of the rest, the sum of their exponentials.
        """
        problem = self.problem
        index = problem.index
        assert index is not None
        there, first = index >= 0, index[:, 0].clamp(min=0)
        # a row without positives does not count; its first column stands for one
        problem = replace(problem, index=torch.cat([first[:, None], index[:, 1:]], 1))
        zero = torch.zeros(weights.shape[0], dtype=score_dtype(problem.x.dtype), device=weights.device)
        lift, mean = None, zero
        if index.shape[1] > 1:
            others = index[:, 1:].clamp(min=0)
            relative = self.scale * pair_dots(problem.x, problem.y, others, first)
            if problem.pairs.adds:
                relative = relative + self.added(others) - self.added(first)[:, None]
            mean = relative.masked_fill(~there[:, 1:], 0.0).sum(1) / there.sum(1).clamp(min=1)
            there = there[:, 1:]
            lift = torch.logsumexp(torch.cat([zero[:, None], relative.masked_fill(~there, -torch.inf)], 1), 1)
            mean = mean - lift
        if self.members.queue is None:
            gains = row_gains(weights, weights.shape[0], problem.x, reduction)
            return softmax_loss(problem, gains, reduction, lift=lift) - reduce_losses(mean, weights, reduction)
        total = softmax_loss(problem, None, "none", lift=lift)
        of_queue = self.of_queue(problem, self.z_pos())
        total = joined(total, of_queue if lift is None else of_queue - lift)
        return reduce_losses(total - mean, weights, reduction)

    def added(self, columns: Tensor) -> Tensor:
        """What the logits of columns get added."""
        zeros = torch.zeros(columns.shape, dtype=score_dtype(self.problem.x.dtype), device=columns.device)
        return self.problem.pairs.add_to_positives(zeros, columns)

    def log_ratio(self, factor: float) -> Tensor:
        """log sum_j exp(factor (z_ij - z_pos)) [N] over the negatives, those in the queue too; -inf where none is."""
        problem = self.problem
        if factor != 1.0:
            problem = replace(problem, scale=factor * self.scale)
        outside = self.partners is not None or self.members.positive_logits is not None
        if outside or problem.pairs.capped:
            found = relative_log_sum(problem, factor * self.z_pos())
        else:
            found = softmax_loss(problem, None, "none", include_positive=False)
            found = found.masked_fill(negatives_of(problem) == 0, -torch.inf)
        if self.members.queue is None:
            return found
        return joined(found, self.of_queue(problem, factor * self.z_pos()))

    def of_queue(self, problem: Problem, z_pos: Tensor) -> Tensor:
        """The same over the queue alone."""
        return relative_log_sum(self.on_queue(problem), z_pos)

    def on_queue(self, problem: Problem) -> Problem:
        """The problem of the same rows among the queue's features."""
        queue: FeatureQueue = self.members.queue
        features, col_ids = queue.filled()
        col_ids = None if col_ids is None else col_ids.clone()
        features = features.to(problem.x.dtype, copy=True)  # others may come in before the backward pass
        features = normalized(features) if self.normalize else features
        row_ids = problem.pairs.tensors[1]
        col_ids = None if row_ids is None else col_ids
        pairs = Pairs.of((None, row_ids, col_ids, problem.pairs.row_ceiling, None))
        return replace(problem, y=features, offset=None, index=None, pairs=pairs)

    def z_pos(self) -> Tensor:
        """The positives' logits [N]."""
        if self.members.positive_logits is not None:
            logits: Tensor = self.members.positive_logits
            return logits
        problem, dtype = self.problem, score_dtype(self.problem.x.dtype)
        if self.partners is not None:
            return self.scale * (problem.x.to(dtype) * self.partners.to(dtype)).sum(1)
        z_pos = self.scale * pair_dots(problem.x, problem.y, self.columns()[:, None])[:, 0]
        return problem.pairs.add_to_positives(z_pos, self.columns())

    def columns(self) -> Tensor:
        """Where the positives lie [N], the first of several; 0 for none."""
        problem = self.problem
        if problem.index is not None:
            return (problem.index if problem.index.dim() == 1 else problem.index[:, 0]).clamp(min=0)
        n = problem.x.shape[0]
        return torch.arange(n, dtype=torch.int64, device=problem.x.device) + (problem.offset or 0)

    def weights(self) -> Tensor:
        """What the function makes of rows and positives [N]."""
        x = self.problem.x
        partners = self.problem.y[self.columns()] if self.partners is None else self.partners
        found = self.members.weight_fn(x, partners)
        require_vector(found, "weight_fn", x.shape[0], x, differentiable=True)
        weights: Tensor = found.to(score_dtype(x.dtype))
        return weights

    def corrected(self, include_positive: bool) -> Tensor:
        """-log(e^{z_pos} / (e^{z_pos} + M g)) [N]."""
        members, count = self.members, negatives_of(self.problem)
        if members.queue is not None:
            count = count + negatives_of(self.on_queue(self.problem))
        nothing, log_count = count == 0, count.clamp(min=1).to(score_dtype(self.problem.x.dtype)).log()
        beta = members.hardness_beta
        if beta is None:
            log_mean = self.log_ratio(1.0) - log_count
        else:
            log_mean = self.log_ratio(1 + beta).masked_fill(nothing, 0.0)
            log_mean = log_mean - self.log_ratio(beta).masked_fill(nothing, 0.0)
        log_mean = log_mean.masked_fill(nothing, 0.0)
        if members.debiased is not None:
            log_mean = debiased_mean(log_mean, members.debiased, -self.scale - self.z_pos())
        losses = log_count + log_mean
        losses = softplus(losses) if include_positive else losses
        return self.with_infinity(losses).masked_fill(nothing, 0.0)


def _distinct(positives: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The positives [N, P] in rising order, each once, -1 at the end."""
    index = check_several_positives(positives, x, y)
    if not y.shape[0] and x.shape[0]:
        raise ValueError("y: expected at least one candidate with positives of shape [N, P]; got none")
    return _rising(index, y.shape[0])


def _rising(index: Tensor, columns: int) -> Tensor:
    ordered = index.masked_fill(index < 0, columns).sort(dim=1).values
    again = torch.nn.functional.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0))
    ordered = ordered.masked_fill(again, columns).sort(dim=1).values
    return ordered.masked_fill(ordered == columns, -1).contiguous()


def _unpadded(problem: Problem, weights: Tensor | None, missing: bool) -> tuple[Problem, Tensor | None]:
    """Zeros for padding, which is nobody's positive; weight 0 for a row whose only positive it is."""
    index = problem.index
    if index is not None and index.dim() == 2:
        bias = problem.pairs.tensors[0]
        assert bias is not None
        padding = bias.detach() == -torch.inf
        index = _rising(index.masked_fill(padding[index.clamp(min=0)], -1), problem.y.shape[0])
        x, y, weights = without_padding(problem.x, problem.y, problem.pairs, None, None, weights)
        return replace(problem, y=y, index=index), weights
    own = (None, None) if missing else (problem.offset, index)
    x, y, weights = without_padding(problem.x, problem.y, problem.pairs, *own, weights)
    return replace(problem, x=x, y=y), weights


def weighted_views(
    problem: Problem, z1: Tensor, z2: Tensor, weight_fn: Any, weight: Any, reduction: str, include_positive: bool
) -> Tensor:
    """NT-Xent without the positive in the denominator and with weights of the positives' logits (DCLW)."""
    members = Members(weight_fn=weight_fn).checked(z1, include_positive)
    losses = softmax_loss(problem, None, "none", include_positive=False)
    dtype, found = score_dtype(z1.dtype), []
    z_pos = scale_tensor(z1, problem.scale) * (z1.to(dtype) * z2.to(dtype)).sum(1)
    for own, other in ((z1, z2), (z2, z1)):
        of_rows = members.weight_fn(own, other)
        require_vector(of_rows, "weight_fn", z1.shape[0], z1, differentiable=True)
        found.append((1 - of_rows.to(dtype)) * z_pos)
    nothing = negatives_of(problem) == 0
    weights = row_weights(weight, z1.shape[0], z1)
    losses = (losses + torch.cat(found)).masked_fill(nothing, 0.0)
    return reduce_losses(losses, None if weights is None else weights.repeat(2), reduction)


def von_mises_fisher_weights(x: Tensor, y: Tensor, sigma: float = 0.5) -> Tensor:
    """DCLW's weights of rows, 2 - N softmax_i(<x_i, y_i> / sigma): a ``weight_fn`` that counts hard positives more.

    Parameters
    ----------
    x, y : Tensor
        Rows and their positives [N, D].
    sigma : float
        The smaller, the more the weights differ.

    Returns
    -------
    Tensor
        [N] in float32 (float64 for float64 features), not differentiated. Their mean is 1.

    References
    ----------
    C.-H. Yeh et al., "Decoupled contrastive learning", ECCV 2022.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> ck.von_mises_fisher_weights(torch.eye(2), torch.eye(2))
    tensor([1., 1.])
    """
    x, y = check_features(x, y, ("x", "y"), False, matching=True)
    sigma, dtype = check_number(sigma, "sigma", positive=True), score_dtype(x.dtype)
    dots = (x.detach().to(dtype) * y.detach().to(dtype)).sum(1)
    found: Tensor = 2 - dots.shape[0] * torch.softmax(dots / sigma, 0)
    return found
