"""The definition of the loss over a data set: dense, differentiable, in whatever precision comes in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from contrastive_kernels.draws.gamma import expected_excess


@dataclass(frozen=True)
class Rule:
    """The options of DatasetContrastiveLoss that say what it computes."""

    num_samples: int = 300
    shape: float | None = None
    negatives: str | int = "dataset"
    include_positive: bool = True
    weights: str | float = "stored"
    max_ratio: float | str | None = None
    first_visit: str = "reduce"
    safeguard: float | None = None
    step: float = 1.0
    floor: float = 0.1
    reduction: str = "mean"

    def notional(self, negatives: int) -> float:
        """K."""
        return float({"dataset": self.num_samples - 1, "batch": negatives}.get(self.negatives, self.negatives))

    def average(self, stored: Tensor, visits: Tensor, found: Tensor) -> Tensor:
        """What a visit makes of a stored logarithm of a mean."""
        gain = (visits.double() + 1).pow(-self.step).clamp_min(self.floor).to(found)
        return torch.where(visits == 0, found, torch.logaddexp(stored + torch.log1p(-gain), found + gain.log()))


@dataclass
class Batch:
    """What the memory holds of a batch's samples [N, d], and what was drawn for them."""

    log_mean: Tensor
    visits: Tensor
    log_weight: Tensor


def loss_of_scores(
    z: Tensor, rule: Rule, batch: Batch, offset: int | None, logits: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor, float]:
    """From logits z [N, M]: the loss, log mean exp(z) over each row's negatives [N, d], the largest |log Z|.

    The positive of row i is column i + offset, or it is not among the columns and ``logits`` [N] has its logit.
    """
    n, m = z.shape
    negatives, d = m - (logits is None), batch.log_mean.shape[1]
    if negatives < 1:
        nothing = 0.0 * (z.sum() if logits is None else z.sum() + logits.sum())
        return nothing.expand(n) if rule.reduction == "none" else nothing, z.new_full((n, d), -torch.inf), 0.0
    notional, c = rule.notional(negatives), 0.0 if rule.include_positive else -math.inf
    losses, found, largest = [], [], 0.0
    counted = z.new_ones(n) if weight is None else weight.to(z.dtype)
    if rule.first_visit == "skip" and rule.weights in ("stored", "updated"):
        counted = counted * (batch.visits > 0).all(1)
    for k in range(d):
        scores = z.T if k else z
        held = torch.full((n,), -1) if logits is not None else torch.arange(n) + (offset or 0)
        z_pos = scores.gather(1, held[:, None])[:, 0] if logits is None else logits
        kept = scores.masked_fill(torch.arange(m) == held[:, None], -torch.inf)
        own = torch.logsumexp(kept.detach(), 1) - math.log(negatives)
        log_z = _log_z(rule, batch, k, own, z_pos.detach(), notional, negatives, c)
        log_u = (batch.log_weight[:, k].to(z.dtype) - log_z).masked_fill(counted == 0, 0.0)
        h = (kept - z_pos[:, None]).masked_fill((counted == 0)[:, None], -torch.inf)
        streamed = notional / negatives * torch.exp(h + log_u[:, None]).sum(1)
        losses.append(streamed + torch.exp(log_u + c) - log_u - 1 - expected_excess(rule.shape))
        found.append(own)
        largest = max(largest, log_z.abs().max().item() if n else 0.0)
    rows = torch.stack(losses).mean(0)
    if rule.reduction == "none":
        return rows * counted, torch.stack(found, 1), largest
    total = (rows * counted).sum()
    if rule.reduction == "mean":
        total = total / counted.sum().masked_fill(counted.sum() == 0, 1.0)
    return total, torch.stack(found, 1), largest


def _log_z(
    rule: Rule, batch: Batch, k: int, own: Tensor, z_pos: Tensor, notional: float, negatives: int, c: float
) -> Tensor:
    """log Zbar [N] of a direction."""

    def of_mean(log_mean: Tensor) -> Tensor:
        log_sum = log_mean.to(z_pos.dtype) - z_pos + math.log(notional)
        return torch.logaddexp(log_sum, torch.full_like(log_sum, c))

    stored, visits = batch.log_mean[:, k].to(own), batch.visits[:, k]
    if isinstance(rule.weights, float):
        log_z = torch.full_like(z_pos, rule.weights)
    elif rule.weights == "batch":
        log_z = of_mean(own)
    elif rule.weights == "updated":
        log_z = of_mean(rule.average(stored, visits, own))
    else:
        log_z = of_mean(torch.where((visits == 0) & (rule.first_visit == "reduce"), own, stored))
    if rule.max_ratio is None:
        return log_z
    bound = notional / negatives if isinstance(rule.max_ratio, str) else rule.max_ratio
    return torch.maximum(log_z, of_mean(own) - math.log(max(bound, 1.0)))


def memory_after(
    rule: Rule, memory: Any, index: Tensor, columns: slice, found: Tensor, negatives: int
) -> tuple[Tensor, Tensor]:
    """log_mean and visits [num_samples, d] after a visit; of a sample that comes twice, the last one counts."""
    log_mean, visits = memory.log_mean.clone(), memory.visits.clone()
    for row, sample in enumerate(index.tolist()):
        before = memory.log_mean[sample, columns], memory.visits[sample, columns]
        if found[row].isfinite().all():
            average = rule.average(*before, found[row])
            if rule.safeguard is not None:  # the part of the sum that the batch has seen
                seen = found[row] + math.log(negatives / (rule.num_samples - 1))
                average = torch.maximum(average, seen - rule.safeguard)
            log_mean[sample, columns] = average
            visits[sample, columns] = before[1] + 1
    return log_mean, visits
