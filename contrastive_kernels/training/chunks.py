"""Inputs cut into chunks, and the random numbers that a chunk was encoded with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

__all__ = ["RandomState", "chunks_of", "kept_random_state", "rows_of"]


def rows_of(value: Any, name: str) -> int:
    """The number of samples of an input: of its tensors and lists, all of one length."""
    lengths = set(_lengths(value))
    if len(lengths) != 1:
        got = "none" if not lengths else f"lengths {sorted(lengths)}"
        raise ValueError(f"{name}: expected tensors or lists of one length, one entry a sample; got {got}")
    return lengths.pop()


def chunks_of(value: Any, rows: int, size: int) -> list[Any]:
    """An input of so many rows in chunks of at most `size` rows; an empty one is a chunk of no rows."""
    return [_part(value, start, min(size, rows - start)) for start in range(0, max(rows, 1), size)]


def _lengths(value: Any) -> Iterator[int]:
    if isinstance(value, Tensor):
        if value.dim():
            yield value.shape[0]
    elif isinstance(value, list):
        yield len(value)
    elif isinstance(value, (tuple, Mapping)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _lengths(part)


def _part(value: Any, start: int, length: int) -> Any:
    """Rows of what has rows; all else as it is."""
    if isinstance(value, Tensor):
        return value.narrow(0, start, length) if value.dim() else value
    if isinstance(value, list):
        return value[start : start + length]
    if isinstance(value, Mapping):
        return {name: _part(part, start, length) for name, part in value.items()}
    if isinstance(value, tuple):
        parts = [_part(part, start, length) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


class RandomState:
    """The states of torch's default generators now: the CPU's, and the accelerator's if it is in use."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._module = _accelerator()
        self._others: Any = None
        if self._module is not None:
            every = getattr(self._module, "get_rng_state_all", None)
            self._others = self._module.get_rng_state() if every is None else every()

    def restore(self) -> None:
        """Makes the generators draw again what they drew then."""
        torch.set_rng_state(self._cpu)
        if self._module is not None:
            every = getattr(self._module, "set_rng_state_all", None)
            (self._module.set_rng_state if every is None else every)(self._others)


@contextmanager
def kept_random_state() -> Iterator[None]:
    """The generators end where they began."""
    state = RandomState()
    try:
        yield
    finally:
        state.restore()


def _accelerator() -> ModuleType | None:
    """torch's module of the accelerator that this process has begun to use."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        return None
    module: ModuleType = torch.get_device_module(device)
    return module if getattr(module, "is_initialized", lambda: True)() else None
