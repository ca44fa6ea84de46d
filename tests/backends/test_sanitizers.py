"""The C++ pass under sanitizers, in programs of its own without Python or torch.

tests/sanitize/panel_driver.cpp runs ragged panels in exactly sized heap buffers with every instruction set of this
machine and compares them with a plain loop in double; matrix_driver.cpp does the same with whole matrices, and
product_driver.cpp with products in bfloat16, where the machine has them. Under
ThreadSanitizer two callers run at once, with teams of threads that it can follow (teams.cpp).

`make test` runs a third of the cases with the baseline's code alone, which is built in seconds. `make sanitize` runs
all: many rounds of other numbers, and the CUDA sources in their emulator.
"""

import os
import subprocess
import sys
from datetime import date
from functools import cache
from pathlib import Path

import emulated
import pytest

ROOT = Path(__file__).resolve().parents[2]
DRIVERS = Path("tests/sanitize")
#: Rounds of make sanitize; 0: none.
ROUNDS = int(os.environ.get("SANITIZE_ROUNDS") or 0)
sanitizing = pytest.mark.skipif(not ROUNDS, reason="minutes: make sanitize")
#: The part of the problems that the emulator has, K/N: every day another one.
PART = os.environ.get("SANITIZE_PART") or f"{date.today().toordinal() % 7}/7"
COMMON = ["-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
#: What is looked for; in the short form with the baseline's code alone.
SHORT, MEMORY, THREADS = "short", "memory", "threads"
FLAGS = {
    SHORT: ["-Og", "-g0", *COMMON, "-fsanitize=address,undefined"],
    MEMORY: ["-O1", "-g1", *COMMON, "-fsanitize=address,undefined"],
    THREADS: ["-O1", "-g1", *COMMON, "-fsanitize=thread"],
}
#: Callers at once; of how many cases a round takes one: the long form's rounds take all of them.
CALLERS = {SHORT: 1, MEMORY: 1, THREADS: 2}
EVERY = {SHORT: 3, MEMORY: 1, THREADS: 5}
#: The flags in /proc/cpuinfo that an instruction set needs.
NEEDS = {"avx2": {"avx2", "fma"}, "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"}}
PRODUCTS = NEEDS["avx512"] | {"avx512_bf16"}


def find_toolchain(sanitizer, folder):
    """setup.py, and the compiler where its programs run under the sanitizer."""
    setup = emulated.load_setup()
    try:
        toolchain = setup.find_toolchain()
    except setup.CompileError as error:
        pytest.skip(str(error))
    source, program = folder / "main.cpp", folder / "main"
    source.write_text("int main() {}\n")
    command = [*toolchain.cxx, *FLAGS[sanitizer], source, "-o", program]
    if subprocess.run(command, capture_output=True).returncode or subprocess.run([program]).returncode:
        pytest.skip(f"no program of this compiler runs with {FLAGS[sanitizer][-1]}")
    if sanitizer == THREADS and (not toolchain.openmp or "clang" in " ".join(toolchain.cxx)):
        pytest.skip("teams.cpp stands in for gcc's OpenMP")
    return setup, toolchain._replace(x86=toolchain.x86 and sanitizer != SHORT)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Builds the drivers with a sanitizer: once in a checkout, for all processes."""

    @cache
    def build_drivers(sanitizer):
        setup, toolchain = find_toolchain(sanitizer, tmp_path_factory.mktemp("sanitize"))
        folder = Path("build", f"sanitize-{sanitizer}")
        watch = FLAGS[sanitizer]
        missing = set(NEEDS) - expected_instruction_sets(sanitizer)
        units = [
            # what this machine cannot run is there to be linked
            unit._replace(flags=[*unit.flags, *([] if any(name in unit.source.stem for name in missing) else watch)])
            for unit in setup.cpu_units(toolchain)
        ]
        team = [setup.Unit(DRIVERS / "teams.cpp", "cxx", watch)] if sanitizer == THREADS else []
        link = ["-pthread"] if sanitizer == THREADS else toolchain.openmp
        text = f"""
ninja_required_version = 1.8
builddir = {folder}
cxx = {setup.quote([*toolchain.cxx, "-std=c++17", "-Wall", "-Wextra", "-Werror"])}
link = {setup.quote([*toolchain.cxx, *watch, *link])}
rule cxx
  command = $cxx $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $link $in -o $out
"""

        def objects_of(units):
            nonlocal text
            objects = [setup.escape(folder / unit.source.with_suffix(".o")) for unit in units]
            for unit, output in zip(units, objects):
                text += f"build {output}: cxx {setup.escape(unit.source)}\n  flags = {setup.quote(unit.flags)}\n"
            return " ".join(objects)

        library = objects_of([*units, *team])
        for name in ("panel_driver", "matrix_driver", "product_driver"):
            driver = objects_of([setup.Unit((DRIVERS / name).with_suffix(".cpp"), "cxx", watch)])
            text += f"build {folder / name}: link {driver} {library}\n"
        with emulated.locked(ROOT / folder / "lock"):
            (ROOT / folder / "build.ninja").write_text(text)
            setup.run_ninja(folder / "build.ninja")
        return ROOT / folder

    return lambda name, sanitizer: build_drivers(sanitizer) / name


def run(program, sanitizer, rounds=1, *fault):
    # passive: teams of different sizes on few cores would otherwise spin at each other
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    command = [program, *map(str, (rounds, CALLERS[sanitizer], EVERY[sanitizer])), *fault]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600 * rounds)


def expected_instruction_sets(sanitizer):
    """What this machine should be tested with, by /proc/cpuinfo."""
    if sanitizer == SHORT:
        return {"baseline"}
    return {"baseline", *(name for name, needed in NEEDS.items() if needed <= cpu_flags())}


def cpu_flags():
    """What the machine has, by /proc/cpuinfo."""
    info = Path("/proc/cpuinfo")
    return set(info.read_text().split()) if info.exists() else set()


@pytest.mark.parametrize("sanitizer", [SHORT, *(pytest.param(s, marks=sanitizing) for s in (MEMORY, THREADS))])
@pytest.mark.parametrize(("driver", "what"), [("panel_driver", "panels"), ("matrix_driver", "matrices")])
def test_the_pass_is_clean_and_right(build, driver, what, sanitizer):
    result = run(build(driver, sanitizer), sanitizer, ROUNDS or 1)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    tested = {line.split(":")[0] for line in result.stdout.splitlines() if line.endswith(f"{what} are right")}
    assert tested == expected_instruction_sets(sanitizer)


@sanitizing
@pytest.mark.parametrize("sanitizer", [MEMORY, THREADS])
def test_products_are_clean_and_right(build, sanitizer):
    result = run(build("product_driver", sanitizer), sanitizer, ROUNDS)
    assert result.returncode == 0 and result.stderr == "", result.stdout + result.stderr
    here = cpu_flags() >= PRODUCTS
    assert result.stdout.endswith("products are right\n" if here else "not on this machine\n")


@pytest.mark.parametrize(
    ("sanitizer", "fault", "report"),
    [
        (SHORT, "overrun", "heap-buffer-overflow"),
        (SHORT, "undefined", "signed integer overflow"),
        pytest.param(MEMORY, "overrun", "heap-buffer-overflow", marks=sanitizing),
        pytest.param(MEMORY, "undefined", "signed integer overflow", marks=sanitizing),
        pytest.param(THREADS, "race", "data race", marks=sanitizing),
    ],
)
def test_the_sanitizers_are_live(build, sanitizer, fault, report):
    result = run(build("panel_driver", sanitizer), sanitizer, 1, fault)
    assert result.returncode != 0
    assert report in result.stderr


@sanitizing
def test_the_cuda_sources_are_clean_in_their_emulator(tmp_path):
    """tests/backends/test_cuda_pass.py with all C++ of the extension under AddressSanitizer and UBSan."""
    _, toolchain = find_toolchain(MEMORY, tmp_path)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["EMULATED_EXTENSION"] = str(emulated.build("emulated-sanitized", FLAGS[MEMORY]))
    environment["EMULATED_PART"] = PART
    libraries = [
        subprocess.run([*toolchain.cxx, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    # Python's own allocations are no leaks; a fiber's stack is none of the thread's
    environment |= {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/backends/test_cuda_pass.py"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0 and " passed" in result.stdout, (
        f"SANITIZE_PART={PART}\n{result.stdout[-8000:]}{result.stderr[-8000:]}"
    )


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
