"""Builds contrastive_kernels._C, a pybind11 extension that knows nothing of torch. The rest is in pyproject.toml.

Environment variables of the build (there are none at run time):

CK_EXTENSION    1 (the default): build the extension; the installation fails if the compiler does.
                0: do without; the package runs on the torch backend and says so (the default on Windows).
                auto: build it where that works, do without where it does not.
CK_CUDA         auto (the default): with CUDA where there is nvcc and an NVIDIA GPU, for that GPU: it takes seconds.
                1: with CUDA, for the architectures of CK_ARCHS; the installation fails where there is no nvcc.
                0: without; the package then says so, and runs on its other backends.
CK_ARCHS        what CK_CUDA=1 (or auto) compiles for, as in "80;90;+PTX": SASS for each, and PTX of the last one for
                GPUs to come. "native": this machine's GPUs. The default of CK_CUDA=1 is every supported one.
CUDA_HOME       where the CUDA toolkit is; otherwise the nvcc in PATH, then that of /usr/local/cuda.
CXX             the compiler; otherwise the first of c++, g++ and clang++.
CXXFLAGS        before our own flags, so that the optimisation level stays ours.
LDFLAGS         after our own flags.

The work is done by ninja in build/ninja-*, which is kept: only what changed is compiled again, headers included.
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent

OPTIMISE = ["-O3", "-g0"]
# No -ffast-math: NaN, infinities and the order of additions mean what they say.
COMMON = shlex.split("-std=c++17 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -ffp-contract=fast")
WARNINGS = ["-Wall", "-Wextra"]

# Translation units by instruction set (`*_avx2.cpp`), chosen among at run time; every other file is for the baseline.
ISA_FLAGS = {
    "avx2": shlex.split("-mavx2 -mfma -mf16c"),
    "avx512": shlex.split("-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512"),
}
ISA_FLAGS["avx512bf16"] = [*ISA_FLAGS["avx512"], "-mavx512bf16"]

#: From Turing (the tensor-core kernels from Ampere) to Blackwell, and PTX for what comes later.
RELEASE_ARCHS = "75;80;86;89;90;100;+PTX"
# Denormals, division and roots as IEEE has them; NaN and infinities mean what they say on the device too.
CUDA_FLAGS = ["-std=c++17", "-O3", "--threads=0", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]


class Toolchain(NamedTuple):
    """What the compiler is and can do."""

    cxx: list[str]  # the command and the user's own flags
    x86: bool
    openmp: list[str]  # empty where there is none (Apple's clang): one thread
    bfloat16: bool  # knows AVX512_BF16 (gcc from 10, clang from 9 on)


class Unit(NamedTuple):
    """One source file, the ninja rule that compiles it and its own flags."""

    source: Path
    rule: str
    flags: list[str]


def compiles(cxx: list[str], flags: list[str], program: str) -> bool:
    """Whether a program compiles and links with these flags."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(program)
        command = [*cxx, *flags, str(source), "-o", str(source.with_suffix(""))]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def find_toolchain() -> Toolchain:
    """The compiler to use; CompileError where there is none that works."""
    names = shlex.split(os.environ.get("CXX", "")) or [name for name in ("c++", "g++", "clang++") if shutil.which(name)]
    if not names:
        raise CompileError("no C++ compiler: neither $CXX nor c++, g++ or clang++ was found")
    cxx = names if os.environ.get("CXX") else names[:1]
    cxx += shlex.split(os.environ.get("CXXFLAGS", "")) + shlex.split(os.environ.get("ARCHFLAGS", ""))
    if not compiles(cxx, ["-std=c++17"], "#include <memory>\nint main() {}\n"):
        raise CompileError(f"the C++ compiler does not work: {shlex.join(cxx)} cannot build a C++17 program")
    return Toolchain(
        cxx=cxx,
        x86=compiles(cxx, [], "#ifndef __x86_64__\n#error other\n#endif\nint main() {}\n"),
        openmp=["-fopenmp"] if compiles(cxx, ["-fopenmp"], "#include <omp.h>\nint main() {}\n") else [],
        bfloat16=compiles(cxx, ISA_FLAGS["avx512bf16"], "#include <immintrin.h>\n__m512bh value;\nint main() {}\n"),
    )


class CudaToolchain(NamedTuple):
    """The CUDA compiler and what it compiles for."""

    nvcc: list[str]  # the command with its host compiler
    archs: list[str]  # "75", ..., "90"; "90+PTX" for PTX

    def flags(self) -> list[str]:
        """-gencode for each architecture, and their names for the library to tell."""
        codes = []
        for arch in self.archs:
            number, _, ptx = arch.partition("+")
            code = "compute" if ptx else "sm"
            codes.append(f"-gencode=arch=compute_{number},code={code}_{number}")
        # a preprocessing number, which needs no quotes on its way through shells; split again in backends/cuda.py
        return [*codes, "-DCK_CUDA_ARCHITECTURES=" + "_".join(self.archs).replace("+", "")]


def find_nvcc() -> str | None:
    """The path of nvcc: of $CUDA_HOME, of PATH, of /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME")
    if home:
        return shutil.which("nvcc", path=str(Path(home, "bin")))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def native_archs() -> list[str]:
    """The architectures of this machine's NVIDIA GPUs, as its driver's tool tells them."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, "--query-gpu=compute_cap", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.findall(r"^(\d+)\.(\d+)\s*$", result.stdout, flags=re.MULTILINE) if result.returncode == 0 else []
    return sorted({major + minor for major, minor in found}, key=int)


def parse_archs(text: str) -> list[str]:
    """ "80;90;+PTX" as ["80", "90", "90+PTX"]; SystemExit for what is no such list."""
    archs: list[str] = []
    for part in filter(None, re.split(r"[;,\s]+", text)):
        number, plus, ptx = part.partition("+")
        if not re.fullmatch(r"(\d{2,3}[af]?)?", number) or (plus and ptx != "PTX") or not (number or archs):
            raise SystemExit(f"CK_ARCHS: expected a list such as 80;90;+PTX, or native; got {text!r}")
        archs += [number] if number else []
        archs += [archs[-1] + "+PTX"] if ptx else []
    return archs


def find_cuda(toolchain: Toolchain) -> CudaToolchain | None:
    """The CUDA compiler where CK_CUDA wants it; None: without. CompileError where it is wanted and missing."""
    wanted, text = os.environ.get("CK_CUDA") or "auto", os.environ.get("CK_ARCHS") or ""
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(f"CK_CUDA: expected 0, 1 or auto, got {wanted!r}")
    nvcc = None if wanted == "0" else find_nvcc()
    if nvcc is None:
        if wanted == "1":
            raise CompileError("CK_CUDA=1, and no nvcc: put it in PATH, or set CUDA_HOME")
        return None
    if text == "native" or (wanted == "auto" and not text):
        archs = native_archs()
        if not archs and text == "native":
            raise CompileError("CK_ARCHS=native, and nvidia-smi tells of no GPU")
    elif text:
        archs = parse_archs(text)
    else:  # an older nvcc does without the newest ones
        listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout
        archs = parse_archs(";".join(part for part in RELEASE_ARCHS.split(";") if part in listing or part == "+PTX"))
    return CudaToolchain([nvcc, "-ccbin", toolchain.cxx[0]], archs) if archs else None


def cuda_units(cuda: CudaToolchain | None) -> list[Unit]:
    """csrc/cuda, or what stands in for it."""
    if cuda is None:
        return [Unit(Path("csrc/cuda/absent.cpp"), "cxx", [])]
    return [Unit(path.relative_to(ROOT), "nvcc", cuda.flags()) for path in sorted((ROOT / "csrc/cuda").glob("*.cu"))]


def isa_of(source: Path) -> str:
    """What stands behind the last _ of a source's name: for the files of an instruction set, which one."""
    return source.stem.rpartition("_")[2]


def cpu_units(toolchain: Toolchain) -> list[Unit]:
    """The torch-free, Python-free C++ of csrc/cpu."""
    bfloat16 = toolchain.x86 and toolchain.bfloat16
    known = ["-DCK_X86=1"] * toolchain.x86 + ["-DCK_BFLOAT16=1"] * bfloat16
    shared = [*(toolchain.openmp or ["-Wno-unknown-pragmas"]), *known]
    left_out = set() if bfloat16 else {"avx512bf16"} if toolchain.x86 else set(ISA_FLAGS)
    sources = sorted(path.relative_to(ROOT) for path in (ROOT / "csrc/cpu").glob("*.cpp"))
    return [
        Unit(source, "cxx", [*shared, *ISA_FLAGS.get(isa_of(source), [])])
        for source in sources
        if isa_of(source) not in left_out
    ]


def built_from() -> list[str]:
    """What the extension says of its sources, by which the package knows that it belongs to it."""
    version = re.search(r'^__version__ = "([^"]+)"', (ROOT / "contrastive_kernels/__init__.py").read_text(), re.M)
    sources = runpy.run_path(str(ROOT / "contrastive_kernels/backends/sources.py"))
    return [f'-DCK_VERSION="{version[1] if version else ""}"', f'-DCK_SOURCES="{sources["digest"](ROOT)}"']


def binding_units() -> list[Unit]:
    """csrc/bindings.cpp, the only file that sees Python and pybind11, and what it tells of the build."""
    import pybind11

    paths = sysconfig.get_paths()
    if not Path(paths["include"], "Python.h").exists():
        raise CompileError(f"no Python.h in {paths['include']}: install this Python's headers (Debian: python3-dev)")
    folders = dict.fromkeys([paths["include"], paths["platinclude"], pybind11.get_include()])
    includes = [flag for folder in folders for flag in ("-isystem", folder)]
    return [
        Unit(Path("csrc/bindings.cpp"), "cxx", includes),
        Unit(Path("csrc/built_from.cpp"), "cxx", built_from()),
    ]


def escape(text: str | Path) -> str:
    """A path as it stands in a build statement of ninja."""
    return str(text).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def quote(arguments: list[str]) -> str:
    """Arguments as they stand in a variable of ninja."""
    return shlex.join(arguments).replace("$", "$$")


def link_command(toolchain: Toolchain, cuda: CudaToolchain | None) -> list[str]:
    """The linker and its flags; nvcc links the CUDA runtime in, statically."""
    if sys.platform == "darwin":
        shared = ["-bundle", "-undefined", "dynamic_lookup"]
    else:
        shared = ["-shared", "-Wl,--exclude-libs,ALL"]
    flags = [*shared, *toolchain.openmp, *shlex.split(os.environ.get("LDFLAGS", ""))]
    if cuda is None:
        return [*toolchain.cxx, *flags]
    passed = []  # nvcc cuts the values of -Xcompiler at commas
    for flag in flags:
        parts = flag.split(",")
        passed += [f"-Xlinker={part}" for part in parts[1:]] if parts[0] == "-Wl" else [f"-Xcompiler={flag}"]
    return [*cuda.nvcc, "-cudart=static", "-shared", *passed]


def ninja_file(toolchain: Toolchain, cuda: CudaToolchain | None, units: list[Unit], folder: Path, target: Path) -> str:
    """The text of build.ninja: objects and the log in `folder`, paths relative to the root."""
    strict = ["-Werror=all-warnings"] if "-Werror" in toolchain.cxx else []
    lines = [
        "ninja_required_version = 1.8",
        f"builddir = {escape(folder)}",
        f"cxx = {quote(toolchain.cxx)}",
        f"cxxflags = {quote([*OPTIMISE, *COMMON, *WARNINGS])}",
        f"nvcc = {quote(cuda.nvcc) if cuda else 'false'}",
        f"nvccflags = {quote([*CUDA_FLAGS, *strict])}",
        f"link = {quote(link_command(toolchain, cuda))}",
        "rule cxx",
        "  command = $cxx $cxxflags $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $in",
        "rule nvcc",
        "  command = $nvcc $nvccflags $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $in",
        "rule link",
        "  command = $link $in -o $out",
        "  description = link $out",
    ]
    objects = []
    for unit in units:
        objects.append(escape(folder / unit.source.with_suffix(".o")))
        lines += [f"build {objects[-1]}: {unit.rule} {escape(unit.source)}", f"  flags = {quote(unit.flags)}"]
    return "\n".join([*lines, f"build {escape(target)}: link {' '.join(objects)}", ""])


def run_ninja(build_file: Path) -> None:
    """Runs ninja, of the PyPI package of that name or of the machine, in the root."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        BIN_DIR = ""
    ninja = shutil.which("ninja", path=BIN_DIR) if BIN_DIR else shutil.which("ninja")
    if ninja is None:
        raise CompileError("no ninja: `pip install ninja` (pip's own isolated build does that by itself)")
    if subprocess.run([ninja, "-f", str(build_file)], cwd=ROOT, check=False).returncode != 0:
        raise CompileError("the C++ sources did not compile: the compiler's own words are above")


class NinjaBuildExt(build_ext):
    """build_ext that hands the work to ninja and says what to do where it fails."""

    def build_extension(self, ext: Extension) -> None:
        try:
            built = self.build_with_ninja()
        except CompileError as error:
            advice = "CK_EXTENSION=0 installs the package without its extension: it then runs on the torch backend."
            if extension_wanted() != "auto":
                raise CompileError(f"contrastive_kernels._C: {error}. {advice}") from error
            print(f"warning: contrastive_kernels._C is left out: {error}", file=sys.stderr)
            ext.optional = True  # setuptools then does without the file, and must not find an older one
            for folder in (Path(self.build_lib), ROOT):
                (folder / self.get_ext_filename(ext.name)).unlink(missing_ok=True)
            return
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(built), str(target))

    def build_with_ninja(self) -> Path:
        """The path of the fresh extension module in the build folder."""
        folder = Path("build", f"ninja-{sysconfig.get_platform()}-{sys.implementation.cache_tag}")
        target = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        toolchain = find_toolchain()
        cuda = find_cuda(toolchain)
        units = [*binding_units(), *cpu_units(toolchain), *cuda_units(cuda)]
        (ROOT / folder).mkdir(parents=True, exist_ok=True)
        build_file = folder / "build.ninja"
        (ROOT / build_file).write_text(ninja_file(toolchain, cuda, units, folder, target))
        run_ninja(build_file)
        return ROOT / target


def extension_wanted() -> str:
    """CK_EXTENSION: "0", "1" or "auto"."""
    wanted = os.environ.get("CK_EXTENSION") or ("0" if os.name == "nt" else "1")
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(f"CK_EXTENSION: expected 0, 1 or auto, got {wanted!r}")
    return wanted


if __name__ == "__main__":
    extension = Extension("contrastive_kernels._C", sources=["csrc/bindings.cpp"])
    setup(
        ext_modules=[] if extension_wanted() == "0" else [extension],
        cmdclass={"build_ext": NinjaBuildExt},
    )
