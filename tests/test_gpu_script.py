"""What `make gpu` does around its stages: their order, their time, their failures; without a GPU."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def gpu(monkeypatch):
    """scripts/gpu.py as a module that takes this machine for one with a GPU."""
    spec = importlib.util.spec_from_file_location("ck_gpu", ROOT / "scripts/gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "require_gpu", lambda: None)
    return module


@pytest.fixture
def start(gpu, monkeypatch, tmp_path):
    """Runs the script's main with stages that only say what they were given, and fail as they are told."""

    def run(*arguments, failing=()):
        called = []

        def stage(name):
            return lambda out, seconds: called.append((name, out, seconds)) or int(name in failing)

        monkeypatch.setattr(gpu, "STAGES", {name: stage(name) for name in gpu.STAGES})
        monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments, "--out", str(tmp_path / "out")])
        error = None
        try:
            gpu.main()
        except SystemExit as end:
            error = str(end)
        assert all(out == tmp_path / "out" and out.is_dir() for _, out, _ in called)
        return [name for name, *_ in called], {seconds for *_, seconds in called}, error

    return run


def test_stages_come_in_their_order(start, gpu):
    assert start() == (["build", "test", "bench", "table"], {gpu.SECONDS}, None)
    assert start("table", "bench", "--seconds", "90") == (["bench", "table"], {90.0}, None)
    assert gpu.SECONDS + gpu.LAST_WORDS < 540, "a stage ends within nine minutes"


def test_failures_end_the_run_late(start):
    """Without a build there is nothing to test; a failed test does not keep the benchmark from its rows."""
    assert start(failing=["build"])[::2] == (["build"], "gpu: failed: build")
    assert start(failing=["test", "bench"])[::2] == (["build", "test", "bench", "table"], "gpu: failed: test, bench")


def test_an_unknown_stage_is_refused(start, capsys):
    assert start("tests")[0] == []
    assert "stages are build, test, bench, table and pack, not tests" in capsys.readouterr().err


def test_a_stopped_command_may_say_what_it_found(gpu, tmp_path):
    """As pytest does where it is interrupted."""
    found = tmp_path / "found"
    script = f"""
import pathlib, time
try:
    time.sleep(60)
except KeyboardInterrupt:
    pathlib.Path({str(found)!r}).write_text("half of it")
"""
    start = time.monotonic()
    assert gpu.run([sys.executable, "-c", script], 2.0) == 124
    assert time.monotonic() - start < 30
    assert found.read_text() == "half of it"


def test_a_command_that_does_not_stop_is_killed(gpu, monkeypatch):
    monkeypatch.setattr(gpu, "LAST_WORDS", 0.5)
    script = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    start = time.monotonic()
    assert gpu.run([sys.executable, "-c", script], 2.0) == 124
    assert time.monotonic() - start < 30


def test_the_table_is_of_the_rows(gpu, tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"no rows in .*: run the stage bench first"):
        gpu.table(tmp_path, 1.0)
    (tmp_path / "rows.json").write_bytes((ROOT / "bench/results/xeon-amx-2-cores.json").read_bytes())
    assert gpu.table(tmp_path, 1.0) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["case", "provider"] and "commit" in lines[-1]
    assert any("clip_loss fwd+bwd N=8192" in line and "ours-cpu" in line for line in lines)
