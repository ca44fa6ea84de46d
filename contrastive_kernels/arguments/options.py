"""What the engine is told by whoever calls a loss."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["DEFAULT_ENGINE", "DEFAULT_WORKSPACE_BYTES", "Engine"]

#: Bound of the memory that holds panels of scores.
DEFAULT_WORKSPACE_BYTES = 64 * 2**20


class Engine(NamedTuple):
    """Which backend walks the panels ("": the registry chooses), and in how much memory."""

    backend: str = ""
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES


DEFAULT_ENGINE = Engine()
