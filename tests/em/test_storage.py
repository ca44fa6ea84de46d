"""A memory in a folder: its files, what damage does to them, who may write and who may read."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import faults
import numpy as np
import pytest
import torch
from folders import FILES, check, make, names, values

import contrastive_kernels as ck

# The files


def test_numpy_reads_the_tables(tmp_path):
    memory = make(tmp_path / "a" / "b", 5, step=0.7, floor=0.1)
    folder = memory.storage
    assert names(folder) == FILES
    log_mean, visits = (np.load(folder / f"{name}.npy") for name in ("log_mean", "visits"))
    assert log_mean.dtype == np.float64 and visits.dtype == np.int32
    np.testing.assert_array_equal(log_mean, values(5).numpy())
    np.testing.assert_array_equal(visits, np.ones((5, 2)))
    assert json.loads((folder / "memory.json").read_text()) == {
        "format": "contrastive-kernels normalizer memory",
        "version": 1,
        "tables": {"log_mean.npy": "float64", "visits.npy": "int32"},
        "num_samples": 5,
        "directions": 2,
        "step": 0.7,
        "floor": 0.1,
    }


def test_tables_that_numpy_wrote_are_taken_up(tmp_path):
    make(tmp_path).close()
    np.save(tmp_path / "log_mean.npy", values(4).numpy() + 1)
    assert torch.equal(ck.NormalizerMemory.open(tmp_path).log_mean, values(4) + 1)


def test_nothing_of_it_needs_numpy(tmp_path):
    code = (
        "import sys; sys.modules['numpy'] = None\n"
        "import torch, contrastive_kernels as ck\n"
        f"memory = ck.NormalizerMemory(3, storage={str(tmp_path)!r})\n"
        "memory.update(torch.arange(3), torch.ones(3, 2)); memory.grow(5); memory.flush(); memory.close()\n"
        f"print(ck.NormalizerMemory.open({str(tmp_path)!r}, read_only=True).visits.sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "6"


def test_a_folder_is_taken_up_again_and_grows(tmp_path):
    memory = ck.NormalizerMemory(1000, storage=tmp_path)
    index = torch.tensor([0, 999, 314])
    for visit in range(1, 300):  # every byte of a count is used
        memory.update(index, torch.full((3, 2), float(visit)))
    log_mean, visits = memory.log_mean.clone(), memory.visits.clone()
    memory.close()
    again = ck.NormalizerMemory(1000, storage=tmp_path)
    assert torch.equal(again.log_mean, log_mean) and torch.equal(again.visits, visits)
    assert again.unvisited.tolist() == [997, 997] and again.cold
    for size in (1500, 2**20):
        again.grow(size)
        assert again.num_samples == size and again.unvisited.tolist() == [size - 3] * 2
        assert torch.equal(again.log_mean[:1000], log_mean) and torch.equal(again.visits[:1000], visits)
        assert again.visits[1000:].sum() == 0
    again.update(torch.tensor([2**20 - 1]), torch.ones(1, 2))
    again.close()
    assert ck.NormalizerMemory.open(tmp_path).unvisited.tolist() == [2**20 - 4] * 2
    assert np.load(tmp_path / "visits.npy").shape == (2**20, 2)


def test_opening_knows_sizes_and_rule(tmp_path):
    make(tmp_path, 3, 1, step=0.6, floor=0.2).close()
    memory = ck.NormalizerMemory.open(tmp_path)
    assert (memory.num_samples, memory.directions, memory.step, memory.floor) == (3, 1, 0.6, 0.2)
    memory.close()
    ck.NormalizerMemory(3, 1, step=0.9, storage=tmp_path).close()  # another rule from now on
    assert ck.NormalizerMemory.open(tmp_path).step == 0.9


@pytest.mark.parametrize("samples, directions, hint", [(4, 2, False), (8, 1, True), (2, 1, False), (2, 2, False)])
def test_other_sizes_are_named(tmp_path, samples, directions, hint):
    make(tmp_path, 4, 1).close()
    with pytest.raises(ValueError, match=rf"expected {samples} samples in {directions} .*got 4 in 1") as caught:
        ck.NormalizerMemory(samples, directions, storage=tmp_path)
    assert ("grow(8)" in str(caught.value)) == hint
    check(ck.NormalizerMemory.open(tmp_path), 4, 1)


def test_nothing_is_opened_where_nothing_is(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        ck.NormalizerMemory.open(tmp_path / "absent")
    for read_only in (False, True):
        with pytest.raises(FileNotFoundError, match=r"expected a memory.*memory\.json"):
            ck.NormalizerMemory.open(tmp_path, read_only=read_only)
    assert names(tmp_path) == []


def test_an_earlier_release_s_files_are_converted_as_documented(tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    log_mean, visits = torch.tensor([[1.5], [0.0], [2.5]]), torch.tensor([[2], [0], [3]], dtype=torch.int32)
    (old / "log_mean.bin").write_bytes(log_mean.numpy().tobytes())
    (old / "visits.bin").write_bytes(visits.numpy().tobytes())
    with pytest.raises(ValueError, match="neither samples nor directions"):
        ck.NormalizerMemory(3, 1, storage=old)
    assert names(old) == ["log_mean.bin", "visits.bin"]
    text = (Path(__file__).parents[2] / "docs" / "decomposable.md").read_text()
    snippet = text.split("<!-- old files -->\n```python\n")[1].split("```")[0]
    scope = {"old": old, "new": tmp_path / "new", "n": 3, "directions": 1, "torch": torch, "ck": ck}
    exec(snippet, scope)
    scope["memory"].close()
    memory = ck.NormalizerMemory.open(tmp_path / "new")
    assert torch.equal(memory.log_mean, log_mean.double()) and torch.equal(memory.visits, visits)
    assert memory.unvisited.tolist() == [1]


# Damage


def rewrite(path, edit):
    path.write_bytes(edit(path.read_bytes()))


def swap(folder):
    (folder / "log_mean.npy").rename(folder / "x")
    (folder / "visits.npy").rename(folder / "log_mean.npy")
    (folder / "x").rename(folder / "visits.npy")


def manifest(folder, **changes):
    path = folder / "memory.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def spoil(folder, name, value):
    table = np.load(folder / f"{name}.npy", mmap_mode="r+")
    table[2, 1] = value


def both(edit):
    return [lambda folder, name=name: edit(folder / f"{name}.npy") for name in ("log_mean", "visits")]


DAMAGE = {
    **{
        f"cut to {size} {k}": (case, r"expected .* got .*\.npy")
        for size in (0, 1, 9, 127, 128, 129, -1, -8)
        for k, case in enumerate(both(lambda path, size=size: rewrite(path, lambda data: data[:size])))
    },
    **{
        f"a byte more {k}": (case, r"expected \d+ bytes, .*; got \d+")
        for k, case in enumerate(both(lambda path: rewrite(path, lambda data: data + b"\0")))
    },
    **{f"missing {k}": (case, r"\.npy beside memory\.json; it is missing") for k, case in enumerate(both(os.unlink))},
    "other dtype": (lambda f: np.save(f / "log_mean.npy", np.zeros((4, 2), "f4")), r"expected <f8 \[4, 2\].*got <f4"),
    "big endian": (lambda f: np.save(f / "visits.npy", np.ones((4, 2), ">i4")), "expected <i4.*got >i4"),
    "other shape": (lambda f: np.save(f / "visits.npy", np.ones((8, 1), "i4")), r"<i4 \[4, 2\].*got <i4 \[8, 1\]"),
    "Fortran order": (lambda f: np.save(f / "log_mean.npy", np.ones((2, 4)).T), "Fortran"),
    "no header": (lambda f: rewrite(f / "log_mean.npy", lambda data: bytes(len(data))), "got no .npy"),
    "a torn header": (lambda f: rewrite(f / "visits.npy", lambda d: d[:20] + bytes(20) + d[40:]), "damaged header"),
    "swapped": (swap, r"expected <f8 \[4, 2\].*got <i4"),
    "no JSON": (lambda f: (f / "memory.json").write_text("{"), r"expected JSON.*memory\.json"),
    "empty JSON": (lambda f: (f / "memory.json").write_text(""), r"expected JSON.*memory\.json"),
    "binary JSON": (lambda f: (f / "memory.json").write_bytes(b"\xff\xfe\x00"), r"expected JSON"),
    "JSON of others": (lambda f: (f / "memory.json").write_text("[1]"), "expected the format"),
    "missing JSON": (lambda f: (f / "memory.json").unlink(), r"expected memory\.json beside log_mean\.npy"),
    "a later version": (lambda f: manifest(f, version=2), "expected version 1; got 2"),
    "other samples": (lambda f: manifest(f, num_samples=3), r"expected .f8 \[3, 2\].*got .f8 \[4, 2\]"),
    "other directions": (lambda f: manifest(f, directions=1), r"expected .f8 \[4, 1\].*got .f8 \[4, 2\]"),
    "samples of no kind": (lambda f: manifest(f, num_samples="4"), "num_samples: expected an int"),
    "directions of no kind": (lambda f: manifest(f, directions=2.0), "directions: expected 1 or 2"),
    "no step": (lambda f: manifest(f, step=None), "step: expected a number"),
    "other tables": (lambda f: manifest(f, tables={"log_mean.npy": "float32"}), "expected the tables.*float32"),
    "NaN": (lambda f: spoil(f, "log_mean", np.nan), "expected finite log means.*of sample 2"),
    "infinity": (lambda f: spoil(f, "log_mean", -np.inf), "expected finite log means.*of sample 2"),
    "negative visits": (lambda f: spoil(f, "visits", -1), "no negative visits.*of sample 2"),
}  # fmt: skip


@pytest.mark.parametrize("read_only", [False, True], ids=["write", "read"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_left_as_it_is(tmp_path, kind, read_only):
    make(tmp_path).close()
    damage, match = DAMAGE[kind]
    damage(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "lock"}
    if read_only and kind == "missing JSON":
        match = "expected a memory"
    with pytest.raises((ValueError, OSError), match=match):
        ck.NormalizerMemory(4, storage=tmp_path, read_only=read_only) if "JSON" in kind else ck.NormalizerMemory.open(
            tmp_path, read_only=read_only
        )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "lock"} == before


@pytest.mark.parametrize("name", ["log_mean.npy", "visits.npy", "memory.json", "lock"])
def test_links_are_not_followed(tmp_path, name):
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    make(folder).close()
    (folder / name).rename(elsewhere)
    (folder / name).symlink_to(elsewhere)
    before = elsewhere.read_bytes()
    for read_only in (False, True) if name != "lock" else (False,):
        with pytest.raises(OSError, match="symbolic links are not followed"):
            ck.NormalizerMemory(4, storage=folder, read_only=read_only)
    assert elsewhere.read_bytes() == before


def test_a_link_to_a_folder_or_in_a_draft_s_place_is_not_followed(tmp_path):
    make(tmp_path / "folder").close()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for call in (ck.NormalizerMemory.open, lambda f: ck.NormalizerMemory(4, storage=f)):
        with pytest.raises(OSError, match="symbolic links are not followed"):
            call(tmp_path / "link")
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    with pytest.raises(OSError, match="symbolic links are not followed"):
        ck.NormalizerMemory(4, storage=tmp_path / "nowhere")
    memory = ck.NormalizerMemory.open(tmp_path / "folder")
    (tmp_path / "folder" / "memory.json.new").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic links are not followed"):
        memory.grow(6)
    assert not (tmp_path / "victim").exists() and not (tmp_path / "absent").exists()
    check(memory)
    memory.grow(6)
    check(memory)


@pytest.mark.parametrize("name", ["log_mean.npy", "memory.json"])
def test_a_pipe_in_a_file_s_place_does_not_block(tmp_path, name):
    make(tmp_path).close()
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    for read_only in (False, True):
        with pytest.raises(OSError, match="regular file"):
            ck.NormalizerMemory(4, storage=tmp_path, read_only=read_only)


# Who writes, who reads


def test_a_second_writer_gets_an_error_at_once(tmp_path):
    memory = make(tmp_path)
    for call in (lambda: ck.NormalizerMemory(4, storage=tmp_path), lambda: ck.NormalizerMemory.open(tmp_path)):
        with pytest.raises(BlockingIOError, match=f"no other writer; got one in process {os.getpid()}.*read_only=True"):
            call()

    def another():
        with pytest.raises(BlockingIOError, match="no other writer"):
            ck.NormalizerMemory.open(tmp_path)

    assert faults.in_child(another) == 0
    check(memory)
    memory.close()
    ck.NormalizerMemory.open(tmp_path).close()


def test_the_lock_ends_with_the_memory(tmp_path):
    memory = make(tmp_path)
    table = memory.log_mean
    del memory
    gc.collect()
    check(ck.NormalizerMemory.open(tmp_path))
    assert torch.equal(table, values(4))  # still mapped
    with ck.NormalizerMemory.open(tmp_path):
        pass
    ck.NormalizerMemory.open(tmp_path).close()


def test_a_fork_neither_writes_nor_gives_the_lock_back(tmp_path):
    memory = make(tmp_path)

    def child():
        with pytest.raises(RuntimeError, match="fork"):
            memory.update(torch.arange(4), torch.zeros(4, 2))
        with pytest.raises(RuntimeError, match="fork"):
            memory.grow(9)
        assert memory.read(torch.arange(4))[1].sum() == 8
        memory.close()

    assert faults.in_child(child) == 0
    with pytest.raises(BlockingIOError, match="no other writer"):
        ck.NormalizerMemory.open(tmp_path)
    check(memory)


def test_the_lock_is_given_back_while_a_fork_lives(tmp_path):
    """Which has the locked file open, as a data loader's workers have."""
    memory = make(tmp_path)
    waits, ends = os.pipe()

    def child():
        os.close(ends)
        os.read(waits, 1)

    alive = faults.fork(child)
    try:
        memory.close()
        check(ck.NormalizerMemory.open(tmp_path))
    finally:
        os.close(ends)
        os.close(waits)
        assert faults.wait(alive) == 0


def test_a_closed_memory_says_so(tmp_path):
    memory = make(tmp_path)
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(tmp_path) in maps.read_text()
    memory.close()
    memory.close()
    assert not maps.exists() or str(tmp_path) not in maps.read_text()
    index = torch.arange(4)
    for call in (
        lambda: memory.read(index),
        lambda: memory.update(index, torch.zeros(4, 2)),
        lambda: memory.grow(9),
        lambda: memory.rescale(2.0),
        lambda: memory.state_dict(),
        lambda: memory.statistics(),
        lambda: memory.flush(),
        lambda: memory.load_state_dict(ck.NormalizerMemory(4).state_dict()),
    ):
        with pytest.raises(RuntimeError, match="closed"):
            call()
    in_memory = ck.NormalizerMemory(4)
    in_memory.flush()
    in_memory.close()
    in_memory.read(index)


def test_another_process_reads_what_is_written(tmp_path):
    memory = make(tmp_path)
    ask, asked = os.pipe()
    answer, answered = os.pipe()

    def reader():
        view = ck.NormalizerMemory.open(tmp_path, read_only=True)
        check(view)
        index = torch.arange(4)
        for call in (
            lambda: view.update(index, torch.zeros(4, 2)),
            lambda: view.grow(9),
            lambda: view.rescale(2.0),
            lambda: view.load_state_dict(memory.state_dict()),
        ):
            with pytest.raises(RuntimeError, match="read_only"):
                call()
        os.write(answered, b"r")
        os.read(ask, 1)
        assert (view.read(index)[0] == 7).all() and (view.visits == 2).all()
        view.log_mean[0] = -1.0  # goes to a page of its own

    child = faults.fork(reader)
    os.read(answer, 1)
    memory.floor = 1.0
    memory.update(torch.arange(4), torch.full((4, 2), 7.0))
    memory.grow(5000)
    os.write(asked, b"w")
    assert faults.wait(child) == 0
    assert (memory.log_mean[:4] == 7).all() and (np.load(tmp_path / "log_mean.npy")[:4] == 7).all()


def test_two_processes_lose_no_visits(tmp_path):
    """They take turns: who finds the folder locked waits."""
    make(tmp_path, 3, 1).close()

    def work():
        for _ in range(10):
            while True:
                try:
                    memory = ck.NormalizerMemory.open(tmp_path)
                    break
                except BlockingIOError:
                    time.sleep(0.001)
            memory.update(torch.arange(3), torch.zeros(3, 1))
            memory.close()

    children = [faults.fork(work) for _ in range(2)]
    assert [faults.wait(child) for child in children] == [0, 0]
    assert (ck.NormalizerMemory.open(tmp_path).visits == 21).all()
