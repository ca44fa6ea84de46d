"""What the C++ extension was compiled from. setup.py runs this file by itself: it imports nothing of the package."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

__all__ = ["complaint_about", "digest"]

_SUFFIXES = (".cpp", ".cu", ".h")


def digest(root: Path) -> str:
    """Stands for all of csrc/ in a checkout; "" where there is no checkout."""
    if not (root / "csrc/bindings.cpp").exists() or not (root / "setup.py").exists():
        return ""
    found = hashlib.sha256()
    for path in sorted((root / "csrc").rglob("*")):
        if path.suffix in _SUFFIXES:
            found.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def complaint_about(extension: Any, version: str, root: Path) -> str | None:
    """Why a compiled extension does not belong to the package of this version and to the checkout it lies in, if any.

    Called with other arguments than it expects, it would compute something else or raise errors that name no cause.
    """
    built, here = getattr(extension, "_built_from", None), digest(root)
    if built is not None and built[0] == version and here in ("", built[1]):
        return None
    if here:
        remedy = f"rebuild it in {root}: python setup.py build_ext --inplace"
    else:
        remedy = "install contrastive-kernels anew: pip install --force-reinstall --no-deps contrastive-kernels"
    of = "other sources" if built is not None and built[0] == version else f"version {built[0] if built else 'unknown'}"
    return (
        f"the compiled extension {getattr(extension, '__file__', '_C')} is of {of}, not of this "
        f"{'checkout' if here else 'package'} (version {version}); {remedy}"
    )
