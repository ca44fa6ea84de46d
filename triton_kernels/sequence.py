"""A fixed sequence of launches: all that depends on shapes is found once, and a step is a few additions of addresses.

Beside kernels of microseconds, what a launch takes the host is the time of a small batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from . import launch
from .start import Arguments, compiled_members, may_start_directly, starter

__all__ = ["Blocks", "Launch", "Launches", "Layout", "Place", "given", "number"]

#: Sets of addresses that a sequence remembers.
_REMEMBERED = 16


class Blocks(NamedTuple):
    """A matrix as the TMA unit copies it: its shape, its rows' stride, and the shape of a block."""

    shape: tuple[int, int]
    stride: int
    block: tuple[int, int]

    def of(self, base: Any) -> TensorDescriptor:
        """The descriptor of such a matrix at a tensor's address."""
        return TensorDescriptor(base, list(self.shape), [self.stride, 1], list(self.block))


class _At(NamedTuple):
    """An address, which stands for the tensor that lies there."""

    address: int
    dtype: torch.dtype | None

    def data_ptr(self) -> int:
        return self.address


class Place(NamedTuple):
    """Where an argument comes from: a tensor or number of the call, or a part of such a tensor; or it is fixed."""

    #: which of the call's values, counted from 1; 0: none, the argument is `offset` itself
    source: int
    #: in bytes, from the tensor's beginning
    offset: Any
    #: of a part, or of a matrix in blocks
    dtype: torch.dtype | None = None
    blocks: Blocks | None = None

    def value(self, values: Sequence[Any]) -> Any:
        """The argument as Triton's own way of starting takes it."""
        if not self.source:
            return self.offset
        value = values[self.source - 1]
        if self.blocks is not None:
            return self.blocks.of(value.detach())
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


class Launch:
    """One launch: kernel, programs, places of its arguments, constants."""

    def __init__(self, kernel: Any, programs: int, places: Sequence[Place], **constants: Any) -> None:
        self.kernel, self.programs, self.places, self.constants = kernel, programs, places, constants
        #: the compiled kernel's members, once it is
        self.direct: tuple[Any, Any, Any] | None = None
        self._blocks = [(k, p.blocks, p.dtype) for k, p in enumerate(places) if p.blocks is not None]
        self._rest = tuple([constants[name] for name in kernel.arg_names[len(places) :]])

    def start_by_triton(self, values: Sequence[Any]) -> None:
        """The first time, which compiles it."""
        arguments = Arguments(*[place.value(values) for place in self.places])
        made = launch._launch(self.kernel, self.programs, arguments, **self.constants)
        self.direct = compiled_members(made)

    def ready(self, stream: int, raw: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
        """What starts it directly and with which arguments; `raw`: those of its places, addresses in tensors' stead."""
        assert self.direct is not None
        run, function, metadata = self.direct
        if self._blocks:
            arguments = list(raw)
            for position, blocks, dtype in self._blocks:
                arguments[position] = blocks.of(_At(raw[position], dtype))
            raw = tuple(arguments)
        start, more = starter(run)
        own = (self.programs, 1, 1, stream, function, *more, metadata, None, None, None)
        return start, (*own, *raw, *self._rest)


def _source_and_offset(place: Place) -> tuple[int, Any, type]:
    offset = 0 if place.offset is None else place.offset
    return place.source, offset, type(offset)


class Launches:
    """Launches that follow each other on one GPU, for tensors of one shape, dtype and alignment to 16 bytes."""

    def __init__(self, device: torch.device, launches: Sequence[Launch]) -> None:
        self.device, self.launches = device, launches
        # Each (source, offset) once, for launches share most of them; 1 and 1.0 are two. What stands for None is never
        # read: a compiled kernel has no such argument.
        raw = [[_source_and_offset(place) for place in each.places] for each in launches]
        found = {key: k for k, key in enumerate(dict.fromkeys(key for each in raw for key in each))}
        self._distinct = [(source, offset) for source, offset, _ in found]
        self._pick = [itemgetter(*[found[key] for key in each]) for each in raw]
        #: what was started, by stream and addresses: memory is mostly where it was a step or two before
        self._ready: dict[tuple[Any, ...], Any] = {}

    def __call__(self, values: Sequence[Any]) -> None:
        """Starts them on the current stream of the current GPU, with the call's tensors and numbers."""
        if not may_start_directly():
            for each in self.launches:
                each.start_by_triton(values)
            return
        stream = driver.active.get_current_stream(self.device.index)
        key = (stream, *[v if v.__class__ is float else v.data_ptr() for v in values])
        ready = self._ready.get(key)
        if ready is None:
            ready = self._make_ready(key, values)
        for start, arguments in ready:
            start(*arguments)

    def _make_ready(self, key: tuple[Any, ...], values: Sequence[Any]) -> Any:
        """What is to be started; where kernels are not compiled yet, they start here."""
        if any(each.direct is None for each in self.launches):
            for each in self.launches:
                each.start_by_triton(values)
            return ()
        if len(self._ready) >= _REMEMBERED:
            self._ready.clear()
        stream, bases = key[0], (0, *key[1:])
        ready = self._ready[key] = self.ready(stream, bases)
        return ready

    def ready(self, stream: int, bases: Sequence[Any]) -> list[tuple[Any, tuple[Any, ...]]]:
        """What starts each of them and with which arguments; `bases`: 0, then the addresses of the call's values."""
        table = [bases[source] + offset for source, offset in self._distinct]
        return [each.ready(stream, pick(table)) for each, pick in zip(self.launches, self._pick)]
