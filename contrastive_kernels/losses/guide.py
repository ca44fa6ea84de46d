"""A guide's features of queries and documents, and hard negatives of every query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..arguments.checks import check_dense, check_features, normalized, shown
from ..arguments.margin import check_margin
from ..panels.size import score_dtype

__all__ = ["Guide", "check_guided_margin", "hard_negatives"]


def hard_negatives(negatives: Any, x: Tensor, normalize: bool, name: str = "negatives") -> Tensor:
    """Those of all rows [N, K, D], in the dtype of the rows x [N, D]."""
    if not isinstance(negatives, Tensor):
        raise TypeError(f"{name}: expected a tensor of shape [N, K, D]; got {type(negatives).__name__}")
    check_dense(negatives, name)
    (n, d), shape = x.shape, negatives.shape
    if len(shape) != 3 or shape[0] != n or shape[2] != d:
        raise ValueError(f"{name}: expected shape [{n}, K, {d}]; got {list(shape)}")
    flat = negatives.reshape(n * shape[1], d)
    _, flat = check_features(x, normalized(flat) if normalize else flat, ("anchor", name), False)
    return flat.reshape(shape)


def check_guided_margin(margin: Any, used: bool = True) -> tuple[bool, float]:
    """Whether it is relative, and how much."""
    if margin is None:
        raise TypeError("guided_margin: expected a number or ('relative', number); got None")
    check_margin(margin, "guided_margin")
    relative = isinstance(margin, (tuple, list))
    number = float(margin[1] if relative else margin)
    if number and not used:
        raise ValueError(f"guided_margin: expected 0 without guided; got {shown(margin)}")
    return relative, number


@dataclass(frozen=True)
class Guide:
    """A guide's features of queries and positives [N, E], of all documents [(1 + K) N, E], and its thresholds [N]."""

    anchor: Tensor
    positive: Tensor
    documents: Tensor
    threshold: Tensor

    @classmethod
    def of(cls, guided: Any, margin: Any, x: Tensor, hard: Tensor | None, normalize: bool) -> Guide:
        """Those of rows x [N, D] and their hard negatives [N, K, D], if they have any."""
        relative, number = check_guided_margin(margin)
        wanted = 2 if hard is None else 3
        if not isinstance(guided, (tuple, list)):
            raise TypeError(f"guided: expected a sequence of {wanted} tensors; got {type(guided).__name__}")
        if len(guided) != wanted:
            which = "anchor, positive" if hard is None else "anchor, positive, negatives"
            raise ValueError(f"guided: expected a guide's features of {which}; got {len(guided)} of them")
        anchor, positive, *others = (each.detach() if isinstance(each, Tensor) else each for each in guided)
        anchor, positive = check_features(anchor, positive, ("guided", "guided"), normalize, matching=True)
        if anchor.shape[0] != x.shape[0]:
            raise ValueError(f"guided: expected {x.shape[0]} rows, as anchor has; got {anchor.shape[0]}")
        if anchor.device != x.device:
            raise ValueError(f"guided: expected device {x.device}; got {anchor.device}")
        documents = positive
        if hard is not None:
            own = hard_negatives(others[0], anchor, normalize, "guided")
            if own.shape[1] != hard.shape[1]:
                raise ValueError(f"guided: expected {hard.shape[1]} negatives of every row; got {own.shape[1]}")
            documents = torch.cat([positive, own.reshape(-1, positive.shape[1])])
        dtype = score_dtype(anchor.dtype)
        own_score = (anchor.to(dtype) * positive.to(dtype)).sum(1)
        threshold = own_score - (own_score.abs() * number if relative else number)
        return cls(anchor, positive, documents, threshold)

    def named(self, name: str) -> Tensor:
        """The features of these rows or columns."""
        found: Tensor = getattr(self, name)
        return found
