"""Builds contrastive_kernels._C, a pybind11 extension that knows nothing of torch. The rest is in pyproject.toml.

Environment variables of the build (there are none at run time):

CK_EXTENSION    1 (the default): build the extension; the installation fails if the compiler does.
                0: do without; the package runs on the torch backend and says so (the default on Windows).
                auto: build it where that works, do without where it does not.
CXX             the compiler; otherwise the first of c++, g++ and clang++.
CXXFLAGS        before our own flags, so that the optimisation level stays ours.
LDFLAGS         after our own flags.

The work is done by ninja in build/ninja-*, which is kept: only what changed is compiled again, headers included.
"""

from __future__ import annotations

import os
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

# One translation unit per instruction set, chosen among at run time; every other file is for the baseline.
ISA_FLAGS = {
    "panel_avx2.cpp": shlex.split("-mavx2 -mfma -mf16c"),
    "panel_avx512.cpp": shlex.split("-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512"),
}


class Toolchain(NamedTuple):
    """What the compiler is and can do."""

    cxx: list[str]  # the command and the user's own flags
    x86: bool
    openmp: list[str]  # empty where there is none (Apple's clang): one thread


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
    )


def cpu_units(toolchain: Toolchain) -> list[Unit]:
    """The torch-free, Python-free C++ of csrc/cpu."""
    shared = [*(toolchain.openmp or ["-Wno-unknown-pragmas"]), *(["-DCK_X86=1"] if toolchain.x86 else [])]
    sources = sorted(path.relative_to(ROOT) for path in (ROOT / "csrc/cpu").glob("*.cpp"))
    return [
        Unit(source, "cxx", [*shared, *ISA_FLAGS.get(source.name, [])])
        for source in sources
        if toolchain.x86 or source.name not in ISA_FLAGS
    ]


def binding_units() -> list[Unit]:
    """csrc/bindings.cpp, the only file that sees Python and pybind11."""
    import pybind11

    paths = sysconfig.get_paths()
    if not Path(paths["include"], "Python.h").exists():
        raise CompileError(f"no Python.h in {paths['include']}: install this Python's headers (Debian: python3-dev)")
    folders = dict.fromkeys([paths["include"], paths["platinclude"], pybind11.get_include()])
    return [Unit(Path("csrc/bindings.cpp"), "cxx", [f for folder in folders for f in ("-isystem", folder)])]


def escape(text: str | Path) -> str:
    """A path as it stands in a build statement of ninja."""
    return str(text).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def quote(arguments: list[str]) -> str:
    """Arguments as they stand in a variable of ninja."""
    return shlex.join(arguments).replace("$", "$$")


def ninja_file(toolchain: Toolchain, units: list[Unit], folder: Path, target: Path) -> str:
    """The text of build.ninja: objects and the log in `folder`, paths relative to the root."""
    if sys.platform == "darwin":
        shared = ["-bundle", "-undefined", "dynamic_lookup"]
    else:
        shared = ["-shared", "-Wl,--exclude-libs,ALL"]
    link = [*shared, *toolchain.openmp, *shlex.split(os.environ.get("LDFLAGS", ""))]
    lines = [
        "ninja_required_version = 1.8",
        f"builddir = {escape(folder)}",
        f"cxx = {quote(toolchain.cxx)}",
        f"cxxflags = {quote([*OPTIMISE, *COMMON, *WARNINGS])}",
        f"ldflags = {quote(link)}",
        "rule cxx",
        "  command = $cxx $cxxflags $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $in",
        "rule link",
        "  command = $cxx $in $ldflags -o $out",
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
        units = [*binding_units(), *cpu_units(toolchain)]
        (ROOT / folder).mkdir(parents=True, exist_ok=True)
        build_file = folder / "build.ninja"
        (ROOT / build_file).write_text(ninja_file(toolchain, units, folder, target))
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
