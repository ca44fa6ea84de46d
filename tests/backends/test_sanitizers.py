"""The C++ pass under AddressSanitizer and UndefinedBehaviorSanitizer, in a program of its own without Python or torch.

tests/sanitize/panel_driver.cpp runs ragged panels in exactly sized heap buffers with every instruction set of this
machine and compares them with a plain loop in double; matrix_driver.cpp does the same with whole matrices.
"""

import importlib.util
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DRIVERS = ROOT / "tests/sanitize"
SANITIZE = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-fno-omit-frame-pointer"]
SANITIZE += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def load_setup():
    """setup.py as a module: its toolchain and its flags for each source file."""
    spec = importlib.util.spec_from_file_location("ck_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_with(cxx, arguments):
    result = subprocess.run([*cxx, *SANITIZE, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "warning:" not in result.stderr, result.stderr


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Builds a driver with given -D switches; the library's objects are compiled once."""
    setup = load_setup()
    try:
        toolchain = setup.find_toolchain()
    except setup.CompileError as error:
        pytest.skip(str(error))
    if not setup.compiles(toolchain.cxx, SANITIZE, "int main() {}\n"):
        pytest.skip("this compiler has no AddressSanitizer")
    folder = tmp_path_factory.mktemp("sanitize")
    units = setup.cpu_units(toolchain)
    objects = [folder / unit.source.with_suffix(".o").name for unit in units]
    with ThreadPoolExecutor(2) as pool:
        arguments = [
            [*unit.flags, "-c", unit.source, "-o", object] for unit, object in zip(units, objects, strict=True)
        ]
        list(pool.map(lambda each: compile_with(toolchain.cxx, each), arguments))

    def build_driver(name, *switches):
        program = folder / "_".join([name, *switches])
        defines = [f"-D{switch}" for switch in switches]
        source = (DRIVERS / name).with_suffix(".cpp")
        compile_with(toolchain.cxx, [*toolchain.openmp, *defines, source, *objects, "-o", program])
        return program

    return build_driver


def run(program):
    # passive: teams of different sizes on few cores would otherwise spin at each other
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    return subprocess.run([program], capture_output=True, text=True, env=environment, timeout=600)


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


@pytest.mark.parametrize(("driver", "what"), [("panel_driver", "panels"), ("matrix_driver", "matrices")])
def test_the_pass_is_clean_and_right(build, driver, what):
    result = run(build(driver))
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    tested = {line.split(":")[0] for line in result.stdout.splitlines() if line.endswith(f"{what} are right")}
    assert tested == expected_instruction_sets()


@pytest.mark.parametrize(
    ("switch", "report"),
    [("CK_INJECT_OVERRUN", "heap-buffer-overflow"), ("CK_INJECT_UNDEFINED", "signed integer overflow")],
)
def test_the_sanitizers_are_live(build, switch, report):
    result = run(build("panel_driver", switch))
    assert result.returncode != 0
    assert report in result.stderr


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
