"""How a problem is walked, so that every hard input meets every way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from problems import Inputs, engine_options, smallest_panels

from contrastive_kernels.backends import registry
from contrastive_kernels.engine import strategy

#: In the problem's own workspace; in the usual one, by one call of the backend where it has one for small matrices; in
#: the same by a band, or panels as large as may be; by panels as small as the engine takes them.
PATHS = ("own", "usual", "large", "small")


@contextlib.contextmanager
def walked(path: str) -> Iterator[None]:
    """Within it, on some paths, no matrix is small enough for one call of the backend."""
    before = strategy.WHOLE_SCORES
    strategy.WHOLE_SCORES = before if path in ("own", "usual") else -1
    strategy.remembered.cache_clear()
    try:
        yield
    finally:
        strategy.WHOLE_SCORES = before
        strategy.remembered.cache_clear()


def path_options(inputs: Inputs, loss: str, backend: str, path: str) -> dict[str, Any] | None:
    """backend and workspace_bytes for a run on a path; None: another one is the same."""
    problem, usual = inputs.problem, {"backend": backend}
    match path:
        case "own":
            return engine_options(inputs, loss, backend)
        case "usual":
            return usual if problem.small_panels or problem.workspace_bytes else None
        case "large":
            return usual if registry.get(backend).whole_matrix else None
        case "small":  # (the truth of float64 is no better than what is compared with it)
            if problem.small_panels or inputs.x.dtype == torch.float64:
                return None
            return usual | smallest_panels(inputs, loss, backend)
    raise ValueError(path)
