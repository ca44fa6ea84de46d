"""csrc/cuda compiled for the CPU, with tests/cuda_emulator in the place of the CUDA toolkit, as a module of its own."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load_setup() -> Any:
    """setup.py as a module: its toolchain, its units and its flags."""
    spec = importlib.util.spec_from_file_location("ck_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time."""
    fcntl = pytest.importorskip("fcntl", reason="no file locks on this system")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def native_objects() -> list[Path]:
    """What the checkout's own extension was linked from, but CUDA's part; empty where it was not built here."""
    built = Path("build", f"ninja-{sysconfig.get_platform()}-{sys.implementation.cache_tag}", "csrc")
    return sorted(path.relative_to(ROOT) for part in (".", "cpu") for path in (ROOT / built / part).glob("*.o"))


def build(kind: str, flags: Sequence[str] = ()) -> Path:
    """The extension with emulated CUDA, linked from objects that are there, or compiled and linked with these flags."""
    setup = load_setup()
    folder = Path("build", f"{kind}-{sysconfig.get_platform()}-{sys.implementation.cache_tag}")
    target = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    emulate = ["-x", "c++", "-include", "tests/cuda_emulator/cuda_runtime.h", "-Itests/cuda_emulator"]
    emulate += ["-Wno-unknown-pragmas", "-DCK_CUDA_ARCHITECTURES=emulated"]
    kernels = [path.relative_to(ROOT) for path in sorted((ROOT / "csrc/cuda").glob("*.cu"))]
    with locked(ROOT / folder / "lock"):
        try:
            toolchain = setup.find_toolchain()
        except setup.CompileError as error:
            pytest.skip(str(error))
        toolchain = toolchain._replace(cxx=[*toolchain.cxx, *flags])
        ready = [] if flags else native_objects()
        units = [] if ready else [*setup.binding_units(), *setup.cpu_units(toolchain)]
        units += [setup.Unit(path, "cxx", emulate) for path in kernels]
        units += [setup.Unit(Path("tests/cuda_emulator/emulator.cpp"), "cxx", [])]
        build_file = folder / "build.ninja"
        text, _, objects = setup.ninja_file(toolchain, None, units, folder, target).rpartition(": link ")
        (ROOT / build_file).write_text(f"{text}: link {' '.join(map(setup.escape, ready))} {objects}")
        setup.run_ninja(build_file)
    return ROOT / target


@cache
def extension() -> ModuleType:
    """The extension with emulated CUDA: addresses are the CPU's, and so are the kernels."""
    path = os.environ.get("EMULATED_EXTENSION") or build("emulated")
    spec = importlib.util.spec_from_file_location("emulated._C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def controls() -> ctypes.CDLL:
    """The emulator's own functions: emulator_set_order, emulator_fail_next, emulator_device, emulator_launches."""
    return ctypes.CDLL(os.fspath(extension().__file__))
