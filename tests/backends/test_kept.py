"""Exponentials that are kept in 16 bits: what their rounding does to gradients, simulated."""

from __future__ import annotations

from exponentials import NOTEBOOK, parts_of_the_rule


def test_rounded_twice_the_gradients_keep_the_rule():
    """Those of the features; that of the scale does not, unless its sums are taken before anything is rounded."""
    for temperature in (0.07, 0.01):
        found = parts_of_the_rule(1024, temperature)
        of_features = [part for name, part in found.items() if name.startswith(("dx", "dy"))]
        row = f"| 1,024 | {temperature} | {' | '.join(f'{part:.2g}' for part in of_features)} |"
        assert row in NOTEBOOK.read_text(), "python tests/exponentials.py --write"
        assert max(found["dx, twice"], found["dy, twice"]) < 1 / 8
        assert found["dscale, of sums"] < 1e-3
    assert found["dscale, of exponentials"] > 1
