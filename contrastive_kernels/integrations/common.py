"""What the integrations share: a library that is missing, what it computes itself, and classes put into its place."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

__all__ = ["leave", "missing", "replace", "replaced", "scaled_gradient"]

_said: set[tuple[str, str]] = set()


def missing(module: str, package: str, error: ImportError) -> ImportError:
    """The error where a library cannot be imported: it is not there, or something that it wants is not."""
    brings = f"pip install 'contrastive-kernels[{module.rpartition('.')[2]}]' brings"
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return ImportError(f"{module}: expected the {package} that {brings}; importing the one there is: {error}")
    return ImportError(f"{module}: expected {package}, which {brings}; got {error}")


def leave(where: str, what: str) -> None:
    """Says once that the library itself computes something."""
    if (where, what) not in _said:
        _said.add((where, what))
        warnings.warn(f"{where}: {what} is computed by the library's own code, at its own cost", stacklevel=4)


def replace(library: str, classes: Mapping[Any, Any]) -> list[tuple[Any, str, Any]]:
    """Puts classes or functions into the place of a library's own, in all its modules; gives what was where."""
    done = []
    for name, module in list(sys.modules.items()):
        if module is None or name.partition(".")[0] != library:
            continue
        for attribute, value in list(vars(module).items()):
            for original, ours in classes.items():
                if value is original:
                    setattr(module, attribute, ours)
                    done.append((module, attribute, original))
    return done


@contextmanager
def replaced(library: str, classes: Mapping[Any, Any]) -> Iterator[None]:
    """The same until the end of a block."""
    done = replace(library, classes)
    try:
        yield
    finally:
        # where they were, and where modules have taken them from there meanwhile
        originals = {id(original) for _, _, original in done}
        replace(library, {ours: original for original, ours in classes.items() if id(original) in originals})


def scaled_gradient(value: Any, factor: int) -> Any:
    """The same number, whose gradient counts so often."""
    if isinstance(value, Tensor) and value.requires_grad:
        fixed = value.detach()
        return fixed + factor * (value - fixed)
    return value
