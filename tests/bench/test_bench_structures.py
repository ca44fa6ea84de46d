"""The comparison with the formulas that hold a table of N x N: it checks before it times, and says what is wrong."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench import structures

SMALL = ["--n", "300", "--d", "16", "--rounds", "1"]


def test_everything_is_compared(capsys):
    assert structures.main(SMALL) == 0
    printed = capsys.readouterr().out
    for comparison in structures.comparisons():
        assert comparison.name.split(",")[0] in printed
    assert "wrong" not in printed


def test_a_wrong_result_has_no_time(monkeypatch, capsys):
    geometry = structures.comparisons()[0]
    wrong = dataclasses.replace(geometry, ours=lambda v, t: 1.01 * geometry.ours(v, t))
    monkeypatch.setattr(structures, "comparisons", lambda: [wrong])
    assert structures.main(SMALL) == 1
    assert "wrong" in capsys.readouterr().out


def test_promises_are_of_one_size(monkeypatch, capsys):
    """At N = 8,192, D = 256 a target that is missed is a failure; elsewhere nothing is promised."""
    monkeypatch.setattr(structures, "measure", lambda *arguments: (1.0, 45.0))
    monkeypatch.setattr(structures, "check", lambda *arguments: 0.0)
    assert structures.main(["--only", "geometric"]) == 1, "50 times are promised for equal weights"
    printed = capsys.readouterr().out
    assert "not kept" in printed and "40x, kept" in printed
    assert structures.main(["--only", "geometric", "--n", "512"]) == 0


def test_cyclips_formula_is_the_definition():
    v, t = structures.make_features(40, 8)
    from contrastive_kernels.reference import structure as reference_structure

    for cross, intra in ((1.0, 1.0), (1.0, 0.5)):
        want = reference_structure.geometric_consistency(v, t, cross=cross, intra=intra)
        torch.testing.assert_close(structures.cyclip(v, t, cross, intra), want)


@pytest.mark.parametrize("index", [[0, 1, 2], [1, 1, 1]])
def test_a_positive_among_the_draws_is_wrong(index):
    x, y = structures.make_features(3, 4)
    draws = structures.Comparison("sampled negatives", lambda x, y: torch.tensor(index), lambda x, y: x, trains=False)
    assert structures.check(draws, x, y) == 1.0
