"""A fixed sequence of launches: all that depends on shapes is found once, and a step is a few additions of addresses.

Beside kernels of microseconds, what a launch takes the host is the time of a small batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime import driver

from . import launch
from .start import Arguments, compiled_members, may_start_directly

__all__ = ["Layout", "Place", "Planned", "begin", "given", "number"]


class Place(NamedTuple):
    """Where an argument comes from: a tensor or number of the call, or a part of such a tensor; or it is fixed."""

    #: which of the call's values, counted from 1; 0: none, the argument is `offset` itself
    source: int
    #: in bytes, from the tensor's beginning
    offset: Any
    #: of a part
    dtype: torch.dtype | None = None

    def value(self, values: Sequence[Any]) -> Any:
        """The argument as Triton's own way of starting takes it."""
        if not self.source:
            return self.offset
        value = values[self.source - 1]
        if self.dtype is None:
            return value.detach() if isinstance(value, Tensor) else value
        return value.view(-1).view(torch.uint8)[self.offset :].view(self.dtype)


def number(value: Any) -> Place:
    """A number that never changes, or None."""
    return Place(0, value)


def given(source: int) -> Place:
    """A tensor or a number of the call."""
    return Place(source, 0)


class Layout:
    """Parts of one buffer of bytes, which is the call's value `source`; each begins at a multiple of 16 bytes."""

    def __init__(self, source: int) -> None:
        self.source, self.bytes = source, 0

    def take(self, length: int, dtype: torch.dtype = torch.float32) -> Place:
        """Room for so many numbers."""
        place = Place(self.source, self.bytes, dtype)
        self.bytes += -(-length * dtype.itemsize // 16) * 16
        return place


class Planned:
    """One launch: kernel, programs, places of its arguments, constants."""

    __slots__ = ("constants", "direct", "kernel", "places", "programs", "raw", "rest")

    def __init__(self, kernel: Any, programs: int, places: Sequence[Place], **constants: Any) -> None:
        self.kernel, self.programs, self.places, self.constants = kernel, programs, places, constants
        #: None stands where the compiled kernel has no argument
        self.raw = tuple([(p.source, 0 if p.offset is None else p.offset) for p in places])
        #: the compiled kernel's members, once it is
        self.direct: tuple[Any, Any, Any] | None = None
        self.rest = tuple([constants[name] for name in kernel.arg_names[len(places) :]])

    def start_by_triton(self, values: Sequence[Any]) -> None:
        """The first time."""
        arguments = Arguments(*[place.value(values) for place in self.places])
        made = launch._launch(self.kernel, self.programs, arguments, **self.constants)
        self.direct = compiled_members(made)


def begin(launches: Sequence[Planned], values: Sequence[Any], device: torch.device) -> None:
    """Starts them on the current stream of the current GPU, with the call's tensors and numbers.

    A plan serves one GPU, and tensors of one shape, dtype and alignment to 16 bytes.
    """
    if not may_start_directly():
        for each in launches:
            each.start_by_triton(values)
        return
    bases = [0, *[v if v.__class__ is float else v.data_ptr() for v in values]]
    stream = driver.active.get_current_stream(device.index)
    for each in launches:
        if each.direct is None:
            each.start_by_triton(values)
            continue
        run, function, metadata = each.direct
        run(
            each.programs, 1, 1, stream, function, metadata, None, None, None,
            *[bases[source] + offset for source, offset in each.raw], *each.rest,
        )  # fmt: skip
