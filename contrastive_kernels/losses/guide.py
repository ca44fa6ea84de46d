"""A guide's features: pairs that it finds more alike than a row's positive are left out. Hard negatives of queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..arguments.checks import check_dense, check_features, check_pair, normalized, scale_tensor, shown
from ..arguments.margin import check_margin
from ..arguments.reduction import reduce_losses
from ..engine.matrix import Problem
from ..operators.guided import guided_log_sums, guided_log_sums_of_both
from ..panels.size import score_dtype
from .ratios import pair_dots, relative_of, softplus

__all__ = [
    "Guide",
    "check_guide",
    "check_guided_margin",
    "guided_loss",
    "hard_negatives",
    "require_no_guide",
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


def guided_loss(
    problem: Problem,
    guide: tuple[Tensor, Tensor],
    margin: Any,
    weight: Tensor | None,
    reduction: str,
    include: bool,
    *,
    both: bool = False,
) -> Tensor:
    """InfoNCE of rows with one positive each, without the candidates that a guide finds too much alike.

    `guide`: its features of rows and columns; `include`: the positive is in the denominator; `both`: the mean with the
    columns', of matching rows.
    """
    relative, number = check_guided_margin(margin)
    n, device = problem.x.shape[0], problem.x.device
    index = problem.index
    if index is None:
        index = torch.arange(n, dtype=torch.int64, device=device) + (problem.offset or 0)
    own = pair_dots(*guide, index[:, None])[:, 0]
    threshold = own - (own.abs() * number if relative else number)
    y = problem.x if problem.symmetric else problem.y
    z_pos = scale_tensor(problem.x, problem.scale) * pair_dots(problem.x, y, index[:, None])[:, 0]
    of_both = guided_log_sums_of_both(problem, guide, threshold) if both else None
    sides = of_both or (guided_log_sums(problem, guide, threshold),)
    ratios = [relative_of(*side, z_pos) for side in sides]
    if include:
        losses = [softplus(ratio) for ratio in ratios]
    else:
        losses = [ratio.masked_fill(ratio.detach() == -torch.inf, 0.0) for ratio in ratios]
    return reduce_losses(sum(losses[1:], losses[0]) / len(losses), weight, reduction)


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
