"""Ways in which torch runs what is called, none of which may change a result: modes, subclasses, checkpoints, vmap."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

WAYS = ("mode", "counter", "subclass", "checkpoint", "saved elsewhere", "anomaly", "deterministic", "vmap")


class Named(Tensor):
    """A subclass that changes nothing."""


class Passing(TorchDispatchMode):
    """A mode that sees every operation, and changes none."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def around(way: str | None) -> contextlib.AbstractContextManager[Any]:
    """What to enter for the forward and the backward pass."""
    return {
        "mode": Passing,
        "counter": lambda: FlopCounterMode(display=False),
        "saved elsewhere": torch.autograd.graph.save_on_cpu,
        "anomaly": torch.autograd.detect_anomaly,
        "deterministic": _deterministic,
    }.get(way or "", contextlib.nullcontext)()


def through(way: str | None, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` of two matrices and more, called in this way."""

    def call(x: Tensor, y: Tensor, *rest: Any, **options: Any) -> Tensor:
        if way == "subclass":
            return function(x.as_subclass(Named), y.as_subclass(Named), *rest, **options).as_subclass(Tensor)
        if way == "checkpoint":
            result: Tensor = checkpoint(function, x, y, *rest, use_reentrant=False, **options)
            return result
        if way == "vmap":
            several = torch.vmap(lambda x, y: function(x, y, *rest, **options))
            return several(x[None], y[None])[0]
        return function(x, y, *rest, **options)

    return call
