"""The file of measured tiles where there is no home, no access, no room, damage, or another writer."""

from __future__ import annotations

import errno
import importlib.util
import json
import multiprocessing
import os
import pwd
import stat
import warnings
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from contrastive_kernels._triton import configs, tuning

TILE, OTHER = configs.Tile(64, 128, 32, 4, 2), configs.Tile(128, 128, 32, 8, 3)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "tiles.json"


def test_the_file_is_where_torch_keeps_its_own(monkeypatch, tmp_path):
    for name in ("TORCH_HOME", "TORCH_HUB", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tuning.torch.hub, "_hub_dir", None)
    file = Path("torch/hub/contrastive_kernels/tiles.json")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning.default_path() == tmp_path / ".cache" / file
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert tuning.default_path() == tmp_path / "x" / file
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "t"))
    assert tuning.default_path() == tmp_path / "t" / "hub/contrastive_kernels/tiles.json"


def nobody(*_):
    raise KeyError("uid not found")


def test_a_user_without_a_home_measures_for_the_process(monkeypatch, tmp_path):
    for name in ("HOME", "TORCH_HOME", "TORCH_HUB", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tuning.torch.hub, "_hub_dir", None)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.chdir(tmp_path)
    tiles = tuning.TunedTiles()
    assert tiles.path is None
    assert tiles.get("a") is None
    with pytest.warns(RuntimeWarning, match="hold for this process only") as said:
        tiles.put({"a": TILE})
        tiles.put({"b": OTHER})
    assert len(said) == 1
    assert (tiles.get("a"), tiles.get("b")) == (TILE, OTHER)
    assert list(tmp_path.iterdir()) == [], "a folder named ~"


def test_the_backend_imports_without_a_home(monkeypatch):
    """The module's own table is made at import, for every user of a GPU."""
    for name in ("HOME", "TORCH_HOME", "TORCH_HUB", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    spec = importlib.util.spec_from_file_location(f"{tuning.__name__}_again", tuning.__file__)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert again.tiles.get("a") is None


def refuse(error):
    def refused(*_, **__):
        raise OSError(error, os.strerror(error))

    return refused


def goes_on(tiles, word):
    """Reading and writing fail: each says so once, and what was measured is used."""
    with pytest.warns(RuntimeWarning, match=word) as said:
        assert tiles.get("a") is None
        assert tiles.get("a") is None
        tiles.put({"a": TILE})
        tiles.put({"b": OTHER})
        assert (tiles.get("a"), tiles.get("b")) == (TILE, OTHER)
    return len(said)


def test_no_access_to_the_home(monkeypatch, path):
    for owner, name in ((Path, "open"), (Path, "read_bytes"), (Path, "stat"), (Path, "mkdir"), (os, "stat")):
        monkeypatch.setattr(owner, name, refuse(errno.EACCES))
    assert goes_on(tuning.TunedTiles(path), "tiles.json cannot be .*Permission denied") == 2


def test_a_file_in_place_of_the_folder(path):
    path.parent.write_text("I was here first")
    assert goes_on(tuning.TunedTiles(path), "tiles.json cannot be") == 2
    assert path.parent.read_text() == "I was here first"


def test_a_folder_in_place_of_the_file(path):
    path.mkdir(parents=True)
    assert goes_on(tuning.TunedTiles(path), "tiles.json cannot be") == 2
    assert [entry.name for entry in path.parent.iterdir() if entry.suffix == ".new"] == []


@pytest.mark.parametrize("error", [errno.EROFS, errno.ENOSPC])
@pytest.mark.parametrize("where", ["open", "fsync", "replace"])
def test_a_read_only_or_full_folder_keeps_the_old_file(monkeypatch, path, error, where):
    tuning.TunedTiles(path).put({"old": TILE})
    before = path.read_text()
    if where == "open":
        monkeypatch.setattr(Path, "open", refuse(error))
    else:
        monkeypatch.setattr(os, where, refuse(error))
    tiles = tuning.TunedTiles(path)
    with pytest.warns(RuntimeWarning, match=f"tiles.json cannot be written .*{os.strerror(error)}") as said:
        tiles.put({"a": OTHER})
        tiles.put({"b": OTHER})
    assert len(said) == 1
    assert tiles.get("a") == OTHER
    monkeypatch.undo()
    assert path.read_text() == before
    assert {entry.name for entry in path.parent.iterdir()} <= {"tiles.json", "tiles.lock"}, "a half-written file"


def test_a_file_that_cannot_be_read_is_not_replaced(monkeypatch, path):
    tuning.TunedTiles(path).put({"old": TILE})
    monkeypatch.setattr(Path, "read_bytes", refuse(errno.EIO))
    with pytest.warns(RuntimeWarning, match="cannot be written"):
        tuning.TunedTiles(path).put({"new": OTHER})
    monkeypatch.undo()
    assert tuning.TunedTiles(path).get("old") == TILE


def put_fifty(path, who):
    for number in range(50):
        tuning.TunedTiles(path).put({f"{who} {number}": TILE})


def test_two_writers_lose_nothing(path):
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=put_fifty, args=(path, who)) for who in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    assert set(json.loads(path.read_text())) == {f"{who} {number}" for who in "ab" for number in range(50)}
    assert {entry.name for entry in path.parent.iterdir()} == {"tiles.json", "tiles.lock"}


@pytest.mark.parametrize("missing", ["module", "file system"])
def test_without_locks_a_later_writer_keeps_what_is_there(monkeypatch, path, missing):
    if missing == "module":
        monkeypatch.setattr(tuning, "fcntl", None)
    else:
        monkeypatch.setattr(tuning.fcntl, "flock", refuse(errno.ENOLCK))
    first, second = tuning.TunedTiles(path), tuning.TunedTiles(path)
    assert first.get("a") is second.get("a") is None
    first.put({"a": TILE})
    second.put({"b": OTHER})
    assert (tuning.TunedTiles(path).get("a"), tuning.TunedTiles(path).get("b")) == (TILE, OTHER)


def test_what_another_version_wrote_stays(path):
    """An entry of another form is no tile here, is said to be none, and is kept for whoever can read it."""
    path.parent.mkdir()
    newer = {"block_m": 64, "clusters": 2}
    path.write_text(json.dumps({"newer": newer}))
    with pytest.warns(RuntimeWarning, match="left aside where an entry is no tile, as 'newer'"):
        assert tuning.TunedTiles(path).get("newer") is None
    tuning.TunedTiles(path).put({"a": TILE})
    assert json.loads(path.read_text())["newer"] == newer


@pytest.mark.parametrize("name", ["num_stages", "group", "block_m"])
@pytest.mark.parametrize("number", [0, -1, True, 64.0, None])
def test_numbers_that_no_tile_has(path, name, number):
    path.parent.mkdir()
    path.write_text(json.dumps({"a": {**vars(TILE), name: number}, "b": vars(OTHER)}))
    tiles = tuning.TunedTiles(path)
    with pytest.warns(RuntimeWarning, match="no tile, as 'a'"):
        assert tiles.get("a") is None
    assert tiles.get("b") == OTHER, "one wrong entry costs the others"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"1" * 5000, b"null"])
def test_a_damaged_file_is_named_once_and_replaced(path, content):
    path.parent.mkdir()
    path.write_bytes(content)
    tiles = tuning.TunedTiles(path)
    with pytest.warns(RuntimeWarning, match="tiles.json is left aside, for it is damaged") as said:
        assert tiles.get("a") is None
        tiles.put({"a": TILE})
    assert len(said) == 1
    assert tuning.TunedTiles(path).get("a") == TILE


def test_a_missing_file_is_no_matter(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning.TunedTiles(path).get("a") is None
        before = os.umask(0o022)
        tuning.TunedTiles(path).put({"a": TILE})
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644, "in a shared folder others read it too"
