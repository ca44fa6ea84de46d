"""The loss over processes against gathering all features: checked before it is timed, and stored beside other rows."""

from __future__ import annotations

import json
import math
import os

import pytest
from rich.console import Console
from torch import distributed as dist

import contrastive_kernels as ck
from bench import distributed, memory, report
from bench.__main__ import main

TINY = distributed.Plan(processes=(1, 2), each=32, total=96, d=16, rounds=1)


def test_a_quick_run(tmp_path, capsys):
    path = tmp_path / "rows.json"
    assert main(["--distributed", "--quick", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    found = {(row["processes"], row["n"], report.provider_name(row)) for row in rows}
    alone, two = ("ours-alone", "gathered"), ("ours-grid", "ours-ring", "gathered")
    assert found == {
        *((1, n, name) for n in (32, 96) for name in alone),
        *((2, n, name) for n in (64, 96) for name in two),
    }
    for row in rows:
        assert row["status"] == "ok" and row["error"] <= row["tolerance"] and row["best_s"] > 0, row
        assert row["peak_bytes"] >= 0 and row["commit"] and row["machine"] and row["versions"].startswith("torch")
    printed = capsys.readouterr().out
    assert main(["--show", "--json", str(path)]) == 0
    for text in (printed, capsys.readouterr().out):
        assert "over processes" in text and text.count("ours-ring") == 2 and "GEMM floor" not in text


def test_several_sizes_take_the_strategy_that_ours_would(tmp_path):
    path = tmp_path / "rows.json"
    options = ("--n", "8,24", "--d", "16", "--rounds", "1")
    assert main(["--distributed", *options, "--threads", "1", "--json", str(path)]) == 0
    found = {(row["n"], report.provider_name(row)) for row in json.loads(path.read_text()) if row["processes"] == 2}
    assert found == {(n, name) for n in (8, 24) for name in ("ours-auto", "gathered")}


@pytest.fixture
def alone(tmp_path):
    """A group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_wrong_loss_is_found():
    def detached(x, y, scale):
        return ck.clip_loss(x, y.detach(), scale) + 0 * y.sum()

    for loss in distributed.contenders(1).values():
        assert distributed.check(loss, 50, 8) < distributed.TOLERANCE
    for wrong in (lambda *inputs: 1.001 * ck.clip_loss(*inputs), detached, ck.info_nce):
        assert distributed.check(wrong, 50, 8) > distributed.TOLERANCE


def measured(monkeypatch, seconds, error=0.0):
    """Makes processes measure what a test says of (processes, rows, contender)."""

    def in_processes(size, threads, task):
        if task.func is distributed._remember:
            return [1000] * size
        plan = task.args[0]
        times = {
            (n, name): ([99.0, seconds(size, n, name)], error)
            for n in plan.sizes(size)
            for name in distributed.contenders(size)
        }
        return [times] * size

    monkeypatch.setattr(distributed, "in_processes", in_processes)
    monkeypatch.setattr(memory, "why_not", lambda device: None)


def run(plan, capsys):
    status = distributed.run(plan, Console(width=200))
    return status, capsys.readouterr().out


def test_ratios(monkeypatch, capsys):
    """Two processes with as many rows each have four times the pairs: twice the time is perfect."""
    times = {(1, 32): 1.0, (1, 96): 9.0, (2, 64): 2.5, (2, 96): 5.0}
    measured(monkeypatch, lambda size, n, name: times[size, n] * (2 if name == "gathered" else 1))
    status, printed = run(TINY, capsys)
    assert status == 0
    weak, strong = [line for line in printed.splitlines() if "ours-grid" in line]
    assert "2.00x" in weak and "0.80" in weak and "2.00x" in strong and "0.90" in strong


def test_slower_is_a_failure_at_the_promised_sizes_alone(monkeypatch, capsys):
    measured(monkeypatch, lambda size, n, name: 2.0 if name == "ours-ring" else 1.0)
    status, printed = run(distributed.Plan(), capsys)
    assert status == 1 and "slower: ours-ring on 4 processes, 8,192 rows" in printed and "ours-grid on" not in printed
    assert run(TINY, capsys)[0] == 0
    measured(monkeypatch, lambda *_: 1.0)
    assert run(distributed.Plan(), capsys)[0] == 0


@pytest.mark.parametrize("error", [1e-3, math.nan])
def test_a_wrong_result_has_no_time(monkeypatch, capsys, error):
    measured(monkeypatch, lambda *_: 1.0, error)
    status, printed = run(TINY, capsys)
    assert status == 1 and "1.00x" not in printed and "> 1e-04" in printed


def failing():
    if dist.get_rank() == 1:
        raise ArithmeticError("on one of them")


def dying():
    os._exit(3)


def test_processes_that_fail_are_told():
    with pytest.raises(RuntimeError, match=r"process 1 of 2: [\s\S]*ArithmeticError: on one of them"):
        distributed.in_processes(2, 1, failing)
    with pytest.raises(RuntimeError, match="one of 1 processes died"):
        distributed.in_processes(1, 1, dying)


def test_options_of_other_runs_are_refused(capsys):
    for wrong in (["--memory"], ["--device", "cuda"], ["--case", "sigmoid"], ["--plot", "x"]):
        with pytest.raises(SystemExit):
            main(["--distributed", *wrong])
        assert f"got ['{wrong[0][2:]}']" in capsys.readouterr().err


def test_sizes_of_weak_and_strong_scaling():
    assert [distributed.Plan().sizes(size) for size in (1, 2, 4)] == [[2048, 8192], [4096, 8192], [8192]]
