"""What people log of a batch beside its loss: how often the positive is found, its logit, and the denominator's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._library import outside_graphs
from ..arguments.checks import check_flag, scale_tensor
from ..arguments.margin import scores_of
from ..arguments.reduction import row_gains, row_weights
from ..distributed.group import Ranks, tell
from ..distributed.losses import gains_over_ranks
from ..distributed.ring import travel
from ..engine.class_sums import ClassSums, square_norms
from ..engine.matrix import Problem
from ..operators.search import best_alike, count_lower
from ..operators.softmax_loss import softmax_loss
from ..panels.pairs import Pairs
from ..panels.panel import present
from ..panels.size import score_dtype
from .ratios import negatives_of

__all__ = [
    "LossMetrics",
    "check_metrics",
    "metrics_of_both",
    "with_label_metrics",
    "with_metrics",
    "with_metrics_over_ranks",
]


class LossMetrics(NamedTuple):
    """What a loss finds on its way, with ``return_metrics=True``: numbers on the device, without gradients.

    All are means over the rows, weighted as the loss's own mean weighs them; of both directions, but for accuracies.

    Parameters
    ----------
    top1, top5 : Tensor
        The share of rows (of ``clip_loss``: images) whose positive is the first, or among the first five, of the
        candidates in the order of logits; of ``sup_con``, with fewer than 1 (5) of other labels before the first of
        theirs.
    top1_back, top5_back : Tensor, optional
        The same of the texts, which find their images; None for a loss of one direction.
    positive_logit : Tensor
        The positives' logits, with what ``candidate_bias`` adds; by ``logit_scale``, their cosines. Of several
        positives, their mean.
    log_sum_exp : Tensor
        The logarithm of the denominator.

    Notes
    -----
    Candidates are the positive and what counts as its negatives: not those of equal ids nor padding, but also those
    that a margin leaves out of the denominator. **Ties count against the positive**, as far as rounding can tell, and
    so does NaN: features that have collapsed find nothing.
    """

    top1: Tensor
    top5: Tensor
    top1_back: Tensor | None
    top5_back: Tensor | None
    positive_logit: Tensor
    log_sum_exp: Tensor


def check_metrics(asked: Any, ranks: Ranks | None, features: Any, **members: Any) -> None:
    """A flag; no metrics of losses whose denominators are not those of rows among candidates."""
    try:
        if not check_flag(asked, "return_metrics"):
            return
        for name, value in members.items():
            if value is not None:
                raise ValueError(f"return_metrics: expected False with {name}, which has none; got True")
    except (TypeError, ValueError) as error:
        tell(ranks, error, features)
        raise


def with_metrics(
    loss: Tensor,
    problem: Problem,
    weight: Any,
    reduction: str,
    *,
    both: bool = False,
    include_positive: bool = True,
    smoothing: float = 0.0,
    repeats: int = 1,
) -> tuple[Tensor, LossMetrics]:
    """A softmax loss with its metrics; weights of the samples, each of so many rows."""
    with torch.no_grad():
        return loss, _metrics(loss.detach(), problem, weight, reduction, both, include_positive, smoothing, repeats)


def _metrics(
    loss: Tensor,
    problem: Problem,
    weight: Any,
    reduction: str,
    both: bool,
    include_positive: bool,
    smoothing: float,
    repeats: int,
) -> LossMetrics:
    """One more product for the accuracies of a direction."""
    x = problem.x
    n, dtype = x.shape[0], score_dtype(x.dtype)
    shares = row_gains(weight, n // repeats, x, "mean", repeats)
    if shares is None:
        shares = torch.full((n,), 1.0 / max(n, 1), dtype=dtype, device=x.device)
    left_out, z_pos = _positives(problem)
    top1, top5 = _accuracies(problem, left_out, z_pos, shares)
    back: tuple[Tensor | None, Tensor | None] = (None, None)
    if both:
        turned = replace(problem, x=problem.y, y=x, pairs=problem.pairs.turned())
        back = _accuracies(turned, left_out, z_pos, shares)
    positive = (shares * z_pos.masked_fill(shares == 0, 0.0)).sum()
    if smoothing:  # whose loss has more in it than the denominator
        loss = softmax_loss(problem, shares, "sum", both=both, include_positive=include_positive)
    elif reduction != "mean":
        loss = loss.sum() / _total(weight, n, x, repeats)
    return LossMetrics(top1, top5, *back, positive, loss + positive)


def metrics_of_both(there: LossMetrics, back: LossMetrics) -> LossMetrics:
    """Those of two directions that were found one after the other."""
    positive = (there.positive_logit + back.positive_logit) / 2
    log_sum_exp = (there.log_sum_exp + back.log_sum_exp) / 2
    return LossMetrics(there.top1, there.top5, back.top1, back.top5, positive, log_sum_exp)


def with_metrics_over_ranks(
    loss: Tensor,
    problem: Problem,
    weight: Tensor | None,
    reduction: str,
    ranks: Ranks,
    call: str,
    *,
    both: bool = False,
    mirrored: bool = False,
    repeats: int = 1,
) -> tuple[Tensor, LossMetrics]:
    """A softmax loss over the ranks of a group with the metrics of all rows: those of this rank meet all candidates.

    `weight`: checked weights of this rank's samples; `mirrored`: the candidates are the rows.
    """
    metrics = _metrics_over_ranks(loss.detach(), problem, weight, reduction, ranks, call, both, mirrored, repeats)
    return loss, metrics


@outside_graphs
@torch.no_grad()
def _metrics_over_ranks(
    loss: Tensor,
    problem: Problem,
    weight: Tensor | None,
    reduction: str,
    ranks: Ranks,
    call: str,
    both: bool,
    mirrored: bool,
    repeats: int,
) -> LossMetrics:
    x, call = problem.x, f"the metrics of {call}"
    sizes = ranks.agree(call, (), x, len(x), len(problem.y))
    shares = gains_over_ranks(ranks, call, sizes, weight, x, "mean", repeats)
    left_out, z_pos = _positives(problem)
    itself = replace(problem, index=left_out[:, 0], offset=None, symmetric=mirrored)
    found = list(_shares_of(_before_over_ranks(ranks, call, sizes.cols, itself, left_out, z_pos), shares))
    if both:
        turned = replace(itself, x=problem.y, y=x, pairs=problem.pairs.turned())
        found += _shares_of(_before_over_ranks(ranks, call, sizes.rows, turned, left_out, z_pos), shares)
    found.append((shares * z_pos.masked_fill(shares == 0, 0.0)).sum())
    weights = loss.new_full((), len(x)) if weight is None else repeats * weight.sum()
    wide = torch.stack([v.to(loss.device, torch.float64) for v in (*found, loss.sum(), weights)])
    *told, positive, losses, total = ranks.transport(call).sum(wide)
    if reduction == "sum":  # which all ranks have
        losses = loss.double()
    mean = loss if reduction == "mean" else losses / total.masked_fill(total == 0, 1.0)
    first, five, *back, positive, log_sum = (v.to(z_pos.dtype) for v in (*told, positive, mean + positive))
    one_back, five_back = back if both else (None, None)
    return LossMetrics(first, five, one_back, five_back, positive, log_sum)


def _before_over_ranks(
    ranks: Ranks, call: str, cols: Sequence[int], problem: Problem, left_out: Tensor, z_pos: Tensor
) -> Tensor:
    """How many of all ranks' candidates come before the positives of this one's rows [n] int64."""
    row_ids, col_ids = problem.pairs.row_ids, problem.pairs.col_ids
    before = torch.zeros(len(problem.x), dtype=torch.int64, device=problem.x.device)
    own = [problem.y] if col_ids is None else [problem.y, col_ids]
    for rank, (y, *ids) in travel(ranks.transport(call), cols, own):
        block = replace(problem, y=problem.y if rank == ranks.rank else y)
        left = left_out
        if rank != ranks.rank:
            pairs = Pairs.of((None, row_ids, ids[0])) if ids else problem.pairs
            block, left = replace(block, index=None, symmetric=False, pairs=pairs), left_out[:, :0]
        if len(block.x) and len(y):
            before = before + _before(block, left, z_pos)
    return before


def with_label_metrics(
    loss: Tensor, problem: Problem, shares: Tensor, mean: Tensor, of_positives: Tensor
) -> tuple[Tensor, LossMetrics]:
    """A supervised contrastive loss with its metrics.

    shares [N] are those of rows in a mean, `mean` is that of their losses, and of_positives [N] 1 over their number.
    """
    with torch.no_grad():
        x, y, pairs, scale = problem.x, problem.y, problem.pairs, scale_tensor(problem.x, problem.scale)
        row_ids, col_ids = present(pairs.row_ids), present(pairs.col_ids)
        dots = ClassSums(row_ids, col_ids, problem.workspace_bytes).dots(x, y)
        if problem.symmetric:
            dots = dots - square_norms(x)
        positive = (shares * (dots * of_positives).to(scale.dtype) * scale).sum()
        params, engine = torch.stack([scale, *scale.new_zeros(2)]), problem.engine
        best = best_alike(
            x, y, params, row_ids, col_ids, problem.symmetric, engine.backend, problem.workspace_bytes
        )  # fmt: skip
        nobody = torch.empty((x.shape[0], 0), dtype=torch.int64, device=x.device)
        top1, top5 = _accuracies(replace(problem, index=None), nobody, best, shares)
        return loss, LossMetrics(top1, top5, None, None, positive, mean.detach() + positive)


def _total(weight: Any, rows: int, x: Tensor, repeats: int) -> Tensor | int:
    """What a mean divides the sum by."""
    weights = row_weights(weight, rows // repeats, x)
    if weights is None:
        return max(rows, 1)
    total = repeats * weights.sum()
    return total.masked_fill(total == 0, 1.0)


def _columns(problem: Problem) -> Tensor:
    """Where the positives lie [N]."""
    if problem.index is not None:
        return problem.index
    n = problem.x.shape[0]
    return torch.arange(n, dtype=torch.int64, device=problem.x.device) + (problem.offset or 0)


def _accuracies(problem: Problem, left_out: Tensor, z_pos: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """The shares of rows whose positives are the first, and among the first five."""
    if not problem.x.shape[0]:
        nothing = z_pos.sum()
        return nothing, nothing.clone()
    return _shares_of(_before(problem, left_out, z_pos), shares)


def _shares_of(before: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows with so many candidates before the positive [N]."""
    first, five = ((shares * (before < k)).sum() for k in (1, 5))
    return first, five


def _positives(problem: Problem) -> tuple[Tensor, Tensor]:
    """The positives' columns [N, 1] and logits [N]."""
    x, columns = problem.x, _columns(problem)
    dots = scores_of(x, problem.y, columns[:, None], score_dtype(x.dtype), problem.workspace_bytes)[:, 0]
    return columns[:, None].contiguous(), problem.pairs.add_to_positives(dots * scale_tensor(x, problem.scale), columns)


def _before(problem: Problem, left_out: Tensor, z_pos: Tensor) -> Tensor:
    """How many candidates come before the positives [N] int64."""
    x, y = problem.x, problem.y
    params = torch.stack([scale_tensor(x, problem.scale), *z_pos.new_zeros(2)])
    said = [*problem.pairs.tensors[:3], None, None]  # (without ceilings)
    lower = count_lower(
        x, y, params, z_pos, left_out, said, problem.symmetric, problem.engine.backend, problem.workspace_bytes
    )
    return negatives_of(problem, padding=True) - lower  # padding lies below, too
