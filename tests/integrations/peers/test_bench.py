"""The benchmark of the integrations, at its smallest sizes."""

from __future__ import annotations

import vision  # noqa: F401  (before the libraries)

from bench.__main__ import main


def test_every_library_is_compared(capsys):
    assert main(["--integrations", "--quick"]) == 0
    said = capsys.readouterr().out
    for name in ("ClipLoss", "SigLipLoss", "DCLLoss", "bank of 65,536", "Cached", "3 negatives", "metric_learning"):
        assert name in said
    assert "wrong" not in said and "left out" not in said
