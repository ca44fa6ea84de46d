"""A problem: one score matrix z = scale * x yT + bias, and which pairs count; from the function to the driver."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..arguments.options import DEFAULT_ENGINE, Engine
from ..panels.size import Size, score_dtype
from .positives import Positives
from .shapes import multiprocessors

__all__ = ["Problem"]


@dataclass(slots=True)
class Problem:
    """One score matrix z = scale * x yT + bias, which of its pairs count, and who computes it.

    A new member that is a tensor joins `tensors`; operators, autograd and the driver take it from there. Nobody writes
    to one, but it is not frozen: that would triple the time of making it.
    """

    #: [N, D], [M, D] of one dtype and device
    x: Tensor
    y: Tensor
    #: numbers, or tensors of one element on the same device
    scale: Tensor | float
    bias: Tensor | float = 0.0
    #: the positive of row i is column i + offset, or index[i] (int64 [N], -1: no column), or there is none
    offset: int | None = None
    index: Tensor | None = None
    #: y is x, and no row is its own negative
    symmetric: bool = False
    #: [M] added to the logits of a column, in the dtype of the scores
    col_bias: Tensor | None = None
    engine: Engine = DEFAULT_ENGINE

    def tensors(self) -> tuple[Any, ...]:
        """What autograd sees. (A number in a tensor's place stays one.)"""
        return self.x, self.y, self.scale, self.bias, self.index, self.col_bias

    def statics(self) -> tuple[Any, ...]:
        """The rest, but for the offset, which may be symbolic; printable."""
        return self.symmetric, self.engine.backend, self.engine.workspace_bytes

    @classmethod
    def of(cls, tensors: tuple[Any, ...], offset: int | None, statics: tuple[Any, ...]) -> Problem:
        """The problem of these tensors and statics."""
        x, y, scale, bias, index, col_bias = tensors
        symmetric, backend, workspace_bytes = statics
        return cls(x, y, scale, bias, offset, index, symmetric, col_bias, Engine(backend, workspace_bytes))

    def with_numbers_as_tensors(self) -> Problem:
        """The same with scale and bias as 0-d tensors, which operators want."""
        scale, bias = (
            v if isinstance(v, Tensor) else torch.full((), v, dtype=score_dtype(self.x.dtype), device=self.x.device)
            for v in (self.scale, self.bias)
        )
        return replace(self, scale=scale, bias=bias)

    @property
    def positives(self) -> Positives:
        """Where they lie."""
        return Positives(self.offset, self.index)

    def params(self) -> Tensor:
        """(scale, bias, 0) [3] on the device, in the dtype of the scores: the last is the center of the scores."""
        dtype, device = score_dtype(self.x.dtype), self.x.device
        values = (self.scale, self.bias, 0.0)
        if device.type == "cpu":  # where reading a tensor waits for nobody
            return torch.tensor([v.item() if isinstance(v, Tensor) else v for v in values], dtype=dtype, device=device)
        return torch.stack(
            [
                v.detach().reshape(()).to(dtype)
                if isinstance(v, Tensor)
                else torch.full((), v, dtype=dtype, device=device)
                for v in values
            ]
        )

    def size(self) -> Size:
        """What a strategy depends on."""
        x, y = self.x, self.y
        return Size(
            x.shape[0], y.shape[0], x.shape[1], x.dtype, x.device, self.symmetric, self.engine.workspace_bytes,
            multiprocessors(x.device),
        )  # fmt: skip
