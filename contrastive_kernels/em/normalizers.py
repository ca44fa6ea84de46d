"""Which normaliser weighs a row: the one stored, the batch's own, their average or a constant; and what it may be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..arguments.checks import check_engine, check_positives, check_scale, check_vector
from ..distributed.group import Ranks
from ..distributed.losses import normalizers_over_ranks
from ..draws.gamma import log_or_minus_infinity
from ..engine.matrix import Problem
from ..operators.logsumexp import normalizers
from .expectation import Expectation, positive_scores, wide
from .memory import NormalizerMemory

__all__ = ["Batch", "check_scores", "found_by_batch", "positive_term", "row_normalizers"]


class Rule(Protocol):
    """What of a loss decides on its normalisers."""

    weights: str | float
    max_ratio: str | float | None
    first_visit: str
    include_positive: bool
    memory: NormalizerMemory
    engine: dict[str, Any]


@dataclass(frozen=True)
class Batch:
    """Features [N, D] and [M, D] (normalised if asked for), and where the positives are; one or two directions."""

    x: Tensor
    y: Tensor
    logit_scale: float | Tensor
    positives: int | Tensor | None
    positive_logits: Tensor | None
    two: bool
    #: who shares it, and the number of all ranks' columns
    ranks: Ranks | None = None
    columns: int = 0
    #: the loss that it is of, for errors
    call: str = "DatasetContrastiveLoss"

    @property
    def negatives(self) -> int:
        """Of every row."""
        columns = len(self.y) if self.ranks is None else self.columns
        return columns - (self.positive_logits is None)

    def positive_scores(self) -> Tensor:
        """z_i,p(i) [N] in the dtype of the scores."""
        return positive_scores(self.x, self.y, self.logit_scale, self.positives, self.positive_logits)


def check_scores(x: Tensor, y: Tensor, logit_scale: object, positives: object, positive_logits: object | None) -> None:
    """What a batch's scores are made of, beside features that fit."""
    check_scale(x, logit_scale)
    if positive_logits is None:
        check_positives(positives, x, y)
    else:
        check_vector(positive_logits, "positive_logits", len(x), x, differentiable=True)


@torch.no_grad()
def row_normalizers(
    loss: Rule, batch: Batch, expectation: Expectation, z_pos: Tensor, notional: float
) -> tuple[Tensor, Tensor | None]:
    """log Zbar [N, d] of the rows, and which of them count [N] (None: all)."""
    constant = loss.weights if isinstance(loss.weights, float) else None
    own = found_by_batch(batch, loss.engine) if _needs_batch(loss, expectation) else None
    if constant is not None:
        chosen = torch.full_like(expectation.log_mean, constant, dtype=z_pos.dtype)
    else:
        chosen = _log_z(_log_means(loss, expectation, own), z_pos, notional, loss.include_positive)
    if loss.max_ratio is not None and own is not None:
        least = _log_z(own, z_pos, notional, loss.include_positive) - math.log(_bound(loss.max_ratio, notional, batch))
        chosen = torch.maximum(chosen, least)
    return chosen, _counted(loss, expectation, z_pos.dtype)


@torch.no_grad()
def found_by_batch(batch: Batch, engine: dict[str, Any]) -> Tensor:
    """Logarithms of the batch's own means of exp(z) over negatives [N, d] in float64; one product."""
    x, y = batch.x, batch.y
    index, offset = (None, None) if batch.positive_logits is not None else check_positives(batch.positives, x, y)
    options = check_engine(engine["backend"], engine["workspace_bytes"])
    problem = Problem(x, y, check_scale(x, batch.logit_scale), offset=offset, index=index, engine=options)
    if batch.ranks is None:
        found = normalizers(problem, cols=batch.two)
    else:
        found = normalizers_over_ranks(batch.ranks, batch.call, problem, cols=batch.two)
    sides = [n for n in found if n is not None]
    sums = torch.stack([shift + rest for shift, rest in (n.to(wide(x.device)) for n in sides)], 1)
    return sums - math.log(max(batch.negatives, 1))


def positive_term(include_positive: bool, log_u: Tensor) -> Tensor:
    """u c: what the positive adds to u Z. Without it 0, where u alone may overflow: log Z < -88.7 is finite."""
    return log_u.exp() if include_positive else torch.zeros_like(log_u)


def _needs_batch(loss: Rule, expectation: Expectation) -> bool:
    """Whether the batch's own normalisers come before the weights."""
    first_visits = loss.weights == "stored" and loss.first_visit == "reduce" and expectation.cold
    return first_visits or loss.weights in ("updated", "batch") or loss.max_ratio is not None


def _log_means(loss: Rule, expectation: Expectation, own: Tensor | None) -> Tensor:
    """The logarithms of the means [N, d] that weigh the rows."""
    stored = expectation.log_mean
    if own is None:
        return stored
    if loss.weights == "batch":
        return own
    if loss.weights == "updated":
        return loss.memory.average(stored, expectation.visits, own)
    return torch.where(expectation.visits == 0, own, stored)


def _log_z(log_mean: Tensor, z_pos: Tensor, notional: float, include_positive: bool) -> Tensor:
    """log(c + K mean exp(h)) [N, d] from log mean exp(z), whose difference from z_pos is taken in float64."""
    dtype = wide(z_pos.device)
    streamed = log_mean.to(dtype) - z_pos.to(dtype)[:, None] + math.log(notional)
    constant = torch.full_like(streamed, log_or_minus_infinity(float(include_positive)))
    return torch.logaddexp(streamed, constant).to(z_pos.dtype)


def _bound(max_ratio: str | float, notional: float, batch: Batch) -> float:
    """R, that u Z shall not exceed."""
    return max(notional / batch.negatives if isinstance(max_ratio, str) else max_ratio, 1.0)


def _counted(loss: Rule, expectation: Expectation, dtype: torch.dtype) -> Tensor | None:
    """1 for the rows with a stored normaliser, 0 for those without, if these are to be skipped [N]."""
    if loss.first_visit != "skip" or loss.weights not in ("stored", "updated"):
        return None
    return (expectation.visits > 0).all(1).to(dtype)
