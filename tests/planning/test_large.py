"""A plan of more rows than any machine holds takes no longer than one of some thousands: calls are counted."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from types import FrameType
from typing import Any

import pytest
import torch

import contrastive_kernels as ck
from contrastive_kernels.panels import size as shapes
from contrastive_kernels.planning.costs import LOSSES

#: A GPU's shapes are found by trying some hundreds of sides.
MOST_CALLS = {"cpu": 2_000, "cuda": 150_000}


def calls(function: Callable[[], Any]) -> int:
    """Calls of functions, in Python and in C, that a call makes."""
    count = 0

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")
        if count > 10 * max(MOST_CALLS.values()):
            sys.setprofile(None)
            pytest.fail("the plan takes ever more calls")

    shapes.wave_shape.cache_clear()
    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_calls_do_not_grow_with_rows(device, loss):
    options: dict[str, Any] = {"d": 1000, "device": device, "loss": loss, "backend": "torch"}
    if device == "cuda":
        options["capability"] = 90
    for options["dtype"] in (torch.float32, torch.bfloat16):
        ck.plan(8, **options)  # imports and caches
        few, many = (calls(lambda n=n: ck.plan(n, **options)) for n in (10**8, 10**15))
        assert many <= MOST_CALLS[device]
        assert many <= 1.2 * few


def test_the_chosen_backend_of_a_gpu_too():
    options: dict[str, Any] = {"device": "cuda", "capability": 90, "dtype": torch.bfloat16}
    ck.plan(8, **options)
    assert calls(lambda: ck.plan(10**12, **options)) <= MOST_CALLS["cuda"]


def test_sides_are_those_that_cut_evenly():
    """Without gaps up to 8,000, by a 64th at most above, the largest that fits first."""
    for n in (1, 64, 65, 1000, 65536, 10**6):
        every = [-(-n // count) for count in range(1, -(-n // 64) + 1)]
        every = sorted({-(-side // 64) * 64 for side in every}, reverse=True)
        assert [s for s in shapes._sides(n, float("inf")) if s <= 8000] == [s for s in every if s <= 8000]
        assert next(shapes._sides(n, float("inf"))) == every[0]
        assert next(shapes._sides(n, 700.0)) == next(s for s in every if s <= 700)
    n = 10**15
    sides = list(shapes._sides(n, float("inf")))
    assert len(sides) < 3000
    for a, b in pairwise(sides):  # one block more makes them smaller by a * a / n
        assert a - b <= max(a / 32, 64, a * a / n + 64)
