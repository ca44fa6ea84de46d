"""Indices from the user, checked without a synchronisation on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import define

__all__ = ["checked_index"]


def _checked_index(index: Tensor, columns: int, allow_missing: bool) -> Tensor:
    """The indices as int64, checked: a ValueError on the CPU, a device-side assertion elsewhere."""
    lowest = -1 if allow_missing else 0
    outside = ((index < lowest) | (index >= columns)).any()
    if index.device.type != "cpu":
        torch._assert_async(~outside, "positives: an index lies outside the columns of y")
    elif outside:
        raise ValueError(
            f"positives: expected indices in [{lowest}, {columns}); "
            f"got values in [{int(index.min())}, {int(index.max())}]"
        )
    return index.to(torch.int64, copy=True)


def _checked_index_fake(index, columns, allow_missing):  # type: ignore[no-untyped-def]
    return index.new_empty(index.shape, dtype=torch.int64)


checked_index = define(
    "checked_index(Tensor index, SymInt columns, bool allow_missing) -> Tensor", _checked_index_fake, _checked_index
)
