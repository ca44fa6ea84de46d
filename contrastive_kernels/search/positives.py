"""The positives of queries: which documents they are, how relevant, in which order they come, and metrics of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments.checks import check_dense, check_positives, check_several_positives

__all__ = ["check_relevance", "figures_of", "in_order", "positive_columns", "without_self"]


def positive_columns(positives: Any, x: Tensor, y: Tensor) -> Tensor:
    """The positives' columns [N, P] int64, -1 for none; of one that is there twice, the second is -1."""
    if isinstance(positives, Tensor) and positives.dim() == 2:
        index = check_several_positives(positives, x, y)
        ordered, order = index.sort(dim=1, stable=True)
        repeated = torch.zeros_like(ordered, dtype=torch.bool)
        repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
        return index.masked_fill(torch.zeros_like(repeated).scatter_(1, order, repeated), -1)
    single, offset = check_positives(positives, x, y, allow_missing=True)
    if single is None:
        single = torch.arange(x.shape[0], dtype=torch.int64, device=x.device) + (offset or 0)
    return single[:, None]


def without_self(index: Tensor, y: Tensor) -> Tensor:
    """Every query's own copy among the documents [N, 1], which is none of its positives [N, P]."""
    if len(index) != len(y):
        raise ValueError(
            f"exclude_self: expected as many documents as queries, row i of which is query i; got {len(index)} queries "
            f"and {len(y)} documents"
        )
    own = torch.arange(len(index), dtype=torch.int64, device=index.device)[:, None]
    if bool((index == own).any()):
        raise ValueError(
            "positives: expected indices of other documents than the query itself with exclude_self=True; got row i of "
            "y as a positive of row i of x (as it is by default)"
        )
    return own


def check_relevance(relevance: Any, index: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """How relevant the positives are [N, P], and their columns [N, P] without those of relevance 0."""
    if relevance is None:
        return torch.ones(index.shape, dtype=dtype, device=index.device), index
    if not isinstance(relevance, Tensor):
        raise TypeError(f"relevance: expected a tensor of shape {list(index.shape)}; got {type(relevance).__name__}")
    check_dense(relevance, "relevance")
    if relevance.shape != index.shape:
        raise ValueError(
            f"relevance: expected shape {list(index.shape)}, a number for each positive; got {list(relevance.shape)}"
        )
    if relevance.is_complex() or relevance.dtype == torch.bool:
        raise TypeError(f"relevance: expected real numbers; got {relevance.dtype}")
    if relevance.device != index.device:
        raise ValueError(f"relevance: expected device {index.device}; got {relevance.device}")
    grades = relevance.detach().to(dtype)
    counted = grades.masked_fill(index < 0, 0.0)
    if not bool((counted.isfinite() & (counted >= 0)).all()):
        raise ValueError(
            f"relevance: expected finite numbers of at least 0; got values in [{float(counted.min()):g}, "
            f"{float(counted.max()):g}]"
        )
    return counted, index.masked_fill(counted == 0, -1)


def in_order(scores: Tensor, index: Tensor, relevance: Tensor) -> Tensor:
    """How many of a query's other positives stand before each one [N, P]; of equal scores the least relevant first."""
    own = scores.masked_fill(scores.isnan(), -torch.inf)
    order = relevance.sort(dim=1, stable=True).indices
    order = order.gather(1, own.gather(1, order).sort(dim=1, descending=True, stable=True).indices)
    order = order.gather(1, (index < 0).gather(1, order).sort(dim=1, stable=True).indices)
    places = torch.arange(index.shape[1], dtype=torch.int64, device=index.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def figures_of(ranks: Tensor, relevance: Tensor, cuts: tuple[int, ...]) -> Tensor:
    """Of every query the average precision, and by cut-off precision and nDCG [N, 1 + 2 K].

    From its positives' ranks [N, P], which count from 0, -1 for none; and from their relevance [N, P].
    """
    dtype, there = relevance.dtype, ranks >= 0
    behind = ranks.masked_fill(~there, torch.iinfo(torch.int64).max)
    found = behind.sort(dim=1).values
    known = there.sum(1)
    count = torch.arange(1, ranks.shape[1] + 1, dtype=dtype, device=ranks.device)
    precisions = (count / (found.to(dtype) + 1)).masked_fill(count > known[:, None], 0.0)
    discounts = 1 / torch.log2(torch.arange(2, ranks.shape[1] + 2, dtype=dtype, device=ranks.device))
    best = relevance.masked_fill(~there, 0.0).sort(dim=1, descending=True).values * discounts
    gains = relevance / torch.log2(ranks.clamp(min=0).to(dtype) + 2)
    precision, ndcg = [], []
    for cut in cuts:
        inside = behind < cut
        precision.append(inside.sum(1).to(dtype) / cut)
        ndcg.append(gains.masked_fill(~inside, 0.0).sum(1) / best[:, :cut].sum(1))
    return torch.stack([precisions.sum(1) / known, *precision, *ndcg], 1)
