"""What `make gpu` does around its stages: their order, their time, their failures; without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


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
        return [name for name, *_ in called], {name: seconds for name, _, seconds in called}, error

    return run


def test_stages_come_in_their_order(start, gpu):
    """What is right comes before what is fast, and a stage has its own time."""
    stages, seconds, error = start()
    assert (
        stages == list(gpu.STAGES)
        and stages[:5] == ["where", "build", "smoke", "timeline", "test"]
        and stages[-1] == "table"
    )
    assert error is None and seconds == {name: gpu.LIMITS.get(name, gpu.SECONDS) for name in stages}
    assert set(gpu.LIMITS) <= set(gpu.STAGES) and max(seconds.values()) + gpu.LAST_WORDS < 540
    assert start("table", "bench", "--seconds", "90") == (["bench", "table"], {"bench": 90.0, "table": 90.0}, None)


def test_all_stages_together_have_their_time(start, gpu, monkeypatch):
    """What is left is the next stage's; a stage without time is named, and the table comes all the same."""
    assert start("goals", "table", "--total", "100")[1] == {
        "goals": pytest.approx(100 - gpu.LAST_WORDS, abs=1.0),
        "table": gpu.SECONDS,
    }
    stages, _, error = start("smoke", "goals", "table", "--total", "25")
    assert stages == ["table"] and error == "gpu: failed: smoke, goals"


def test_failures_end_the_run_late(start, gpu):
    """Without a build the other backends can be tried; a failed test does not keep the benchmark from its rows."""
    for failing in (["build"], ["test", "bench"]):
        stages, _, error = start(failing=failing)
        assert stages == list(gpu.STAGES) and error == f"gpu: failed: {', '.join(failing)}"


def test_an_unknown_stage_is_refused(start, capsys):
    assert start("tests")[0] == []
    assert "stages are where, build, smoke, timeline, test," in (said := capsys.readouterr().err)
    assert "table and pack, not tests" in said


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
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a shell's background
    start = time.monotonic()
    try:
        assert gpu.run([sys.executable, "-c", script], 4.0) == 124
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 30
    assert found.read_text() == "half of it"


def test_a_command_that_does_not_stop_is_killed(gpu, monkeypatch):
    monkeypatch.setattr(gpu, "LAST_WORDS", 0.5)
    script = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    start = time.monotonic()
    assert gpu.run([sys.executable, "-c", script], 2.0) == 124
    assert time.monotonic() - start < 30


def test_what_a_command_has_started_ends_with_it(gpu, monkeypatch, tmp_path):
    """A worker that hears nothing would hold the GPU for what follows."""
    monkeypatch.setattr(gpu, "LAST_WORDS", 5.0)
    worker = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    script = f"""
import pathlib, subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", {worker!r}])
pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(worker.pid))
time.sleep(60)
"""
    assert gpu.run([sys.executable, "-c", script], 4.0) == 124
    status = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    for _ in range(50):  # until it is gone, or waits for whoever adopts it
        if not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("the worker lives on")


def test_results_are_one_file(start, tmp_path):
    """After every stage, whatever follows; without the library."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/rows.json").write_text("[]")
    (tmp_path / "out/_C.so").write_text("library")
    start("smoke", failing=["smoke"])
    with tarfile.open(tmp_path / "out.tar.gz") as archive:
        assert archive.getnames() == ["out/rows.json"]


def test_the_machine_is_described(gpu, tmp_path):
    assert gpu.where(tmp_path, 60.0) == 0
    assert "$ lscpu" in (tmp_path / "machine.txt").read_text()


def test_the_table_is_of_the_rows(gpu, tmp_path, capsys):
    assert gpu.table(tmp_path, 1.0) == 1
    assert "rows.json: run the stage goals or bench first" in capsys.readouterr().out
    (tmp_path / "rows.json").write_bytes((ROOT / "bench/results/xeon-amx-2-cores.json").read_bytes())
    assert gpu.table(tmp_path, 1.0) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["case", "provider"] and "commit" in lines[-1]
    assert any("clip_loss fwd+bwd N=8192" in line and "ours-cpu" in line for line in lines)
    assert any("frozen y" in line for line in lines) and any("fixed scale" in line for line in lines)


def test_what_was_built_is_kept(gpu, monkeypatch, tmp_path):
    """A copy for the next machine of the kind, and none of a build that failed."""
    package = tmp_path / "contrastive_kernels"
    package.mkdir()
    name = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    (package / name).write_text("library")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    for status in (1, 0):
        monkeypatch.setattr(gpu, "build_in_place", lambda seconds, status=status: status)
        assert gpu.build(tmp_path, 10.0) == status
        assert (tmp_path / name).exists() == (status == 0)


# ---- what the stages start ----


@pytest.fixture
def commands(gpu, monkeypatch):
    """The stages' commands with their environments, which are noted instead of run."""
    noted = []

    def run(command, seconds, **more):
        noted.append((command, more))
        return 0

    monkeypatch.setattr(gpu, "run", run)
    return noted


def test_what_the_stages_start_is_understood(gpu, commands, monkeypatch, tmp_path):
    """Every option is one that its program knows, and every case one that there is."""
    pytest.importorskip("rich")
    from bench import __main__ as benchmark
    from bench import kernels, once

    monkeypatch.setattr(gpu, "known_providers", lambda: ["ours-triton", "ours-cuda", "dense", "memeff"])
    monkeypatch.setattr(gpu, "find_tool", lambda name: None)
    for name in ("smoke", "timeline", "shapes", "goals", "overlap", "tiles", "bench"):
        assert gpu.STAGES[name](tmp_path, 300.0) == 0
    started = [command[2:] for command, _ in commands]
    assert {command[0] for command in started} == {"bench.once", "bench.kernels", "bench"}
    for module, *arguments in started:
        if module == "bench":
            timed, remembered = benchmark._choose(benchmark._parser().parse_args(arguments))
            assert timed and (remembered or "--goals" not in arguments)
        else:
            parser = {"bench.once": once, "bench.kernels": kernels}[module]._parser()
            assert parser.parse_args(arguments).device == "cuda"


def test_sanitizers_watch_small_problems(gpu, commands, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "find_tool", lambda name: None)
    assert gpu.sanitize(tmp_path, 90.0) == 0 and "no compute-sanitizer" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "find_tool", lambda name: f"/tools/{name}")
    assert gpu.sanitize(tmp_path, 90.0) == 1, "a tool that says nothing has failed"
    for tool in ("memcheck", "racecheck", "initcheck"):
        (tmp_path / f"{tool}.txt").write_text(f"========= {'RACECHECK' if tool == 'racecheck' else 'ERROR'} SUMMARY: 0")
    commands.clear()
    assert gpu.sanitize(tmp_path, 90.0) == 0
    assert "memcheck: ERROR SUMMARY: 0" in capsys.readouterr().out
    (alone, _), *watched = commands
    assert {command[2] for command, _ in watched} == {"memcheck", "racecheck", "initcheck"}
    for command, more in watched:
        assert command[0] == "/tools/compute-sanitizer" and command[-len(alone) :] == alone
        assert more == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


LOG = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 2 bytes
=========     at {}+0x1230 in score.py:43
=========     by thread (64,0,0) in block (3,0,0)
=========     Access at 0x7f is out of bounds
=========         Host Frame: cuLaunchKernel [0x2c] in libcuda.so
========= ERROR SUMMARY: 1 error
"""


@pytest.mark.parametrize(
    "place, status",
    [("score_kernel", 1), ("void ck::tensor_core_kernel<ck::Exponential>(ck::Panel)", 1), ("void cub::scan(int)", 0)],
)
def test_findings_are_ours_or_others(gpu, place, status):
    text, failed = gpu.findings("memcheck", LOG.format(place), 0)
    assert text == f"memcheck: ERROR SUMMARY: 1 error (1 at {place.split('(')[0]})" and failed == status
    assert gpu.findings("memcheck", "", 124) == ("memcheck: no summary, status 124", 1)
    race = "========= Error: Race reported between Write access at merge_kernel+0x90 in merge.cu:3\n"
    race += "=========     and Read access at merge_kernel+0xa0 in merge.cu:9 [8 hazards]\n"
    race += "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
    assert gpu.findings("racecheck", race, 0)[1] == 1


def test_the_profile_is_of_our_kernels(gpu, commands, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "find_tool", lambda name: f"/tools/{name}")
    (tmp_path / "profile-triton.txt").write_text(
        "  score_kernel (512, 1, 1)x(256, 1, 1), Context 1, Stream 7, Device 0, CC 9.0\n"
        "    Compute (SM) Throughput            %        71.2\n    L1/TEX Hit Rate   %   3\n"
    )
    assert gpu.profile(tmp_path, 80.0) == 0
    said = capsys.readouterr().out
    assert "score_kernel" in said and "71.2" in said and "L1/TEX" not in said
    assert [command[0] for command, _ in commands if "ncu" in command[0]] == ["/tools/ncu"] * 2
    monkeypatch.setattr(gpu, "find_tool", lambda name: None)
    assert gpu.profile(tmp_path, 80.0) == 0


def test_known_providers_are_the_installed_ones(gpu):
    pytest.importorskip("rich")
    known = gpu.known_providers()
    assert {"ours-triton", "ours-cuda", "dense"} <= set(known) and "lightly" not in known


# ---- what the stages measure, on a CPU and in small ----


def test_products_of_panels(tmp_path, capsys):
    from bench import kernels

    command = ["products", "--device", "cpu", "--d", "16", "--panels", "24x32,8x64", "--ceiling", "32", "--rounds", "1"]
    path = tmp_path / "kernels.json"
    for _ in range(2):  # the second finds everything there
        assert kernels.main([*command, "--json", str(path)]) == 0
        said = capsys.readouterr().out
        assert "24 x 32" in said and "8 x 64" in said and "Tflop/s" in said
    rows = json.loads(path.read_text())
    assert [row["what"] for row in rows] == ["ceilings", "products", "products"]
    assert all(milliseconds > 0 for row in rows for milliseconds in row["ms"].values())
    assert kernels.main([*command, "--seconds", "-1"]) == 0
    assert "no time" in capsys.readouterr().out


def test_passes_over_panels(tmp_path, capsys):
    from bench import kernels

    command = ["overlap", "--device", "cpu", "--backend", "torch", "--n", "130", "--d", "16", "--rounds", "1"]
    assert kernels.main([*command, "--json", str(tmp_path / "kernels.json")]) == 0
    said = capsys.readouterr().out
    assert "reduce" in said and "weigh" in said and "issued in" in said


def test_steps_kernel_by_kernel(tmp_path, capsys):
    from bench import kernels

    command = ["timeline", "--device", "cpu", "--backend", "torch", "--n", "64", "--d", "16", "--rounds", "1"]
    path = tmp_path / "kernels.json"
    for _ in range(2):  # the second finds everything there
        assert kernels.main([*command, "--json", str(path)]) == 0
        said = capsys.readouterr().out
        assert "clip_loss, N = 64, D = 16, workspace default" in said
    for row in json.loads(path.read_text()):
        shown = row["kernels"]
        assert row["launches"] > 5 and row["step_ms"] > 0 and 3 < len(shown) <= 12
        assert 0 < sum(ms for ms, _ in shown.values()) <= row["busy_ms"] * 1.001
        assert all(f"{count:6}  {name}" in said for name, (_, count) in shown.items())
    assert kernels.main([*command, "--seconds", "-1"]) == 0 and "no time" in capsys.readouterr().out


def test_tiles_are_timed_in_the_interpreter(tmp_path):
    """The whole stage with Triton's interpreter in the GPU's place, in a process of its own."""
    pytest.importorskip("triton", reason="Triton is not installed")
    path = tmp_path / "kernels.json"
    command = [sys.executable, "-m", "bench.kernels", "tiles", "--device", "cpu", "--d", "16", "--side", "64"]
    command += ["--limit", "1", "--rounds", "1", "--processes", "2", "--kinds", "usual", "--json", str(path)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "compiled 4 kernels" in done.stdout and "0 cannot run" in done.stdout
    assert '(90, "16-bit"): (Tile(' in done.stdout
    assert len(json.loads(path.read_text())) == 4


def test_persistent_tiles_are_listed(tmp_path, capsys, monkeypatch):
    """Those of one program and of persistent ones, each as a line of its table; nothing runs."""
    launch = pytest.importorskip("contrastive_kernels._triton.launch", reason="Triton is not installed")
    from bench import kernels

    monkeypatch.setattr(launch, "probe", lambda *arguments: lambda tile: None)
    path = tmp_path / "kernels.json"
    command = ["tiles", "--device", "cpu", "--d", "768", "--limit", "3", "--rounds", "1", "--json", str(path)]
    assert kernels.main(command) == 0
    said = capsys.readouterr().out
    assert '(90, "16-bit"): (Tile(' in said
    for work in ("reduce", "weights", "both", "fused"):
        assert f'(90, "16-bit", "{work}", "exponential"): PersistentTile(128, ' in said
    rows = json.loads(path.read_text())
    assert len(rows) == 24 and {len(row["tile"]) for row in rows} == {5, 7}


def test_the_gpus_tests_are_rehearsed(tmp_path):
    """Some of each kind; python tests/rehearsal.py runs all that need nothing of CUDA."""
    some = "structures or searches or (gradients_of_some and torch and clip_loss) or (base and bfloat16 and torch)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, str(ROOT / "tests/rehearsal.py"), "-p", "no:xdist", "-k", some]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_small_problems_are_checked(capsys):
    from bench import once

    command = ["--device", "cpu", "--n", "70", "--d", "16", "--workspace", "100000", "--backend", "torch,triton"]
    assert once.main(command) == 0
    said = capsys.readouterr().out
    assert said.count(": ok") == 10 and "triton bfloat16: left out" in said
    assert once.main([*command, "--no-check", "--case", "sigmoid"]) == 0
    assert once.main([*command, "--workspace", "1"]) == 1
    assert "ValueError: workspace_bytes" in capsys.readouterr().out
