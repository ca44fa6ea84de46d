"""What holds for every test: memory that nobody wrote is NaN; and fixtures of several."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from poison import PLACES, poisoned
from problems import CPU_BACKENDS

import contrastive_kernels as ck


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills the float tensors of torch.empty with NaN."""
    for owner, name in PLACES:
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(params=CPU_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """The name of a backend of CPU tensors that is here."""
    reason = ck.why_not(request.param, torch.zeros(1, 1))
    if reason is not None:
        pytest.skip(reason)
    name: str = request.param
    return name


@pytest.fixture
def set_threads() -> Any:
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
