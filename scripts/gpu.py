"""Builds, tests and measures on this machine's GPU, with the Python that runs this file, and without a network.

python scripts/gpu.py [STAGE ...] [--out DIR] [--seconds S] [--total T]    (all stages, if none is named)

where      the machine: the GPU's clocks and limits, the CPU, versions
build      the extension in place, for this machine's GPUs
smoke      one step of every loss and backend on small problems: is it right at all?
test       the tests that need a GPU
timeline   one step kernel by kernel, with the gaps between them: where its time goes
shapes     the two gradient products in panels of several shapes, beside what the machine can do
goals      the promised ratios, against the formula, the bare products and whatever peer is installed
sanitize   compute-sanitizer's memcheck, racecheck and initcheck on small problems
overlap    a pass over all panels on one stream and on two, and the time to issue it
tiles      the tiles of the Triton kernels, and the line of the table that the fastest would make
bench      benchmark rows: sizes, widths, losses, dtypes
profile    what limits the kernels, by Nsight Compute
table      a short table of all rows

All that a run leaves in DIR, but for the built library, is in DIR.tar.gz beside it after every stage.

python scripts/gpu.py pack    on a machine with a network: what that Python may lack, into build/gpu-packages, and what
                              the benchmark compares with, into build/gpu-peers; bring the first where it is needed

Stages come in this order. Each can run alone and again (what DIR has of the same commit is not measured twice), ends
within its own time (or S seconds and a few), and exits with another status than 0 where something failed; the others
follow all the same. T seconds bound all of them together. What a stage had found when its time was up is in DIR.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "scripts"))

from gpu_results import KERNELS, findings, pack_results, table  # noqa: E402

PACKAGES = ROOT / "build/gpu-packages"
PEERS = ROOT / "build/gpu-peers"
#: Seconds of a stage, with room for its start and its end; of those not named, SECONDS.
SECONDS = 500.0
LIMITS = {
    "where": 20.0,
    "build": 200.0,
    "smoke": 240.0,
    "timeline": 60.0,
    "test": 300.0,
    "shapes": 60.0,
    "goals": 240.0,
    "sanitize": 150.0,
    "overlap": 60.0,
    "tiles": 120.0,
    "profile": 90.0,
}
#: A stage with fewer seconds than this is left out.
LEAST = 10.0
#: Seconds that a stopped command has for telling what it found.
LAST_WORDS = 20.0
#: Processes of the tests and of compiling, which leave the GPU idle most of the time.
PROCESSES = 12
#: In turn, as long as there is time: what shows most of the kernels first. Loss, N, D, dtype, mode, who is measured
#: beside ours and dense, and further options.
BENCH = (
    ("clip_loss", "32768", "64,128,256,512,1024", "bfloat16", "fwd+bwd", ""),
    ("sigmoid,decomposable,info_nce,nt_xent", "16384", "768", "bfloat16", "fwd+bwd", "dense-compiled"),
    ("clip_loss", "16384", "768", "bfloat16", "fwd,fwd+bwd", "dense-compiled,linear-cross-entropy"),
    ("clip_loss", "16384", "64,1024", "bfloat16", "fwd+bwd", "memeff,inf-cl", "--fixed-scale"),
    ("clip_loss", "1024,2048,131072,262144", "768", "bfloat16", "fwd+bwd", ""),
    ("clip_loss", "32768", "512", "float16", "fwd+bwd", ""),
    ("clip_loss", "16384", "512", "tf32,float32", "fwd+bwd", ""),
)
PACKED = ("pytest>=8", "pytest-xdist>=3.6", "pybind11>=2.13", "ninja>=1.11", "setuptools>=77", "rich>=13")
#: Peers in pure Python, without what they depend on: torch and Triton are there.
PACKED_PEERS = ("memeff==0.3.1", "siglip-kernel==0.1.2", "inf-cl==1.2.1")

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
    paths = [str(ROOT), str(PACKAGES), str(PEERS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **more}


def run(command: list[str], seconds: float, **more: str) -> int:
    """Runs a command in the checkout for at most so long; its exit status, 124 where it was stopped.

    It leads a process group, which ends as a whole: a test's worker that lived on would hold the GPU.
    """
    print(f"gpu: {' '.join(command)}", flush=True)
    listen = partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # a shell's background jobs do not
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(**more), preexec_fn=listen, start_new_session=True
    ) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            print(f"gpu: stopped after {seconds:.0f} s", flush=True)
            process.send_signal(signal.SIGINT)  # pytest then says what failed, and writes it down
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LAST_WORDS)
            return 124
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def build(out: Path, seconds: float) -> int:
    """The extension in place, for this machine's GPUs; a copy in DIR spares another machine of the kind the build."""
    status = build_in_place(seconds)
    for module in (ROOT / "contrastive_kernels").glob(f"_C*{sysconfig.get_config_var('EXT_SUFFIX')}"):
        if status == 0:
            shutil.copy2(module, out)
    return status


def build_in_place(seconds: float) -> int:
    """By setup.py and ninja, or without them."""
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
    command += ["--tb=short", f"--junitxml={out / 'tests.xml'}", "-o", "faulthandler_timeout=60"]
    command.append("tests/backends/test_gpu.py")
    processes = min(PROCESSES, os.cpu_count() or 1)
    if importlib.util.find_spec("xdist") is not None and processes > 1:
        command += ["-n", str(processes)]
    # inductor's pool of compilers in each of a dozen processes would be ten dozens
    more = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return run(command, seconds, **more)


def known_providers() -> list[str]:
    """Everybody whom the benchmark knows and who is installed."""
    program = (
        "from bench.providers import providers as p; print(*(n for n, v in p().items() if v.why_absent() is None))"
    )
    known = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    if known.returncode != 0:
        fail(f"the benchmark does not start: {known.stderr.strip().splitlines()[-1]}")
    return known.stdout.split()


def smoke(out: Path, seconds: float) -> int:
    """One step of two losses on every backend, of one panel and of several, against float64."""
    program = [sys.executable, "-m", "bench.once", "--case", "clip_loss,sigmoid", "--dtype", "bfloat16"]
    start = time.monotonic()
    status = run(program, seconds / 2)  # the first kernels of a machine take their time: half a minute and more
    left = seconds - (time.monotonic() - start)
    return status or run([*program, "--n", "1000", "--d", "64", "--workspace", str(2**20)], left)


def where(out: Path, seconds: float) -> int:
    """What the machine is, into DIR."""
    commands = (
        ["nvidia-smi", "-q", "-d", "CLOCK,POWER,PERFORMANCE,MEMORY"],
        ["lscpu"],
        ["ldconfig", "-p"],
        [sys.executable, "-m", "pip", "list"],
    )
    with (out / "machine.txt").open("w") as file:
        for command in commands:
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=seconds / 4, check=False)
            except (OSError, subprocess.TimeoutExpired) as error:
                file.write(f"$ {' '.join(command)}\n{error}\n\n")
            else:
                file.write(f"$ {' '.join(command)}\n{done.stdout}{done.stderr}\n\n")
    return 0


def timeline(out: Path, seconds: float) -> int:
    """One step kernel by kernel: of large and of small batches, with two sizes of the workspace."""
    return kernels("timeline", out, seconds, "--d", "768,512")


def shapes(out: Path, seconds: float) -> int:
    """The gradient products in panels of several shapes."""
    return kernels("products", out, seconds, "--d", "768,512,256,1024")


def overlap(out: Path, seconds: float) -> int:
    """A pass over all panels on one stream and on two."""
    return kernels("overlap", out, seconds, "--d", "768,512")


def tiles(out: Path, seconds: float) -> int:
    """Every tile that could serve, compiled by many processes and timed by one."""
    processes = str(min(PROCESSES, os.cpu_count() or 1))
    return kernels("tiles", out, seconds, "--d", "768,512,256", "--rounds", "1", "--processes", processes)


def kernels(what: str, out: Path, seconds: float, *arguments: str) -> int:
    """One stage of bench.kernels, which begins nothing in its last seconds."""
    command = [sys.executable, "-m", "bench.kernels", what, "--json", str(out / "kernels.json")]
    return run([*command, "--seconds", f"{0.8 * seconds:.0f}", *arguments], seconds)


def goals(out: Path, seconds: float) -> int:
    """The promised ratios; of the groups that are finished where the time is short."""
    command = [sys.executable, "-m", "bench", "--goals", "--device", "cuda", "--resume"]
    return run([*command, "--json", str(out / "rows.json")], seconds)


def bench(out: Path, seconds: float) -> int:
    """Benchmark rows; cases for which there is no time are left out, and named."""
    start, status, known = time.monotonic(), 0, known_providers()
    for loss, n, d, dtype, mode, more, *options in BENCH:
        left = seconds - (time.monotonic() - start)
        case = ["--case", loss, "--n", n, "--d", d, "--dtype", dtype, "--mode", mode]
        if left < 30:
            print(f"gpu: no time for {' '.join(case)}", flush=True)
            continue
        named = ["ours-triton", "ours-cuda", "dense", *more.split(",")]
        command = [sys.executable, "-m", "bench", "--device", "cuda", "--resume", *case, *options]
        command += ["--provider", ",".join(name for name in named if name in known)]
        status |= run([*command, "--json", str(out / "rows.json")], left)
    return status


def sanitize(out: Path, seconds: float) -> int:
    """compute-sanitizer's tools side by side; each one's findings in DIR, by kernel."""
    if (program := find_tool("compute-sanitizer")) is None:
        print("gpu: no compute-sanitizer on this machine", flush=True)
        return 0
    # No caching allocator: a byte past a tensor's end is then a byte past an allocation's.
    more = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    steps = [sys.executable, "-m", "bench.once", "--no-check", "--backend", "triton,cuda", "--n", "200", "--d", "72"]
    run(steps, seconds / 3)  # Triton's compiler works better unobserved

    def watch(tool: str) -> tuple[str, int]:
        log = out / f"{tool}.txt"
        command = [program, "--tool", tool, "--report-api-errors", "no", "--log-file", str(log), *steps]
        status = run(command, 2 * seconds / 3, **more)
        return findings(tool, log.read_text(errors="replace") if log.exists() else "", status)

    with ThreadPoolExecutor() as pool:
        watched = list(pool.map(watch, ("memcheck", "racecheck", "initcheck")))
    print("\n".join(text for text, _ in watched), flush=True)
    return max(status for _, status in watched)


def profile(out: Path, seconds: float) -> int:
    """Nsight Compute's sections for our kernels and the products that follow them, into DIR."""
    if (program := find_tool("ncu")) is None:
        print("gpu: no ncu on this machine", flush=True)
        return 0
    status = 0
    # As they come: caches and clocks stay as the program leaves them.
    options = ["--clock-control", "none", "--cache-control", "none", "--print-summary", "per-kernel"]
    options += ["--target-processes", "application-only"]
    for section in ("SpeedOfLight", "LaunchStats", "Occupancy", "WarpStateStats", "MemoryWorkloadAnalysis"):
        options += ["--section", section]
    for backend in ("triton", "cuda"):
        steps = [sys.executable, "-m", "bench.once", "--no-check", "--backend", backend, "--case", "clip_loss"]
        steps += ["--dtype", "bfloat16", "--n", "16384", "--d", "768"]
        run(steps, seconds / 4)
        names = ["--kernel-name", f"regex:{'|'.join(KERNELS)}|gemm|nvjet", "--launch-count", "24"]
        log = out / f"profile-{backend}.txt"
        status |= run([program, *options, *names, "--log-file", str(log), *steps], seconds / 4)
        if log.exists():
            wanted = re.compile(
                r"^  \w.*Context|Duration|Throughput +%|Theoretical Occ|Achieved Occ|Registers Per|L2 Hit"
            )
            print("\n".join(line[:110] for line in log.read_text().splitlines() if wanted.search(line)), flush=True)
    return status


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: in PATH, beside nvcc, or where NVIDIA's packages put it."""
    nvcc = shutil.which("nvcc")
    folders = [Path(nvcc).resolve().parent] if nvcc else []
    folders += [
        Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin"),
        *Path("/opt/nvidia/nsight-compute").glob("*"),
    ]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(map(str, folders)))


def pack() -> None:
    """Pure Python packages (and ninja), for any Python; peers without what they depend on."""
    status = 0
    for folder, packages in ((PACKAGES, PACKED), (PEERS, ("--no-deps", *PACKED_PEERS))):
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-compile", "--target", str(folder), *packages]
        status |= subprocess.run(command, check=False).returncode
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
        print(f"gpu: {size:.1f} MiB in {folder.relative_to(ROOT)}", flush=True)
    raise SystemExit(status)


STAGES: dict[str, Callable[[Path, float], int]] = {
    "where": where,
    "build": build,
    "smoke": smoke,
    "timeline": timeline,
    "test": test,
    "shapes": shapes,
    "goals": goals,
    "sanitize": sanitize,
    "overlap": overlap,
    "tiles": tiles,
    "bench": bench,
    "profile": profile,
    "table": table,
}


def main() -> None:
    """Runs the stages that are named, in their order, as long as there is time."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("stages", nargs="*", metavar="STAGE")
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu")
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--total", type=float)
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
    begun, failed = time.monotonic(), []
    for name in stages:
        start = time.monotonic()
        seconds = arguments.seconds or LIMITS.get(name, SECONDS)
        if arguments.total is not None and name != "table":
            seconds = min(seconds, arguments.total - LAST_WORDS - (start - begun))
            if seconds < LEAST:
                print(f"gpu: no time for {name}", flush=True)
                failed.append(name)
                continue
        status = STAGES[name](out, seconds)
        print(
            f"gpu: {name} {'ok' if status == 0 else f'FAILED ({status})'}: {time.monotonic() - start:.0f} s", flush=True
        )
        pack_results(out)
        if status != 0:  # without a build the other backends can still be tried
            failed.append(name)
    if failed:
        fail(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
