"""What the user says of single pairs: ids of rows and of columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..panels.pairs import Pairs
from .checks import check_dense

__all__ = ["check_ids", "pairs_of_ids", "pairs_of_samples"]

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_ids(ids: Any, name: str, x: Tensor, y: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Ids of rows [N] and of columns [M] as int64, from one tensor for both or a pair; (None, None) from None."""
    if ids is None:
        return None, None
    pair = (ids, ids) if isinstance(ids, Tensor) else ids
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(each, Tensor) for each in pair):
        raise TypeError(
            f"{name}: expected None, a tensor of ids [N], or a pair of them [N], [M]; got {type(ids).__name__}"
        )
    for each, length in zip(pair, (x.shape[0], y.shape[0])):
        check_dense(each, name)
        if each.dtype not in _INTEGERS:
            raise TypeError(f"{name}: expected integer ids; got {each.dtype}")
        if each.shape != (length,):
            raise ValueError(f"{name}: expected ids of shape [{length}]; got {list(each.shape)}")
        if each.device != x.device:
            raise ValueError(f"{name}: expected device {x.device}; got {each.device}")
    return pair[0].to(torch.int64).contiguous(), pair[1].to(torch.int64).contiguous()


def pairs_of_ids(ids: Any, x: Tensor, y: Tensor) -> Pairs:
    """What a loss's ids say of the pairs of x [N, D] and y [M, D]."""
    row_ids, col_ids = check_ids(ids, "ids", x, y)
    return Pairs(row_ids=row_ids, col_ids=col_ids)


def pairs_of_samples(ids: Any, x: Tensor) -> Pairs:
    """What the ids of samples x [N, D] say of the pairs of their 2 N views."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"ids: expected None or a tensor of the samples' ids [N]; got {type(ids).__name__}")
    of_samples, _ = check_ids(ids, "ids", x, x)
    assert of_samples is not None
    of_views = torch.cat([of_samples, of_samples])
    return Pairs(row_ids=of_views, col_ids=of_views)
