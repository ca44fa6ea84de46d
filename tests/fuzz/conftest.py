"""Without Hypothesis nothing is collected here, and the header says so."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

MISSING = importlib.util.find_spec("hypothesis") is None
collect_ignore = [path.name for path in Path(__file__).parent.glob("*.py")] if MISSING else []


def pytest_report_header() -> str | None:
    """Says that the fuzzer is left out."""
    return "fuzz: left out, Hypothesis is not installed" if MISSING else None


@pytest.fixture
def share(request: pytest.FixtureRequest) -> float:
    """A test's part of FUZZ_SECONDS; 0 without: the fixed examples."""
    from fuzzing import SECONDS

    return SECONDS / max(sum("share" in getattr(item, "fixturenames", ()) for item in request.session.items), 1)
