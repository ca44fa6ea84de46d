"""csrc/cuda through the real nvcc, for one architecture and without a GPU: no warnings, no spills, and it loads."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import sysconfig
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import emulated
import pytest
import torch
from panels import Case, make_panel, start_states
from thorough import LONG, THOROUGH

from contrastive_kernels.backends import cuda
from contrastive_kernels.panels.panel import Side
from contrastive_kernels.panels.terms import EXPONENTIAL

BACKEND = cuda.CudaBackend()
ROOT = Path(__file__).resolve().parents[2]
ARCH = "90"
#: Registers of a thread at two blocks of 256 threads on a multiprocessor.
MOST_REGISTERS = 128
#: Bytes stored and loaded: an address or two that is put aside, not what is in the loops.
MOST_SPILLED = 64


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """(the extension's path, what ptxas says of each kernel, by its demangled name)."""
    setup = emulated.load_setup()
    nvcc = setup.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc on this machine")
    built = ROOT / f"build/ninja-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    native_objects = [*sorted((built / "csrc/cpu").glob("*.o")), *sorted((built / "csrc").glob("*.o"))]
    if len(native_objects) < 3:
        pytest.skip("the extension was not built in this checkout")
    toolchain = setup.find_toolchain()
    compiler = setup.CudaToolchain([nvcc, "-ccbin", toolchain.cxx[0]], [ARCH])
    folder = tmp_path_factory.mktemp("cuda")

    def compile_one(unit):
        object = folder / unit.source.with_suffix(".o").name
        flags = [*setup.CUDA_FLAGS, *unit.flags, "-Werror=all-warnings", "-Xptxas=-v"]
        return object, run([*compiler.nvcc, *flags, "-c", unit.source, "-o", object])

    with ThreadPoolExecutor(2) as pool:
        compiled = list(pool.map(compile_one, setup.cuda_units(compiler)))
    target = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    objects = [*native_objects, *(object for object, _ in compiled)]
    run([*setup.link_command(toolchain, compiler), *objects, "-o", target])
    return target, read_ptxas("".join(output for _, output in compiled))


def run(command):
    """The command's output; an error or a warning in it fails the test."""
    result = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr, result.stderr
    return result.stderr


def read_ptxas(text):
    """{kernel: (registers, bytes spilled)} of ptxas's -v."""
    demangled = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout
    found = {}
    for part in demangled.split("Compiling entry function '")[1:]:
        spills = re.findall(r"(\d+) bytes spill", part)
        found[part.partition("'")[0]] = (int(re.search(r"Used (\d+) registers", part)[1]), sum(map(int, spills)))
    return found


@pytest.mark.skipif(not THOROUGH, reason=LONG)
def test_oldest_architecture_compiles(tmp_path):
    setup = emulated.load_setup()
    nvcc = setup.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc on this machine")
    oldest = setup.RELEASE_ARCHS.split(";")[0]  # without the tensor cores' kernels, which are empty there
    compiler = setup.CudaToolchain([nvcc, "-ccbin", setup.find_toolchain().cxx[0]], [oldest])

    def compile_one(unit):
        flags = [*setup.CUDA_FLAGS, *unit.flags, "-Werror=all-warnings"]
        return run([*compiler.nvcc, *flags, "-c", unit.source, "-o", tmp_path / unit.source.with_suffix(".o").name])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, setup.cuda_units(compiler)))


def test_kernels_fit_in_registers(build):
    _, kernels = build
    names = " ".join(kernels)
    assert all(name in names for name in ("panel_pass_kernel", "tensor_core_kernel", "merge_kernel"))
    for name, (registers, spilled) in kernels.items():
        assert registers <= MOST_REGISTERS, f"{name}: {registers} registers"
        assert spilled <= MOST_SPILLED, f"{name}: {spilled} bytes spilled"


def test_the_library_is_linked_with_nothing_of_cuda(build):
    target, _ = build
    linked = subprocess.run(["ldd", target], capture_output=True, text=True, check=True).stdout
    for unwanted in ("libtorch", "libc10", "libcudart", "libcuda.", "libpython"):
        assert unwanted not in linked


def test_the_library_loads_and_tells_what_it_lacks(build, monkeypatch):
    target, _ = build
    spec = importlib.util.spec_from_file_location("with_cuda._C", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(cuda, "_C", module)
    assert re.fullmatch(rf"CUDA \d+\.\d, sm_{ARCH}", cuda.build())
    assert BACKEND.why_not(torch.device("cpu"), torch.float32) == "it serves tensors on CUDA devices, not on cpu"
    for capability, served in ((75, False), (80, False), (90, True), (100, False)):
        assert (BACKEND.why_not_capability(capability, torch.float16) is None) == served
    assert "float64" in BACKEND.why_not_capability(90, torch.float64)
    if torch.cuda.is_available():
        return
    case = Case(5, 7)
    panel = make_panel(case.scores, case.params, row=Side(start_states(case)[0][0]))
    with pytest.raises(RuntimeError, match=r"contrastive_kernels: cuda.*(driver|device)"):
        BACKEND.reduce_panel(EXPONENTIAL, panel)
    assert re.search(r"cuda.*(driver|device)", module.cuda_why_not(0))


def test_a_gpu_is_served_by_its_generation_or_by_ptx(monkeypatch):
    built = types.SimpleNamespace(cuda_version=lambda: 13000, cuda_architectures=lambda: "75_86_90_90PTX")
    monkeypatch.setattr(cuda, "_C", built)
    assert cuda.build() == "CUDA 13.0, sm_75, sm_86, sm_90, PTX 90"
    served = {
        arch: BACKEND.why_not_capability(arch, torch.float16) is None for arch in (70, 75, 80, 86, 89, 90, 100, 120)
    }
    assert served == {70: False, 75: True, 80: False, 86: True, 89: True, 90: True, 100: True, 120: True}
    assert BACKEND.why_not_capability(75, torch.bfloat16) == "bfloat16 needs compute capability 8.0"
    assert BACKEND.why_not_capability(80, torch.float16).endswith("PTX 90, and this GPU has compute capability 8.0")


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        ("90", ["90"]),
        ("75;80 86,100", ["75", "80", "86", "100"]),
        ("80;90;+PTX", ["80", "90", "90+PTX"]),
        ("90+PTX", ["90", "90+PTX"]),
    ],
)
def test_architectures(text, archs):
    assert emulated.load_setup().parse_archs(text) == archs


@pytest.mark.parametrize("text", ["sm_90", "9", "90+ptx", "+PTX", "90;all", "90+PTX;x"])
def test_wrong_architectures_are_refused(text):
    with pytest.raises(SystemExit, match="CK_ARCHS: expected a list such as"):
        emulated.load_setup().parse_archs(text)
