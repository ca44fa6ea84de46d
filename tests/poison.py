"""Memory that nobody wrote is NaN: whoever leaves a part of a result unwritten is found out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["PLACES", "poisoned"]

#: What makes tensors of memory as it is: (owner, name).
PLACES = (*((torch, name) for name in ("empty", "empty_like", "empty_strided")), (torch.Tensor, "new_empty"))


def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`make`, with NaN in what it returns."""

    @functools.wraps(make)
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = make(*args, **kwargs)
        with torch.no_grad():  # it may be a leaf that requires a gradient
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    return wrapper
