"""Losses on drawn problems, put in drawn ways, against the reference in float64."""

from __future__ import annotations

from asked import assert_right
from drawn import loss_cases
from fuzzing import fuzzed


@fuzzed(80, case=loss_cases())
def test_losses(case):
    """Value and gradients of every loss."""
    assert_right(*case)
