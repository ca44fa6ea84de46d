"""The sums of the wanted gradients while panels are walked."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..panels.size import score_dtype
from .matrix import ScoreMatrix

__all__ = ["GradientSums", "Gradients", "Sums", "Wanted"]


class Wanted(NamedTuple):
    """Which gradients are wanted."""

    x: bool
    y: bool
    #: of scale and bias
    params: bool
    #: of what is added to the columns' logits
    candidates: bool = False


@dataclass
class Gradients:
    """dL/dx [N, D], dL/dy [M, D], dL/d(scale, bias) [2] in float64, dL/d(column biases) [M]; None: not wanted."""

    dx: Tensor | None = None
    dy: Tensor | None = None
    dparams: Tensor | None = None
    dcandidates: Tensor | None = None


class Sums:
    """The float32 (or float64) sums of one gradient: all of it, or one block of rows after the other."""

    def __init__(self, out: Tensor, dtype: torch.dtype, block: int | None = None, *, zeroed: bool = True) -> None:
        self.out = out
        self.blocked = block is not None and out.dtype != dtype
        make = torch.zeros if zeroed else torch.empty
        if out.dtype == dtype:
            self.sums = out.zero_() if zeroed else out
        else:
            rows = len(out) if block is None else block
            self.sums = make(rows, out.shape[1], dtype=dtype, device=out.device)

    def band(self, rows: slice) -> Sums:
        """The same sums of these rows alone, which count from 0."""
        part = copy(self)
        part.out = self.out[rows]
        part.sums = self.sums if self.blocked else self.sums[rows]
        return part

    def part(self, rows: slice) -> Tensor:
        """The sums of these rows [rows, D]."""
        return self.sums[: rows.stop - rows.start] if self.blocked else self.sums[rows]

    def rescale(self, factor: Tensor | None) -> None:
        """Multiplies the sums by what the weights were divided by."""
        if factor is not None:
            self.sums.mul_(factor)

    def finish(self, rows: slice) -> None:
        """Rounds these rows to the gradient's dtype and clears the block for the next ones."""
        if self.out.dtype != self.sums.dtype:
            self.out[rows] = self.part(rows)
            if self.blocked:
                self.sums.zero_()


class GradientSums:
    """The sums of the wanted gradients of a matrix; dx in blocks of so many rows, if any.

    `dparams` [2] is what the sums for scale and bias begin with, by default 0. `zeroed`: else dx and dy begin as memory
    that nobody has written.
    """

    def __init__(
        self,
        matrix: ScoreMatrix,
        wanted: Wanted,
        block: int | None,
        dparams: Tensor | None = None,
        *,
        zeroed: bool = True,
    ) -> None:
        x, y = matrix.x, matrix.y
        dtype, total = matrix.gradient_dtype or x.dtype, score_dtype(x.dtype)
        self.symmetric = matrix.symmetric
        self.dx = Sums(_room(x, dtype), total, block, zeroed=zeroed) if wanted.x else None
        # of a symmetric matrix, dx is the whole gradient
        self.dy = Sums(_room(y, dtype), total, zeroed=zeroed) if wanted.y and not self.symmetric else None
        if self.symmetric:
            self.dy = self.dx
        self.dcandidates = torch.zeros(len(y), dtype=total, device=y.device) if wanted.candidates else None
        self.dparams = dparams if wanted.params else None
        if wanted.params and dparams is None:
            self.dparams = torch.zeros(2, dtype=_partials_dtype(matrix), device=x.device)

    def band(self, rows: slice) -> GradientSums:
        """Those of a band of rows: a part of dx, all of the rest."""
        if self.symmetric:  # its band is the whole
            return self
        part = copy(self)
        part.dx = None if self.dx is None else self.dx.band(rows)
        return part

    def rescale(self, factor: Tensor | None) -> None:
        """Multiplies what is not finished yet by what the weights were divided by."""
        for sums in self._open():
            sums.rescale(factor)

    def finish(self) -> Gradients:
        """Rounds what is not finished yet."""
        for sums in self._open():
            sums.finish(slice(0, len(sums.out)))
        return self.result()

    def result(self) -> Gradients:
        """The gradients, once all is finished."""
        dy = None if self.symmetric else self.dy
        dx = None if self.dx is None else self.dx.out
        return Gradients(dx, None if dy is None else dy.out, self.dparams, self.dcandidates)

    def _open(self) -> list[Sums]:
        """Each once."""
        both = [self.dx] if self.symmetric else [self.dx, self.dy]
        return [sums for sums in both if sums is not None and not sums.blocked]


def _room(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(like.shape, dtype=dtype, device=like.device)


def _partials_dtype(matrix: ScoreMatrix) -> torch.dtype:
    """float64 for the sums over all pairs, where the device has it."""
    return torch.float32 if matrix.x.device.type == "mps" else torch.float64
