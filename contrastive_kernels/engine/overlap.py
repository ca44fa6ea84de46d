"""Two CUDA streams: the weights of the next panel are made while the gradient products of this one run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["Overlap"]


class Overlap:
    """Turns between two buffers of weights: a side stream fills one while the current stream multiplies the other.

    What runs on the side stream must not allocate: memory is handed on in the order of the current stream.

    Parameters
    ----------
    device : torch.device
        The GPU.
    enabled : bool
        Without it everything runs on the current stream, in one buffer.
    """

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self.enabled = enabled
        #: panels begun so far
        self.count = 0
        if enabled:
            self._main = torch.cuda.current_stream(device)
            self._side = torch.cuda.Stream(device)
            self._made, self._used = ([torch.cuda.Event() for _ in range(2)] for _ in range(2))
            self._side.wait_stream(self._main)

    @property
    def buffer(self) -> int:
        """Which buffer the panel uses."""
        return self.count % 2 if self.enabled else 0

    def making(self) -> contextlib.AbstractContextManager[None]:
        """Weights are made within; the current stream goes on once they are there."""
        return self._on_the_side() if self.enabled else contextlib.nullcontext()

    @contextlib.contextmanager
    def _on_the_side(self) -> Iterator[None]:
        if self.count >= 2:  # the products of the last panel but one have read this buffer
            self._side.wait_event(self._used[self.buffer])
        with torch.cuda.stream(self._side):
            yield
            self._made[self.buffer].record(self._side)
        self._main.wait_event(self._made[self.buffer])

    def multiplied(self) -> None:
        """The panel's products have been issued."""
        if self.enabled:
            self._used[self.buffer].record(self._main)
        self.count += 1
