"""Losses of other libraries, computed by this one: each is a module here, which imports its library when it is used.

A class here is the library's own with the method that sees features replaced: constructor, options, memory and
gathering are the library's. What this package does not have is computed by the library, and said once in a warning.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["lightly", "metric_learning", "open_clip", "sentence_transformers", "transformers"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
