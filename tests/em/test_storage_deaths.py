"""A memory in a folder: what a full disk, a failing call or a death leave of it."""

from __future__ import annotations

import gc
import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import time

import faults
import numpy as np
import pytest
import torch
from folders import FILES, check, make, names, values
from torch.utils._python_dispatch import TorchDispatchMode

import contrastive_kernels as ck

# Full disks


@pytest.mark.parametrize("reserves", [True, False])
def test_space_is_taken_by_the_constructor(tmp_path, monkeypatch, reserves):
    if not reserves:
        monkeypatch.setattr(os, "posix_fallocate", lambda *a: (_ for _ in ()).throw(OSError(95, "no")), raising=False)
    memory = ck.NormalizerMemory(200_000, storage=tmp_path)
    for size in (200_000, 400_000):
        for name, width in (("log_mean", 8), ("visits", 4)):
            file = (tmp_path / f"{name}.npy").stat()
            assert file.st_size == 128 + 2 * width * size and file.st_blocks * 512 >= file.st_size
        memory.grow(400_000)
    assert memory.visits.sum() == 0


def test_a_full_disk_is_an_error_of_the_constructor_and_of_growth(tmp_path):
    """A file system of a megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode
    ):
        pytest.skip("mounting a tmpfs is not permitted")
    try:
        with pytest.raises(OSError, match=r"room for \d+ bytes.*space"):
            ck.NormalizerMemory(10**5, storage=disk / "large")
        assert names(disk) == []
        memory = make(disk / "small", 1000)
        with pytest.raises(OSError, match="room"):
            memory.grow(10**5)
        check(memory, 1000)
        memory.grow(2000)
        check(memory, 1000)
        memory.close()
        (disk / "rest").write_bytes(b"")
        with pytest.raises(OSError), open(disk / "rest", "wb") as rest:
            while True:
                rest.write(bytes(4096))
                rest.flush()
        memory = ck.NormalizerMemory.open(disk / "small")  # of a full disk
        memory.update(torch.arange(2000), torch.ones(2000, 2))
        with pytest.raises(OSError):
            memory.grow(2001)
        assert memory.num_samples == 2000
        memory.close()
        assert (ck.NormalizerMemory.open(disk / "small", read_only=True).visits > 0).all()
    finally:
        del memory
        gc.collect()
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_limit_of_file_sizes_is_an_error(tmp_path):
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(OSError, match="room"):
            ck.NormalizerMemory(10**4, storage=tmp_path / "large")
        assert names(tmp_path) == []
        memory = make(tmp_path / "small", 1000)
        with pytest.raises(OSError, match="room"):
            memory.grow(10**4)
        check(memory, 1000)
        memory.close()
        check(ck.NormalizerMemory.open(tmp_path / "small"), 1000)

    assert faults.in_child(limited) == 0


#: What taking things back needs.
REMOVING = ("open", "unlink")


@pytest.mark.parametrize("from_then_on", [False, True])
def test_a_constructor_that_fails_leaves_nothing(tmp_path, from_then_on):
    """Whatever system call it is that fails first, and if all later ones do (but those that remove)."""
    failed = 0
    for number in range(faults.count(lambda: ck.NormalizerMemory(4, storage=tmp_path / "whole"))):
        folder = tmp_path / f"{number}" / "memory"
        calls = [(module, name) for module, name in faults.CALLS if not (from_then_on and name in REMOVING)]
        try:
            with faults.before_calls(faults.at_call(number, faults.disk_full, from_then_on), calls):
                ck.NormalizerMemory(4, storage=folder)
        except OSError:
            failed += 1
            assert not folder.parent.exists(), number
        else:  # a call whose failure does no harm
            assert names(folder) == FILES
    assert failed > 8


def test_an_option_that_does_not_fit_leaves_nothing(tmp_path):
    for options in ({"shape": 0.0}, {"weights": "mean"}, {"step": 2.0}, {"directions": 3}, {"backend": "none"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            ck.DatasetContrastiveLoss(10, storage=tmp_path / "folder", **options)
    assert names(tmp_path) == []


@pytest.mark.parametrize("from_then_on", [False, True])
def test_growth_that_fails_changes_nothing(tmp_path, from_then_on):
    """Whatever system call it is that fails first, and if all later ones do."""
    failed, whole = 0, make(tmp_path / "whole")
    for number in range(faults.count(lambda: whole.grow(3000))):
        folder = tmp_path / f"{number}"
        memory = make(folder)
        try:
            with faults.before_calls(faults.at_call(number, faults.disk_full, from_then_on)):
                memory.grow(3000)
        except OSError:
            failed += 1
            assert memory.num_samples == 4
        else:
            assert memory.num_samples == 3000
        check(memory)
        memory.update(torch.arange(4), values(4))
        size = memory.num_samples
        memory.close()
        again = ck.NormalizerMemory.open(folder)
        assert again.num_samples == size and (again.visits[:4] == 2).all()
        again.grow(4000)
        assert np.load(folder / "log_mean.npy").shape == (4000, 2)
    assert failed > 8


def test_growth_that_finds_no_memory_to_map_changes_nothing(tmp_path):
    memory = make(tmp_path)
    with pytest.raises((OSError, ValueError, OverflowError)):
        memory.grow(2**61)
    check(memory)
    assert ck.NormalizerMemory.open(tmp_path, read_only=True).num_samples == 4
    memory.grow(6)
    check(memory)


# Deaths


def killed(action, number):
    """Whether an action in a child of its own came to its system call of that number, where it is killed."""

    def child():
        with faults.before_calls(faults.at_call(number, faults.kill)):
            action()

    code = faults.in_child(child)
    assert code in (0, -signal.SIGKILL)
    return code != 0


def test_a_death_in_the_constructor_leaves_a_folder_that_can_be_used(tmp_path):
    for number in itertools.count():
        folder = tmp_path / f"{number}"
        died = killed(lambda folder=folder: ck.NormalizerMemory(4, storage=folder), number)
        make(folder).close()
        check(ck.NormalizerMemory.open(folder))
        assert names(folder) == FILES
        if not died:
            break
    assert number > 8


def test_a_death_in_growth_leaves_the_old_size_or_the_new_one(tmp_path):
    sizes, died = [], True
    while died:
        folder = tmp_path / f"{len(sizes)}"
        make(folder).close()
        before = faults.count(lambda folder=folder: ck.NormalizerMemory.open(folder).close())
        died = killed(lambda folder=folder: ck.NormalizerMemory.open(folder).grow(3000), before + len(sizes))
        view = ck.NormalizerMemory.open(folder, read_only=True)  # before anybody has repaired anything
        check(view)
        memory = ck.NormalizerMemory.open(folder)
        check(memory)
        assert view.num_samples == memory.num_samples
        sizes.append(memory.num_samples)
        memory.grow(5000)
        check(memory)
        assert names(folder) == FILES and np.load(folder / "visits.npy").shape == (5000, 2)
    assert len(sizes) > 12 and sizes == sorted(sizes) and set(sizes) == {4, 3000}


def test_a_death_while_growth_is_taken_back_does_not_matter(tmp_path):
    """The folder is left by a process that died in growth, and the one that takes that back dies as well."""
    torn = tmp_path / "torn"
    make(torn).close()
    before = faults.count(lambda: ck.NormalizerMemory.open(torn).close())
    assert killed(lambda: ck.NormalizerMemory.open(torn).grow(3000), before + 10)
    assert "growing_to" in (torn / "memory.json").read_text() and (torn / "log_mean.npy").stat().st_size > 3000
    for number in itertools.count():
        folder = tmp_path / f"{number}"
        shutil.copytree(torn, folder)
        died = killed(lambda folder=folder: ck.NormalizerMemory.open(folder), number)
        check(ck.NormalizerMemory.open(folder))
        if not died:
            break
    assert number > 12


class Dies(TorchDispatchMode):
    """Within it the process is killed before its operation of that number; of -1 operations are only counted."""

    def __init__(self, number=-1):
        super().__init__()
        self.number, self.done = number, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self.done == self.number:
            faults.kill()
        self.done += 1
        return function(*args, **(kwargs or {}))


def test_a_death_at_any_operation_of_an_update_leaves_no_visit_without_its_mean(tmp_path):
    def visit(memory, number):
        memory.update(torch.arange(4), torch.full((4, 2), float(number)))

    def die(folder, number):
        memory = ck.NormalizerMemory.open(folder)
        with Dies(number):
            visit(memory, 2)

    with Dies() as whole:
        visit(ck.NormalizerMemory(4), 1)
    visits = []
    for number in range(whole.done - 16, whole.done + 1):  # from before the writes to the end
        folder = tmp_path / f"{number}"
        with ck.NormalizerMemory(4, storage=folder, floor=1.0) as memory:  # a visit replaces the mean
            visit(memory, 1)
        faults.in_child(lambda folder=folder, number=number: die(folder, number))
        with ck.NormalizerMemory.open(folder) as memory:
            behind = memory.log_mean - memory.visits
            assert ((behind == 0) | (behind == 1)).all()
            visits.append(memory.visits.unique().tolist())
    assert [1] in visits and [2] in visits


@pytest.mark.parametrize("what", ["update", "grow"])
def test_a_process_that_is_killed_at_any_time_leaves_every_sample_before_or_after_a_visit(tmp_path, what):
    def work(folder, started):
        memory = ck.NormalizerMemory.open(folder)
        memory.floor = 1.0  # a visit replaces the mean
        for visit in itertools.count(1):
            n = memory.num_samples
            memory.update(torch.arange(n), torch.full((n, 2), float(visit)))
            if what == "grow":
                memory.grow(n + 997)
            os.write(started, b".")

    generator = random.Random(0)
    ck.NormalizerMemory(2).update(torch.arange(2), torch.zeros(2, 2))  # imports for seconds, which no child does then
    for attempt in range(max(8, int(os.environ.get("SOAK_CALLS") or 0) // 100)):
        folder = tmp_path / f"{attempt}"
        ck.NormalizerMemory(20_000, storage=folder).close()
        start, started = os.pipe()
        child = faults.fork(lambda folder=folder, started=started: work(folder, started))
        os.read(start, 1)
        time.sleep(0.1 * generator.random())
        os.kill(child, signal.SIGKILL)
        assert faults.wait(child) == -signal.SIGKILL
        memory = ck.NormalizerMemory.open(folder)
        visits, last = memory.visits.double(), memory.visits[0, 0].item()
        assert last > 0 and (what == "update") == (memory.num_samples == 20_000)
        if what == "update":
            behind = memory.log_mean - visits
            assert ((behind == 0) | (behind == 1)).all() and visits.max() - visits.min() <= 1
        else:  # a sample that came later was met from then on
            met = memory.visits > 0
            assert (memory.log_mean[met] >= last - 1).all() and (memory.log_mean <= last + 1).all()
        os.close(start)
        os.close(started)
        memory.close()
        shutil.rmtree(folder)
