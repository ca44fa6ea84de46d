"""Files of the examples that are damaged, cut short, refused by the system, or shared: same data, or a plain word."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

np = pytest.importorskip("numpy")
for module in ("matplotlib", "PIL", "rich"):
    pytest.importorskip(module)

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import files  # noqa: E402
import glyphs  # noqa: E402
import options  # noqa: E402
import structures  # noqa: E402
import train_clip  # noqa: E402


def refuse(error):
    def refused(*_, **__):
        raise OSError(error, os.strerror(error))

    return refused


def damaged(content, seed):
    """A content with a byte flipped, some cut, inserted or zeroed, or the end lost, at a random place."""
    draw = random.Random(seed)
    start, count = draw.randrange(len(content)), draw.choice((1, 1, 7, 50, 700))
    end = min(len(content), start + count)
    kind = ("flip", "cut", "insert", "zero", "end")[seed % 5]
    if kind == "flip":
        middle = bytes(byte ^ (1 << draw.randrange(8)) for byte in content[start:end])
    else:
        middle = {"insert": draw.randbytes(count) + content[start:end], "zero": bytes(end - start)}.get(kind, b"")
    return content[:start] + middle + (b"" if kind == "end" else content[end:])


@pytest.fixture(scope="module")
def data():
    """Noise under the names of letters."""
    numbers = np.array([*range(0x41, 0x5B), *range(0x3B1, 0x3CA), *range(0x430, 0x450)])
    images = np.random.default_rng(0).integers(0, 256, (2 * len(numbers), 32, 32), dtype=np.uint8)
    character = np.repeat(np.arange(len(numbers)), 2)
    return glyphs.GlyphData(images, character, np.tile([0, 1], len(numbers)), numbers)


# One file


@pytest.mark.parametrize("moment", ["fsync", "replace"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS])
def test_a_refused_write_leaves_the_old_file_alone(tmp_path, monkeypatch, moment, error):
    path = tmp_path / "a" / "file"
    files.write_sealed(path, b"old")
    monkeypatch.setattr(os, moment, refuse(error))
    with pytest.raises(OSError, match=rf"{os.strerror(error)}: '{path}'"):
        files.write_sealed(path, b"new")
    assert files.read_sealed(path) == b"old"
    assert list(path.parent.iterdir()) == [path], "half a file stays behind"


KILLED = """
import itertools, os, signal, sys
from pathlib import Path
import files

moment, path = sys.argv[1], Path(sys.argv[2])
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
if moment != "any":
    setattr(os, moment, die)
print("ready", flush=True)
for number in itertools.count():
    files.write_sealed(path, bytes([number % 256]) * 3_000_000)
"""


@pytest.mark.parametrize("moment", ["fsync", "replace", "any"])
def test_kill_9_leaves_a_whole_file(tmp_path, moment):
    path = tmp_path / "file"
    files.write_sealed(path, b"old")
    for attempt in range(3 if moment == "any" else 1):
        command = [sys.executable, "-c", KILLED, moment, str(path)]
        with subprocess.Popen(command, cwd=EXAMPLES, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            if moment == "any":
                time.sleep(0.02 + 0.013 * attempt)
                process.kill()
        assert process.returncode == -signal.SIGKILL
        content = files.read_sealed(path)
        assert content == b"old" or (moment == "any" and len(content) == 3_000_000 and len(set(content)) == 1)
    if moment != "any":
        assert list(tmp_path.glob("*.part")), "killed before it wrote anything"


def test_json_that_is_damaged_is_named(tmp_path):
    path = tmp_path / "rows.json"
    for content in (b"", b"[1, 2", b"\xff\xfe\x00", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(files.Mistake, match=r"rows\.json is damaged, or no JSON"):
            files.read_json(path)
    for content in (b"3", b'{"a": 1}', b'[{"a": 1, "c": 2}]', b"[3]"):
        path.write_bytes(content)
        rows = files.RowFile(path, {"a", "b"})
        rows.add([{"a": 1, "b": 2}])
        with pytest.raises(files.Mistake, match=r"rows\.json: expected rows of \['a', 'b'\]"):
            rows.finish()
        assert path.read_bytes() == content, "a file of another kind is overwritten"


ROWS = """
import sys
from pathlib import Path
import files
rows = files.RowFile(Path(sys.argv[1]), {"who", "number"})
for number in range(40):
    rows.add([{"who": sys.argv[2], "number": number}])
rows.finish()
"""


def test_two_processes_lose_no_row(tmp_path):
    path = tmp_path / "new" / "rows.json"
    commands = [[sys.executable, "-c", ROWS, str(path), who] for who in "ab"]
    processes = [subprocess.Popen(command, cwd=EXAMPLES) for command in commands]
    assert [process.wait(60) for process in processes] == [0, 0]
    rows = [(row["who"], row["number"]) for row in json.loads(path.read_text())]
    assert sorted(rows) == [*itertools.product("ab", range(40))]


def test_rows_wait_for_room(tmp_path, monkeypatch):
    rows = files.RowFile(tmp_path / "rows.json", {"a"})
    rows.add([{"a": 1}])
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", refuse(errno.ENOSPC))
        rows.add([{"a": 2}])
        with pytest.raises(OSError, match="No space left"):
            rows.finish()
        assert rows.read() == [{"a": 1}]
    rows.add([{"a": 3}])
    assert rows.read() == [{"a": 1}, {"a": 2}, {"a": 3}]
    files.RowFile(None, {"a"}).add([{"a": 1}])


# The drawn characters


@pytest.fixture
def load(tmp_path, monkeypatch, data):
    """Loads the characters from a folder; `load.drawn` counts how often they were drawn."""

    def load():
        return glyphs.load_glyphs(tmp_path / "cache", faces=[0])

    def draw(*_):
        load.drawn += 1
        return data

    load.drawn = 0
    monkeypatch.setattr(glyphs, "_draw", draw)
    monkeypatch.setattr(glyphs, "_cache_name", lambda *_: "glyphs-0.npz")
    return load


def test_any_damage_of_the_cache_is_drawn_again(load, data, tmp_path, capsys):
    load()
    path = tmp_path / "cache" / "glyphs-0.npz"
    whole = path.read_bytes()
    for seed in range(300):
        content = damaged(whole, seed)
        path.write_bytes(content)
        before = load.drawn
        assert load().checksum == data.checksum, seed
        said = capsys.readouterr().err
        if content == whole:
            assert (load.drawn, said) == (before, "")
        else:
            assert load.drawn == before + 1, f"seed {seed}: a damaged file was used"
            assert said.count("\n") == 1
            assert "glyphs-0.npz is damaged" in said
            assert "drawn again" in said
        assert path.read_bytes() == whole


@pytest.mark.parametrize("moment", ["fsync", "replace"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS])
def test_a_cache_that_cannot_be_written_is_done_without(load, data, tmp_path, monkeypatch, capsys, moment, error):
    monkeypatch.setattr(os, moment, refuse(error))
    assert load().checksum == data.checksum
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"cannot keep the characters ({os.strerror(error)})" in said
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_file_in_place_of_the_cache_is_done_without(load, data, tmp_path, capsys):
    (tmp_path / "cache").write_text("mine")
    assert load().checksum == data.checksum
    assert capsys.readouterr().err.count("cannot keep the characters") == 1
    assert (tmp_path / "cache").read_text() == "mine"


def test_a_cache_that_cannot_be_read_is_drawn(load, data, monkeypatch, capsys):
    load()
    monkeypatch.setattr(Path, "read_bytes", refuse(errno.EACCES))
    assert load().checksum == data.checksum
    assert "cannot be read (Permission denied)" in capsys.readouterr().err


@pytest.mark.parametrize("refused", [None, "write", "all"])
def test_what_is_not_kept_is_not_claimed(load, tmp_path, monkeypatch, capsys, refused):
    monkeypatch.setattr(sys, "argv", ["examples/glyphs.py", str(tmp_path / "cache")])
    if refused == "write":
        monkeypatch.setattr(os, "fsync", refuse(errno.ENOSPC))
    elif refused == "all":  # another user's folder
        for name in ("open", "read_bytes", "stat", "mkdir"):
            monkeypatch.setattr(Path, name, refuse(errno.EACCES))
        monkeypatch.setattr(os, "access", lambda *_: False)
    options.run(glyphs.main)
    said = capsys.readouterr().out
    assert "in no class" in said
    assert ("kept in" in said) == (refused is None)


def test_a_user_without_a_home_has_a_folder(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert glyphs.default_folder() == Path("/somewhere/contrastive-kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/elsewhere")
    assert glyphs.default_folder() == Path("/elsewhere/.cache/contrastive-kernels")

    def nobody(*_):
        raise KeyError("uid not found")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert glyphs.default_folder().is_absolute()


# Checkpoints

SETTINGS = train_clip.Settings(batch=16, steps=6, dim=4)


@pytest.fixture(scope="module")
def checkpoint(data, tmp_path_factory):
    """The bytes of a checkpoint at step 2."""
    trainer = train_clip.Trainer(SETTINGS, data)
    out = tmp_path_factory.mktemp("run")
    train_clip.train(trainer, out, save_every=2, until=2)
    assert [path.name for path in out.iterdir()] == ["checkpoint.pt"]
    return (out / "checkpoint.pt").read_bytes()


def command(monkeypatch, data, *arguments):
    """Runs train_clip.py; what it ends with, None if all is well."""
    monkeypatch.setattr(train_clip, "load_glyphs", lambda folder: data)
    monkeypatch.setattr(sys, "argv", ["examples/train_clip.py", *map(str, arguments)])
    try:
        options.run(train_clip.main)
    except SystemExit as end:
        return end.code
    return None


def test_a_sealed_checkpoint_is_still_torch_s(checkpoint, tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(checkpoint)
    plain = torch.load(path, weights_only=True)
    read = train_clip.read_checkpoint(path)
    assert plain["step"] == read["step"] == 2
    assert all(torch.equal(read["model"][name], value) for name, value in plain["model"].items())


def test_any_damage_of_a_checkpoint_is_told(checkpoint, tmp_path):
    path = tmp_path / "checkpoint.pt"
    for seed in range(300):
        content = damaged(checkpoint, seed)
        path.write_bytes(content)
        if content == checkpoint:
            assert train_clip.read_checkpoint(path)["step"] == 2
            continue
        with pytest.raises(files.Mistake, match=r"--resume: .*checkpoint\.pt is damaged: .*begin anew"):
            train_clip.read_checkpoint(path)


class LaterTowers(train_clip.TwoTowers):
    """Of another version: a layer more."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.more = torch.nn.Linear(2, 2)


@pytest.mark.parametrize("wrong", ["flipped", "empty", "text", "another command's", "other data", "another model"])
def test_a_checkpoint_of_no_use_ends_the_command_in_a_line(checkpoint, data, tmp_path, monkeypatch, wrong):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(checkpoint)
    if wrong in ("flipped", "empty", "text"):
        flipped = bytearray(checkpoint)
        for place in random.Random(0).sample(range(len(flipped)), 50):
            flipped[place] ^= 1
        path.write_bytes({"flipped": bytes(flipped), "empty": b"", "text": b"not a checkpoint\n" * 20}[wrong])
    elif wrong == "another command's":
        cell = structures.Cell("towers", "base", 0)
        structures.run_cell(cell, structures.QUICK, data, tmp_path, until=1)
        (tmp_path / cell.name / "checkpoint.pt").replace(path)
    elif wrong == "other data":
        data = data.subset(characters=np.arange(1, len(data.codepoints)))
    else:
        monkeypatch.setattr(train_clip, "TwoTowers", LaterTowers)
    before = path.read_bytes()
    line = command(monkeypatch, data, "--out", tmp_path, "--resume", "--device", "cpu")
    assert line.startswith("train_clip.py: --resume: ")
    assert "checkpoint.pt" in line
    assert "\n" not in line
    assert path.read_bytes() == before


def test_a_full_disk_keeps_the_older_checkpoint_and_the_training(data, tmp_path, monkeypatch, capsys):
    trainer = train_clip.Trainer(SETTINGS, data)
    train_clip.train(trainer, tmp_path, save_every=2, until=2)
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", refuse(errno.ENOSPC))
        train_clip.train(trainer, tmp_path, save_every=2, until=5)
    printed = capsys.readouterr().out
    assert trainer.step == 5
    assert printed.count("cannot be written (No space left on device); the older checkpoint stays") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert train_clip.read_checkpoint(tmp_path / "checkpoint.pt")["step"] == 2
    (tmp_path / "checkpoint.pt.0.part").write_bytes(b"of a run that was killed")
    train_clip.train(trainer, tmp_path, save_every=2)
    assert train_clip.read_checkpoint(tmp_path / "checkpoint.pt")["step"] == 6
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_access_that_is_lost_costs_no_training(data, tmp_path, monkeypatch, capsys):
    trainer = train_clip.Trainer(SETTINGS, data)
    for name in ("open", "stat", "mkdir"):
        monkeypatch.setattr(Path, name, refuse(errno.EACCES))
    train_clip.train(trainer, tmp_path, save_every=2, until=2)
    assert trainer.step == 2
    assert "cannot be written (Permission denied); there is no checkpoint" in capsys.readouterr().out


def test_results_that_cannot_be_written_end_in_a_line(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "fsync", refuse(errno.ENOSPC))
    line = command(monkeypatch, data, "--steps", 2, "--batch", 16, "--dim", 4, "--device", "cpu", "--out", tmp_path)
    assert line.startswith("train_clip.py: ")
    assert "No space left on device" in line
    printed = capsys.readouterr().out
    assert "there is no checkpoint" in printed
    assert "recall@1" in printed, "the scores are lost with the file"


def test_a_checkpoint_that_is_not_there_is_not_claimed(data, tmp_path, monkeypatch, capsys):
    real = files.write_sealed

    def refusing(path, content):
        if path.name == "checkpoint.pt" and not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, content)

    monkeypatch.setattr(train_clip, "write_sealed", refusing)
    for room, claimed in ((True, "checkpoint.pt, metrics.json, curves.png in"), (False, "metrics.json, curves.png in")):
        line = command(
            monkeypatch, data, "--steps", 2, "--batch", 16, "--dim", 4, "--device", "cpu", "--out", tmp_path / f"{room}"
        )
        assert not line
        said = [line for line in capsys.readouterr().out.splitlines() if "metrics.json" in line]
        assert len(said) == 1 and said[0].startswith(claimed)


def test_a_damaged_cell_is_told(data, tmp_path):
    cell = structures.Cell("towers", "base", 0)
    for content, word in ((b"{", "is damaged"), (b"[]", "expected the result of a cell")):
        (tmp_path / f"{cell.name}.json").write_bytes(content)
        with pytest.raises(files.Mistake, match=word):
            structures.run_cell(cell, structures.QUICK, data, tmp_path)
