"""csrc/cuda through the real nvcc, for one architecture and without a GPU: no warnings, no spills, and it loads."""

from __future__ import annotations

import importlib.util
import re
import subprocess
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


def load_registers():
    """scripts/registers.py as a module."""
    spec = importlib.util.spec_from_file_location("ck_registers", ROOT / "scripts/registers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """(the extension's path, what ptxas says of its kernels)."""
    if not THOROUGH:
        pytest.skip(f"{LONG}; make wheel compiles and counts as well")
    setup = emulated.load_setup()
    nvcc = setup.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc on this machine")
    native_objects = emulated.native_objects()
    if not native_objects:
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
    return target, "".join(output for _, output in compiled)


def run(command):
    """The command's output; an error or a warning in it fails the test."""
    result = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr, result.stderr
    return result.stderr


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
    assert not load_registers().wrong(build[1])


PTXAS = """ptxas info    : Compiling entry function '{0}' for 'sm_{1}'
ptxas info    : Function properties for {0}
    0 bytes stack frame, {3} bytes spill stores, {3} bytes spill loads
ptxas info    : Used {2} registers, used 1 barriers, 588 bytes cmem[0]
"""


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (("merge_kernel", 90, 40, 0), []),
        (("merge_kernel", 90, 129, 0), ["merge_kernel: 129 registers"]),
        (("merge_kernel", 90, 128, 40), ["merge_kernel: 80 bytes spilled"]),
        (("merge_kernel", 80, 255, 400), ["no merge_kernel for sm_90"]),
    ],
)
def test_what_ptxas_says_is_read(changed, expected):
    others = (("panel_pass_kernel", 90, 128, 32), ("tensor_core_kernel", 90, 127, 0), ("merge_kernel", 75, 255, 0))
    assert load_registers().wrong("".join(PTXAS.format(*kernel) for kernel in (*others, changed))) == expected


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
