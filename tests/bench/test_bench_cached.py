"""python -m bench.cached: its two steps are the same step, and both floors stand beside their ratio."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from bench import cached


@pytest.mark.parametrize("name", cached.MODELS)
def test_both_steps_have_the_same_gradients(name):
    model, views = cached.MODELS[name](7)
    model.double().eval()  # without dropout, whose numbers are drawn by chunk
    steps = cached.Steps(model, [view.double() if view.is_floating_point() else view for view in views], 3)
    found = []
    for step in (steps.plain, steps.cached):
        model.zero_grad()
        step()
        found.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert found[0].norm() > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


def test_a_line_has_the_ratio_and_its_floors():
    line = cached.measured("thin", 8, 4, 1)
    assert re.match(r"thin, 8 rows in chunks of 4: [\d.]+ ms, \d+\.\d\d of the plain step's [\d.]+ ms \(rounds ", line)
    assert re.search(r"floors \d\.\d\d with one more forward pass, \d+\.\d\d with the passes in chunks\)", line)
