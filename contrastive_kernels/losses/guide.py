"""A guide's features: pairs that it finds more alike than a row's positive are left out. Hard negatives of queries."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..arguments.checks import check_dense, check_features, check_pair, normalized, shown
from ..arguments.margin import check_margin, scores_of
from ..engine.matrix import Problem
from ..panels.size import score_dtype

__all__ = [
    "Guide",
    "check_guide",
    "check_guided_margin",
    "hard_negatives",
    "require_no_guide",
    "with_guide",
    "with_thresholds",
]


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


def check_guide(guided: Any, x: Tensor, y: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """A guide's features of the rows x [N, D] and of the columns y [M, D], of a width of their own; detached."""
    if not isinstance(guided, (tuple, list)):
        raise TypeError(f"guided: expected a pair of tensors; got {type(guided).__name__}")
    one, other = (each.detach() if isinstance(each, Tensor) else each for each in check_pair(guided, "guided"))
    of_rows, of_cols = check_features(one, other, ("guided", "guided"), normalize)
    if (len(of_rows), len(of_cols)) != (len(x), len(y)):
        raise ValueError(f"guided: expected {len(x)} and {len(y)} rows; got {len(of_rows)} and {len(of_cols)}")
    if of_rows.device != x.device:
        raise ValueError(f"guided: expected device {x.device}; got {of_rows.device}")
    return of_rows, of_cols


def require_no_guide(guided: Any, **members: Any) -> None:
    """What a guide does not go with."""
    for name, value in members.items():
        if guided is not None and value is not None:
            raise ValueError(f"guided: expected None with {name}; got {type(guided).__name__}")


def with_guide(problem: Problem, guide: tuple[Tensor, Tensor], margin: Any, *, both: bool = False) -> Problem:
    """The same problem, whose rows of one positive each leave out what a guide finds more alike.

    `guide`: its features of rows and columns; `both`: the columns leave out theirs, of matching rows, as those of a
    symmetric matrix always do.
    """
    guide = _in_one_dtype(problem, guide)
    index, x = problem.index, problem.x
    if index is None:
        index = torch.arange(x.shape[0], dtype=torch.int64, device=x.device) + (problem.offset or 0)
    own = scores_of(*guide, index[:, None], score_dtype(x.dtype), problem.workspace_bytes)[:, 0]
    partners = guide[1].norm(dim=1, dtype=own.dtype)[index.clamp(min=0)] if guide[1].shape[0] else own
    return with_thresholds(problem, guide, _thresholds(own, margin, guide[0], partners), both=both)


def with_thresholds(
    problem: Problem, guide: tuple[Tensor, Tensor], threshold: Tensor, *, both: bool = False
) -> Problem:
    """The same with given thresholds of the rows [N] and, of `both` and of a symmetric matrix, of the columns."""
    features = _in_one_dtype(problem, guide)
    threshold = threshold.to(score_dtype(problem.x.dtype))
    of_cols = threshold if both or problem.symmetric else None
    return replace(problem, pairs=problem.pairs.with_guide(features, threshold, of_cols))


def _in_one_dtype(problem: Problem, guide: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A guide's features in the dtype of the problem's, or of its scores."""
    dtype = problem.x.dtype if guide[0].dtype == problem.x.dtype else score_dtype(problem.x.dtype)
    of_rows, of_cols = guide
    first = of_rows.to(dtype).contiguous()
    return first, first if of_cols is of_rows else of_cols.to(dtype).contiguous()


def _thresholds(own: Tensor, margin: Any, of_rows: Tensor, lengths: Tensor) -> Tensor:
    """Of rows [N] that a guide finds so much like their positives, whose features have these lengths.

    With room for what a dot product is off by from one sum to another: a candidate like the positive is not above it.
    """
    relative, number = check_guided_margin(margin)
    slack = 4 * torch.finfo(own.dtype).eps * of_rows.shape[1] ** 0.5 * of_rows.norm(dim=1, dtype=own.dtype) * lengths
    return own - (own.abs() * number if relative else number) + slack.nan_to_num(0.0, 0.0, 0.0)


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
        check_guided_margin(margin)
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
        lengths = positive.norm(dim=1, dtype=dtype)
        return cls(anchor, positive, documents, _thresholds(own_score, margin, anchor, lengths))

    def named(self, name: str) -> Tensor:
        """The features of these rows or columns."""
        found: Tensor = getattr(self, name)
        return found
