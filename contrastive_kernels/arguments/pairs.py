"""What the user says of pairs: ids of rows and of columns, and what is added to the logits of a candidate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..panels.pairs import Pairs
from .checks import check_dense, check_vector, is_number, shown
from .reduction import row_weights

__all__ = [
    "check_ids",
    "check_labels",
    "check_smoothing",
    "pairs_of",
    "pairs_of_samples",
    "require_alone",
    "require_one_rank",
    "with_biases",
    "without_padding",
]

#: More than a rank has views.
_VIEWS = 2**40
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)


def check_ids(ids: Any, name: str, x: Tensor, y: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Ids of rows [N] and of columns [M] as int64, from one tensor for both or a pair; (None, None) from None."""
    if ids is None:
        return None, None
    pair = (ids, ids) if isinstance(ids, Tensor) else ids
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(each, Tensor) for each in pair):
        raise TypeError(
            f"{name}: expected None, a tensor of ids [N], or a pair of them [N], [M]; got {type(ids).__name__}"
        )
    return _integers(pair[0], name, "ids", x), _integers(pair[1], name, "ids", y)


def _integers(ids: Tensor, name: str, what: str, x: Tensor) -> Tensor:
    """One for each row of x, as int64."""
    check_dense(ids, name)
    if ids.dtype not in _INTEGERS:
        raise TypeError(f"{name}: expected integer {what}; got {ids.dtype}")
    if ids.shape != (x.shape[0],):
        raise ValueError(f"{name}: expected {what} of shape [{x.shape[0]}]; got {list(ids.shape)}")
    if ids.device != x.device:
        raise ValueError(f"{name}: expected device {x.device}; got {ids.device}")
    return ids.to(torch.int64).contiguous()


def check_labels(labels: Any, name: str, x: Tensor) -> Tensor:
    """Labels of the rows of x [N], as int64."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name}: expected a tensor of integer labels [N]; got {type(labels).__name__}")
    return _integers(labels, name, "labels", x)


def pairs_of(ids: Any, candidate_bias: Any, x: Tensor, y: Tensor) -> Pairs:
    """What ids, and biases [M] of the candidates y [M, D], say of a loss's pairs."""
    bias = None if candidate_bias is None else _checked_bias(candidate_bias, x, y)
    return Pairs.of((bias, *check_ids(ids, "ids", x, y)))


def with_biases(pairs: Pairs, candidate_bias: Any, x: Tensor, y: Tensor) -> Pairs:
    """The same pairs of x [N, D] and y [M, D] with biases [M] of the candidates."""
    return Pairs.of((_checked_bias(candidate_bias, x, y), *pairs.tensors[1:]))


def _checked_bias(value: Any, x: Tensor, y: Tensor) -> Tensor:
    return check_vector(value, "candidate_bias", y.shape[0], x, differentiable=True)


def pairs_of_samples(ids: Any, candidate_bias: Any, x: Tensor, by_row: bool = False, rank: int = 0) -> Pairs:
    """What ids and biases of samples x [N, D] say of the pairs of their 2 N views.

    With biases, or scales by row, the matrix is not symmetric, and it is ids that leave out every view's own column,
    others on every rank.
    """
    if ids is not None and not isinstance(ids, Tensor):
        raise TypeError(f"ids: expected None or a tensor of the samples' ids [N]; got {type(ids).__name__}")
    bias, of_views, *_ = pairs_of(ids, candidate_bias, x, x).tensors
    if of_views is not None:
        of_views = of_views.repeat(2)
    elif bias is not None or by_row:
        of_views = torch.arange(2 * x.shape[0], dtype=torch.int64, device=x.device) + rank * _VIEWS
    return Pairs.of((None if bias is None else bias.repeat(2), of_views, of_views))


def without_padding(
    x: Tensor, y: Tensor, pairs: Pairs, offset: int | None, index: Tensor | None, weight: Any
) -> tuple[Tensor, Tensor, Any]:
    """x, y and the weights of rows [N], of candidates whose bias may be -inf: these are padding.

    Nobody reads their features, which may be NaN: zeros stand there, without gradient. A row whose own positive is
    padding has weight 0, and zeros too.
    """
    bias, *_ = pairs.tensors
    if bias is None:
        return x, y, weight
    padding = bias.detach() == -torch.inf
    if index is not None:
        idle = padding[index.clamp(min=0)] & (index >= 0)
    elif offset is not None:
        idle = padding[offset : offset + x.shape[0]]
    else:
        idle = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
    weights = row_weights(weight, x.shape[0], x)
    if weights is None:
        weights = torch.ones(x.shape[0], dtype=bias.dtype, device=x.device)
    x, y = x.masked_fill(idle[:, None], 0.0), y.masked_fill(padding[:, None], 0.0)
    return x, y, weights.masked_fill(idle, 0.0)


def check_smoothing(label_smoothing: Any, include_positive: bool) -> None:
    """A share of the target, of a loss whose denominator has the positive."""
    if not is_number(label_smoothing):
        raise TypeError(f"label_smoothing: expected a number; got {type(label_smoothing).__name__}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected a number from 0 to 1; got {shown(label_smoothing)}")
    if label_smoothing and not include_positive:
        raise ValueError("label_smoothing: expected 0 with include_positive=False, whose target is no distribution")


def require_one_rank(ranks: object, name: str) -> None:
    """The same of a member of a loss."""
    if ranks is not None:
        raise NotImplementedError(
            f"{name}: not there over the ranks of a process group. group=None computes the loss of this process's rows:"
            " gather the others' with their gradients"
        )


def require_alone(ranks: object, candidate_bias: object) -> None:
    """What ranks of a process group cannot share yet; leaving it out silently would train another loss."""
    if ranks is not None and candidate_bias is not None:
        raise NotImplementedError(
            f"candidate_bias: expected None in a process group; got {type(candidate_bias).__name__}. group=None "
            "computes the loss of this process's rows: gather the others' with their gradients"
        )
