"""Tries an installed contrastive_kernels: run by the Python of an environment that has the wheel and nothing else.

python -I wheel_smoke_test.py CHECKOUT VARIANT

CHECKOUT    the folder that nothing may be imported from
VARIANT     cpu, or cuda with its major version: what the wheel was built for
"""

import subprocess
import sys
import sysconfig
import warnings
from functools import partial
from importlib import metadata
from pathlib import Path

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch's; the package does without NumPy

import torch  # noqa: E402

import contrastive_kernels as ck  # noqa: E402
from contrastive_kernels import reference  # noqa: E402

DISTRIBUTION = "contrastive-kernels"


def require(condition: bool, what: str) -> None:
    """Prints what holds; ends the program where it does not."""
    if not condition:
        raise SystemExit(f"wheel smoke test: failed: {what}")
    print(f"  ok: {what}")


def check_contents(checkout: Path) -> None:
    """The right files, from the right place, with the right requirements."""
    folder = Path(ck.__file__).resolve().parent
    require(checkout not in folder.parents, f"imported from {sysconfig.get_path('purelib')}, not from the checkout")
    require(metadata.version(DISTRIBUTION) == ck.__version__, f"version {ck.__version__} in metadata and package")
    needed = [line for line in metadata.requires(DISTRIBUTION) or [] if "extra ==" not in line]
    require(len(needed) == 1 and needed[0].startswith("torch"), f"requires torch alone: {needed}")
    files = [Path(str(file)) for file in metadata.files(DISTRIBUTION) or []]
    tops = {file.parts[0] for file in files if not file.parts[0].endswith(".dist-info")}
    require(tops == {"contrastive_kernels"}, f"installs one folder: {sorted(tops)}")
    names = {file.name for file in files}
    require({"py.typed", "_C.pyi"} <= names, "has py.typed and _C.pyi")
    require(not [name for name in names if name.endswith((".cpp", ".cu", ".h"))], "has no C++ sources")
    kernels = {path.name: path.read_bytes() for path in (checkout / "triton_kernels").glob("*.py")}
    installed = {path.name: path.read_bytes() for path in (folder / "_triton").glob("*.py")}
    require(not (folder / "_triton").is_symlink(), "contrastive_kernels/_triton is a folder, not the checkout's link")
    require("score.py" in kernels and installed == kernels, f"with the Triton kernels: {sorted(installed)}")


def check_libraries() -> None:
    """The extension is linked with neither torch nor CUDA, and brings no second OpenMP."""
    from contrastive_kernels import _C

    linked = subprocess.run(["ldd", _C.__file__], capture_output=True, text=True, check=True).stdout
    for unwanted in ("libtorch", "libc10", "libcudart", "libcuda.", "libpython"):
        require(unwanted not in linked, f"the extension is not linked with {unwanted}")
    require(not list(Path(_C.__file__).parents[1].glob("contrastive_kernels.libs/*gomp*")), "brings no libgomp")
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    require(len(loaded) == 1, f"one OpenMP runtime in the process: {sorted(loaded)}")


def check_loss() -> None:
    """Value and gradients of the compiled backend against the dense definition."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.nn.functional.normalize(torch.randn(257, 96, generator=generator), dim=1) for _ in range(2))
    results = []
    for loss in (partial(ck.clip_loss, backend="cpu"), reference.clip_loss):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, y, torch.tensor(20.0))]
        value = loss(*leaves)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    for name, ours, dense in zip(("value", "dx", "dy", "dlogit_scale"), *results, strict=True):
        error = ((ours - dense).abs().max() / dense.abs().max()).item()
        require(error < 1e-4, f"clip_loss, cpu backend, {name}: relative error {error:.1e}")


def check_cuda(variant: str) -> None:
    """The kernels are there, or the package says that they are not; either way it works without a GPU."""
    from contrastive_kernels.backends import cuda

    build, reason = cuda.build(), ck.why_not("cuda", torch.zeros(2, 2))
    if variant.startswith("cuda"):
        version = f"CUDA {variant.removeprefix('cuda')}"
        require(build is not None and version in build and "sm_" in build, f"has CUDA kernels: {build}")
        require(reason is not None and "not on cpu" in reason, f"says why they do not run here: {reason}")
    else:
        require(build is None, "has no CUDA kernels")
        require(reason is not None and "built without CUDA" in reason, f"and says so: {reason}")


def check_report() -> None:
    """`python -m contrastive_kernels` works, names the backends and says what they lack."""
    command = [sys.executable, "-I", "-m", "contrastive_kernels"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    require(ck.__version__ in report and "torch" in report and "cpu" in report, "python -m contrastive_kernels reports")
    reason = ck.why_not("cuda", torch.zeros(2, 2))
    require(reason is None or reason in report, "and says why there is no CUDA")


if __name__ == "__main__":
    check_contents(Path(sys.argv[1]).resolve())
    check_libraries()
    check_loss()
    check_cuda(sys.argv[2])
    check_report()
    print(f"wheel smoke test: passed with torch {torch.__version__}, Python {sys.version.split()[0]}")
