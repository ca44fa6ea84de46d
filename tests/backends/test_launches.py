"""Launches and the host's time of a step on a GPU that is not there: what small batches consist of."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

TESTS = Path(__file__).resolve().parents[1]
#: Launches of value and all gradients at N = 256, the upstream gradient's included.
MOST_LAUNCHES = {"clip_loss": 11, "info_nce": 11, "nt_xent": 12, "sigmoid": 9, "decomposable": 9}

#: The host's time against that of CLIP's dense formula, with room for a machine that has other work.
MOST_TIME = 1.3


def test_a_small_step_is_few_launches():
    """In a process of its own: Triton's driver is one that starts nothing."""
    command = [sys.executable, str(TESTS / "mock_driver.py"), "--json", *MOST_LAUNCHES]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    for loss, most in MOST_LAUNCHES.items():
        print(
            f"{loss}: {found[loss]['launches']} launches, {found[loss]['host_us']:.0f} us of the host, "
            f"{found[loss]['of_dense']:.2f} of the dense formula's"
        )
        assert 5 < found[loss]["launches"] <= most, found[loss]
        assert found[loss]["ours"]["score_kernel"] == (1 if loss in ("sigmoid", "decomposable") else 2)
        assert found[loss]["of_dense"] < MOST_TIME, found[loss]


#: Launches of torch's own of a band of rows: normalisers, losses, gains, and the two products.
MOST_OF_A_BAND = 32


@pytest.mark.parametrize("loss, n, bands", [("info_nce", 16384, 3), ("clip_loss", 8256, 1)])
def test_a_band_is_few_launches(loss, n, bands):
    """Exponentials are kept: one kernel makes scores, one more weighs, whatever the number of bands; nothing runs."""
    import mock_driver

    from contrastive_kernels._triton import kept_launch, launch, persistent_launch

    ours: Counter[str] = Counter()

    def start(kernel, *arguments, **constants):
        ours[kernel.fn.__name__] += 1

    with (
        mock_driver.absent_gpu(),
        mock.patch.object(launch, "_launch", start),
        mock.patch.object(persistent_launch, "start", start),
        mock.patch.object(kept_launch, "start", start),
        mock.patch.object(persistent_launch, "multiprocessors", lambda device: 132),
    ):
        launches = mock_driver.count(loss, n, 768, workspace_bytes=2**28)
    twice = {name: count / 2 for name, count in ours.items()}  # (a first step, which is not counted, and the step)
    assert twice == {
        "dots_kernel": 1,
        "persistent_kernel": bands,
        "weigh_kept_kernel": bands,
        "rest_kernel": 2 * bands,
        "merge_kernel": 2 * bands,
    }
    assert launches.torch["addmm"] == 2 * bands
    poison = launches.torch["fill_"]  # of memory that nobody wrote, in tests alone
    assert launches.torch.total() - poison <= 50 + MOST_OF_A_BAND * bands
