"""The C++ pass under sanitizers, in programs of its own without Python or torch.

tests/sanitize/panel_driver.cpp runs ragged panels in exactly sized heap buffers with every instruction set of this
machine and compares them with a plain loop in double; matrix_driver.cpp does the same with whole matrices. Under
ThreadSanitizer two callers run at once, with teams of threads that it can follow (teams.cpp).

`make sanitize` is the long form: many rounds of other numbers, and the CUDA sources in their emulator.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import emulated
import pytest

ROOT = Path(__file__).resolve().parents[2]
DRIVERS = ROOT / "tests/sanitize"
#: Rounds of the long form; 0: the short one.
ROUNDS = int(os.environ.get("SANITIZE_ROUNDS") or 0)
COMMON = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
MEMORY, THREADS = "-fsanitize=address,undefined", "-fsanitize=thread"
#: What the drivers' processes of each take: switches of rounds.h, further sources.
SWITCHES = {MEMORY: (), THREADS: ("CK_CALLERS=2", f"CK_EVERY={1 if ROUNDS else 23}")}
SOURCES = {MEMORY: (), THREADS: (DRIVERS / "teams.cpp",)}


def compile_with(cxx, arguments):
    result = subprocess.run([*cxx, *COMMON, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "warning:" not in result.stderr, result.stderr


def find_toolchain(sanitizer, folder):
    """setup.py, and the compiler where its programs run under the sanitizer."""
    setup = emulated.load_setup()
    try:
        toolchain = setup.find_toolchain()
    except setup.CompileError as error:
        pytest.skip(str(error))
    source, program = folder / "main.cpp", folder / "main"
    source.write_text("int main() {}\n")
    command = [*toolchain.cxx, *COMMON, sanitizer, source, "-o", program]
    if subprocess.run(command, capture_output=True).returncode or subprocess.run([program]).returncode:
        pytest.skip(f"no program of this compiler runs with {sanitizer}")
    if sanitizer == THREADS and (not toolchain.openmp or "clang" in " ".join(toolchain.cxx)):
        pytest.skip("teams.cpp stands in for gcc's OpenMP")
    return setup, toolchain


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Builds a driver with a sanitizer and given -D switches; the library's objects are compiled once."""
    compiled = {}

    def compile_library(sanitizer):
        folder = tmp_path_factory.mktemp("sanitize")
        setup, toolchain = find_toolchain(sanitizer, folder)
        units = setup.cpu_units(toolchain)
        objects = [folder / unit.source.with_suffix(".o").name for unit in units]
        with ThreadPoolExecutor(2) as pool:
            arguments = [
                [sanitizer, *unit.flags, "-c", unit.source, "-o", object]
                for unit, object in zip(units, objects, strict=True)
            ]
            list(pool.map(lambda each: compile_with(toolchain.cxx, each), arguments))
        return folder, toolchain, objects

    def build_driver(name, sanitizer=MEMORY, *switches):
        if sanitizer not in compiled:
            compiled[sanitizer] = compile_library(sanitizer)
        folder, toolchain, objects = compiled[sanitizer]
        program = folder / "_".join([name, *switches])
        flags = [sanitizer, *(f"-D{switch}" for switch in (*SWITCHES[sanitizer], *switches))]
        flags += toolchain.openmp if sanitizer == MEMORY else ["-pthread"]
        sources = [(DRIVERS / name).with_suffix(".cpp"), *SOURCES[sanitizer]]
        compile_with(toolchain.cxx, [*flags, *sources, *objects, "-o", program])
        return program

    return build_driver


def run(program, rounds=1):
    # passive: teams of different sizes on few cores would otherwise spin at each other
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    command = [program, str(rounds)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600 * rounds)


def expected_instruction_sets():
    """What this machine should be tested with, by /proc/cpuinfo."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    found = {"baseline"}
    if {"avx2", "fma"} <= flags:
        found.add("avx2")
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"} <= flags:
        found.add("avx512")
    return found


@pytest.mark.parametrize("sanitizer", [MEMORY, THREADS], ids=["memory", "threads"])
@pytest.mark.parametrize(("driver", "what"), [("panel_driver", "panels"), ("matrix_driver", "matrices")])
def test_the_pass_is_clean_and_right(build, driver, what, sanitizer):
    result = run(build(driver, sanitizer), ROUNDS or 1)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    tested = {line.split(":")[0] for line in result.stdout.splitlines() if line.endswith(f"{what} are right")}
    assert tested == expected_instruction_sets()


@pytest.mark.parametrize(
    ("sanitizer", "switch", "report"),
    [
        (MEMORY, "CK_INJECT_OVERRUN", "heap-buffer-overflow"),
        (MEMORY, "CK_INJECT_UNDEFINED", "signed integer overflow"),
        (THREADS, "CK_INJECT_RACE", "data race"),
    ],
)
def test_the_sanitizers_are_live(build, sanitizer, switch, report):
    result = run(build("panel_driver", sanitizer, switch))
    assert result.returncode != 0
    assert report in result.stderr


@pytest.mark.skipif(not ROUNDS, reason="minutes: make sanitize")
def test_the_cuda_sources_are_clean_in_their_emulator(tmp_path):
    """tests/backends/test_cuda_pass.py with all C++ of the extension under AddressSanitizer and UBSan."""
    _, toolchain = find_toolchain(MEMORY, tmp_path)
    flags = ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", MEMORY]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["EMULATED_EXTENSION"] = str(emulated.build("emulated-sanitized", flags))
    libraries = [
        subprocess.run([*toolchain.cxx, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    # Python's own allocations are no leaks; a fiber's stack is none of the thread's
    environment |= {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/backends/test_cuda_pass.py"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-8000:] + result.stderr[-8000:]


def test_no_function_is_shared_between_instruction_sets():
    """A weak function in a file for AVX-512 may be the copy that the linker keeps for every machine."""
    objects = sorted((ROOT / "build").glob("ninja-*/csrc/cpu/*.o"))
    if not objects:
        pytest.skip("the extension was not built in this checkout")
    for path in objects:
        try:
            listing = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout
        except FileNotFoundError:
            pytest.skip("no nm on this machine")
        weak = [line for line in listing.splitlines() if " W " in line or " u " in line]
        assert not weak, f"{path.name}: {weak}"
