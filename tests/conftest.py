"""What holds for every test: memory that nobody wrote is NaN; and fixtures of several.

The only conftest.py: with --doctest-modules a second one takes its name, and whichever comes later is not collected."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

# Before OpenMP is loaded: threads that wait for each other on a busy machine would spin, four fifths of the time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from panels import instruction_sets
from poison import PLACES, poisoned
from problems import CPU_BACKENDS

import contrastive_kernels as ck

#: Without Hypothesis nothing of the fuzzer is collected, and the header says so.
FUZZ = importlib.util.find_spec("hypothesis") is not None
collect_ignore = [] if FUZZ else ["fuzz"]


def pytest_report_header() -> str | None:
    """Says where the fuzzer is left out."""
    return None if FUZZ else "fuzz: left out, Hypothesis is not installed"


@pytest.fixture
def share(request: pytest.FixtureRequest) -> float:
    """A test's part of FUZZ_SECONDS; 0 without: the fixed examples."""
    from fuzzing import SECONDS

    return SECONDS / max(sum("share" in getattr(item, "fixturenames", ()) for item in request.session.items), 1)


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


@pytest.fixture(params=instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of an instruction set of the CPU's pass that this machine has."""
    from contrastive_kernels import _C

    _C.set_instruction_set(request.param)
    assert _C.instruction_set() == request.param
    yield request.param
    _C.set_instruction_set("auto")
