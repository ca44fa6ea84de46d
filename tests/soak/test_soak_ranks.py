"""Many steps over the ranks of a group: neither memory nor open files grow. `make soak` is the long form."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from launch import run, succeeded
from torch import distributed as dist

import contrastive_kernels as ck

#: Half of the calls of the long form; 0: the short one.
STEPS = int(os.environ.get("SOAK_CALLS") or 0) // 2
MIB = 2**20


def resident() -> int:
    """Bytes of this process's memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def steps(count: int) -> list[tuple[int, int]]:
    """(memory, open files) after a fifth of the steps, two fifths, ..."""
    loss, found = ck.DatasetContrastiveLoss(50), []
    index = torch.arange(8) + 8 * dist.get_rank()
    for step in range(count):
        x, y = (torch.randn(8, 16, requires_grad=True) for _ in range(2))
        for strategy in ("replicated", "strips", "grid", "ring"):
            ck.clip_loss(x, y, 5.0, group="world", strategy=strategy).backward()
        ck.sigmoid(x, y, 5.0, -5.0, group="world").backward()
        loss(x, y, index, 5.0).backward()
        ck.hardest_negatives(x, y, group="world")
        if (step + 1) % (count // 5) == 0:
            found.append((resident(), len(os.listdir("/proc/self/fd"))))
    return found


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_steps_leave_nothing_behind(tmp_path):
    for found in succeeded(run(2, steps, tmp_path, max(STEPS, 100), seconds=120 + STEPS / 20)):
        (early, files), (late, files_at_last) = found[1], found[-1]
        assert files_at_last == files
        assert late - early < 4 * MIB, f"{(late - early) / MIB:.1f} MiB more"


def begin_anew(folder: str, times: int) -> list[int]:
    """Open files after every group that was made, used by a grid, and destroyed."""
    dist.destroy_process_group()
    found, rank = [], int(os.environ["RANK"])
    for i in range(times):
        dist.init_process_group("gloo", init_method=f"file://{folder}/{i}", rank=rank, world_size=4)
        x = torch.randn(3, 4, requires_grad=True)
        ck.clip_loss(x, x.detach(), 5.0, group="world", strategy="grid").backward()
        dist.destroy_process_group()
        found.append(len(os.listdir("/proc/self/fd")))
    dist.init_process_group("gloo", init_method=f"file://{folder}/last", rank=rank, world_size=4)
    return found


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_groups_that_end_are_let_go(tmp_path):
    for found in succeeded(run(4, begin_anew, tmp_path, str(tmp_path), 5)):
        assert found[-1] <= found[1], found
