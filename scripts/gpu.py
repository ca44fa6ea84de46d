"""Builds, tests and measures on this machine's GPU, with the Python that runs this file, and without a network.

python scripts/gpu.py [build] [test] [bench] [table] [--out DIR] [--seconds S]    (all four, if none is named)

build    the extension in place, for this machine's GPUs
test     the tests that need a GPU
bench    benchmark rows and plots into DIR
table    a short table of these rows

python scripts/gpu.py pack    on a machine with a network: what that Python may lack, into build/gpu-packages

Each stage can run alone, ends within nine minutes (or S seconds and a few), and exits with another status than 0 where
something failed. What a stage had found when its time was up is in DIR.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ROOT / "build/gpu-packages"
#: Seconds of a stage, with room for its start and its end.
SECONDS = 500.0
#: Seconds that a stopped command has for telling what it found.
LAST_WORDS = 20.0
#: Processes of the tests, which spend their time compiling.
TEST_PROCESSES = 8
#: In turn, as long as there is time: what shows most of the kernels first.
BENCH = (
    ("--case", "clip_loss", "--n", "8192", "--d", "768", "--dtype", "bfloat16"),
    ("--case", "clip_loss", "--n", "32768", "--d", "768", "--dtype", "bfloat16"),
    ("--case", "sigmoid,decomposable,info_nce", "--n", "32768", "--d", "768", "--dtype", "bfloat16"),
    ("--case", "clip_loss", "--n", "32768", "--d", "768", "--dtype", "bfloat16", "--mode", "fwd"),
    ("--case", "clip_loss", "--n", "2048", "--d", "768", "--dtype", "bfloat16"),
    ("--case", "clip_loss", "--n", "8192", "--d", "512", "--dtype", "float32"),
    ("--case", "clip_loss", "--n", "32768", "--d", "256", "--dtype", "float16"),
)
PACKED = ("pytest>=8", "pytest-xdist>=3.6", "pybind11>=2.13", "ninja>=1.11", "setuptools>=77", "rich>=13")

ADVICE = "`python scripts/gpu.py pack` on a machine with a network, and bring build/gpu-packages here"


def fail(message: str) -> NoReturn:
    """Ends the program."""
    raise SystemExit(f"gpu: {message}")


def require_gpu() -> None:
    """Ends the program where torch or a GPU is missing; says what there is."""
    if importlib.util.find_spec("torch") is None:
        fail(f"{sys.executable} has no torch; name another Python: make gpu GPU_PYTHON=...")
    import torch

    if not torch.cuda.is_available():
        fail(f"torch {torch.__version__} finds no GPU on this machine; `make test` runs what needs none")
    triton = importlib.util.find_spec("triton")
    version = __import__("triton").__version__ if triton else "none"
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    print(f"gpu: {names}; torch {torch.__version__}, triton {version}, Python {sys.version.split()[0]}", flush=True)


def environment(**more: str) -> dict[str, str]:
    """The environment of a subprocess: the checkout and the packed packages come first."""
    paths = [str(ROOT), str(PACKAGES), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **more}


def run(command: list[str], seconds: float, **more: str) -> int:
    """Runs a command in the checkout for at most so long; its exit status, 124 where it was stopped."""
    print(f"gpu: {' '.join(command)}", flush=True)
    with subprocess.Popen(command, cwd=ROOT, env=environment(**more)) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            print(f"gpu: stopped after {seconds:.0f} s", flush=True)
            process.send_signal(signal.SIGINT)  # pytest then says what failed, and writes it down
        try:
            process.wait(LAST_WORDS)
        except subprocess.TimeoutExpired:
            process.kill()
    return 124


def build(out: Path, seconds: float) -> int:
    """The extension in place, for this machine's GPUs."""
    import torch

    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    archs = ";".join(f"{major}{minor}" for major, minor in sorted(capabilities))
    sys.path[:0] = [str(ROOT), str(PACKAGES)]
    stand_in_for_pybind11(Path(torch.__file__).parent / "include")
    wanted = {"CK_EXTENSION": "1", "CK_CUDA": "1", "CK_ARCHS": archs}
    try:
        setuptools = int(importlib.metadata.version("setuptools").split(".")[0])
    except importlib.metadata.PackageNotFoundError:
        fail(f"no setuptools: {ADVICE}")
    ninja = shutil.which("ninja") is not None or importlib.util.find_spec("ninja") is not None
    if ninja and setuptools >= 77:  # older ones do not understand pyproject.toml
        return run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], seconds, **wanted)
    os.environ |= wanted
    return build_directly(seconds)


def build_directly(seconds: float) -> int:
    """What setup.py would let ninja do, all of it anew."""
    import setup

    toolchain = setup.find_toolchain()
    cuda = setup.find_cuda(toolchain)
    assert cuda is not None, "CK_CUDA=1 without nvcc is an error"
    folder = ROOT / "build/without-ninja"
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(unit: setup.Unit) -> tuple[str, int]:
        target = str(folder / "_".join(unit.source.with_suffix(".o").parts))
        if unit.rule == "nvcc":
            command = [*cuda.nvcc, *setup.CUDA_FLAGS]
        else:
            command = [*toolchain.cxx, *setup.OPTIMISE, *setup.COMMON, *setup.WARNINGS]
        return target, run([*command, *unit.flags, "-c", str(unit.source), "-o", target], seconds)

    units = [*setup.binding_units(), *setup.cpu_units(toolchain), *setup.cuda_units(cuda)]
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(compile_one, units))
    if any(status for _, status in results):
        return 1
    module = f"contrastive_kernels/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    return run([*setup.link_command(toolchain, cuda), *(target for target, _ in results), "-o", module], 60)


def stand_in_for_pybind11(torch_include: Path) -> None:
    """Where there is no pybind11, torch's own copy of its headers serves, by a module that tells where it is."""
    if importlib.util.find_spec("pybind11") is None and (torch_include / "pybind11/pybind11.h").exists():
        headers = PACKAGES / "pybind11/include"
        headers.mkdir(parents=True)
        (headers / "pybind11").symlink_to(torch_include / "pybind11")
        (PACKAGES / "pybind11/__init__.py").write_text(
            "from pathlib import Path\n\n\ndef get_include():\n    return str(Path(__file__).parent / 'include')\n"
        )


def test(out: Path, seconds: float) -> int:
    """The tests that need a GPU."""
    if run([sys.executable, "-c", "import pytest"], 60) != 0:
        fail(f"no pytest: {ADVICE}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=40", "--durations=10"]
    command += ["--tb=short", f"--junitxml={out / 'tests.xml'}", "tests/test_gpu.py"]
    processes = min(TEST_PROCESSES, os.cpu_count() or 1)
    if importlib.util.find_spec("xdist") is not None and processes > 1:
        command += ["-n", str(processes)]
    return run(command, seconds, OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "2"))


def bench(out: Path, seconds: float) -> int:
    """Benchmark rows and plots; cases for which there is no time are left out, and named."""
    start, status = time.monotonic(), 0
    providers = "ours-triton,ours-cuda,ours-torch,dense"
    known = subprocess.run(
        [sys.executable, "-c", "from bench.providers import providers; print(','.join(providers()))"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if known.returncode != 0:
        fail(f"the benchmark does not start: {known.stderr.strip().splitlines()[-1]}")
    names = ",".join(name for name in providers.split(",") if name in known.stdout.strip().split(","))
    plots = ["--plot", str(out / "plots")] if importlib.util.find_spec("matplotlib") else []
    for arguments in BENCH:
        left = seconds - (time.monotonic() - start)
        if left < 60:
            print(f"gpu: no time for {' '.join(arguments)}", flush=True)
            continue
        command = [sys.executable, "-m", "bench", "--device", "cuda", "--provider", names, *arguments]
        status |= run([*command, "--json", str(out / "rows.json"), *plots], left)
    return status


def table(out: Path, seconds: float) -> int:
    """The rows in short: the best milliseconds, the fraction of the bare products' rate, and the error."""
    path = out / "rows.json"
    if not path.exists():
        fail(f"no rows in {path}: run the stage bench first")
    rows = json.loads(path.read_text())
    print(f"{'case':<44} {'provider':<12} {'best ms':>9} {'of floor':>9} {'error':>8}")
    for row in rows:
        case = f"{row['loss']} {row['mode']} N={row['n']} D={row['d']} {row['dtype']}"
        name = f"{row['provider']}-{row['backend']}" if row["backend"] else row["provider"]
        if row["status"] != "ok":
            print(f"{case:<44} {name:<12} {row['status']}: {row['reason'][:60]}")
            continue
        if "best_s" in row:
            figures = f"{row['best_s'] * 1e3:9.3f} {row['floor_fraction']:9.2f} {row['error']:8.0e}"
            print(f"{case:<44} {name:<12} {figures}")
    machines = {f"{row['machine']}; {row['versions'].split(',')[0]}; commit {row['commit']}" for row in rows}
    print("\n".join(sorted(machines)))
    return 0


def pack() -> None:
    """Pure Python packages (and ninja) into build/gpu-packages, for any Python."""
    shutil.rmtree(PACKAGES, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(PACKAGES), *PACKED]
    raise SystemExit(subprocess.run(command, check=False).returncode)


STAGES: dict[str, Callable[[Path, float], int]] = {"build": build, "test": test, "bench": bench, "table": table}


def main() -> None:
    """Runs the stages that are named, in their order; ends at the first that fails."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("stages", nargs="*", metavar="STAGE")
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    arguments = parser.parse_args()
    if arguments.stages == ["pack"]:
        pack()
    unknown = [stage for stage in arguments.stages if stage not in STAGES]
    if unknown:
        parser.error(f"stages are {', '.join(STAGES)} and pack, not {', '.join(unknown)}")
    stages = [name for name in STAGES if name in (arguments.stages or STAGES)]
    out = arguments.out.resolve()
    if stages != ["table"]:
        require_gpu()
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in stages:
        start = time.monotonic()
        status = STAGES[name](out, arguments.seconds)
        print(
            f"gpu: {name} {'ok' if status == 0 else f'FAILED ({status})'}: {time.monotonic() - start:.0f} s", flush=True
        )
        if status != 0:
            failed.append(name)
            if name == "build":
                break
    if failed:
        fail(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
