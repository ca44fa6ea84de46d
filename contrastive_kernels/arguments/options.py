"""What the engine is told by whoever calls a loss."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["DEFAULT_ENGINE", "DEFAULT_WORKSPACE_BYTES", "Engine"]

#: Bound of the memory that holds panels of scores; None: what suits the device (`panels/size.py`).
DEFAULT_WORKSPACE_BYTES: int | None = None


class Engine(NamedTuple):
    """Which backend walks the panels ("": the registry chooses), in how much memory (None: what suits the device)."""

    backend: str = ""
    workspace_bytes: int | None = DEFAULT_WORKSPACE_BYTES


DEFAULT_ENGINE = Engine()
