"""What holds for every test: memory that nobody wrote is NaN."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch


def _poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`make`, with NaN in what it returns."""

    @functools.wraps(make)
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = make(*args, **kwargs)
        with torch.no_grad():  # it may be a leaf that requires a gradient
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    return wrapper


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills the float tensors of torch.empty with NaN: whoever leaves a part of a result unwritten is found out."""
    for owner, names in ((torch, ("empty", "empty_like", "empty_strided")), (torch.Tensor, ("new_empty",))):
        for name in names:
            monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture
def set_threads() -> Any:
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
