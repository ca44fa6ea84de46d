"""What several tests of backends share: the CPU's pass by every instruction set of this machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from panels import instruction_sets


@pytest.fixture(params=instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Its name; undone afterwards."""
    from contrastive_kernels import _C

    _C.set_instruction_set(request.param)
    assert _C.instruction_set() == request.param
    yield request.param
    _C.set_instruction_set("auto")
