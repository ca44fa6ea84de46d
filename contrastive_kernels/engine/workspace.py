"""The workspace: everything of the size of a panel, within its bound, and the walk over the panels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from ..backends.products import ADDS_IN_FLOAT32
from ..panels.panel import Panel, present
from ..panels.size import STEP, blocks, blocks_of, score_dtype
from .matrix import ScoreMatrix
from .strategy import remembered_shape

__all__ = ["Workspace", "room_of_band"]

#: float16 weights, at most the largest gain, are kept times this: softmax-sized ones would fall subnormal.
_FLOAT16_SCALE = 2.0**14
#: ... with room for weights up to 255 times their gains where normalisers are known beforehand, and perhaps stale.
_FLOAT16_SCALE_OF_STALE = 2.0**8


class Workspace:
    """The memory of one pass over the panels of a matrix.

    Parameters
    ----------
    matrix : ScoreMatrix
        The score matrix.
    weighs : bool
        Whether the pass makes weights.
    gains : tuple of Tensor
        The gains of both sides, and their targets; needed where weights are float16.
    bounded : bool
        The gains bound the weights: normalisers are of this matrix, not known beforehand and perhaps stale.
    unscaled : bool
        Weights are dL/dz itself, whose sums are wanted even where the scale is 0; the sums of the gradients are scaled.
    """

    def __init__(
        self, matrix: ScoreMatrix, *, weighs: bool = False, gains: tuple[Tensor | None, ...] = (),
        bounded: bool = True, unscaled: bool = False,
    ) -> None:  # fmt: skip
        self.matrix = matrix
        x, backend = matrix.x, matrix.backend
        self.dtype = score_dtype(x.dtype)
        as_they_are = backend.native_operands or backend.multiplies(x.dtype)
        self.operand_dtype = x.dtype if as_they_are else self.dtype
        self.weights_dtype = backend.weights_dtype(x.device, x.dtype)
        self.rounded = self.weights_dtype != self.dtype
        size = matrix.size()
        self.rows, self.cols = remembered_shape(backend, size, weighs)
        rows, cols = min(self.rows, size.rows), min(self.cols, size.cols)
        holds_scores = backend.score_tile and matrix.scores is None
        self.scores = self._room(rows * cols if holds_scores else 0, self.dtype)
        holds_guide = bool(size.guide) and backend.guide_tile and matrix.guide is None
        self.guide = self._room(rows * cols if holds_guide else 0, self.dtype)
        # A last, ragged panel keeps the stride of the others: cuBLAS wants its rows aligned. (Not on the CPU: oneDNN's
        # bfloat16 product, as of torch 2.13, reads the gap behind a row, and NaN there reaches the result.)
        self.stride = self.cols if x.device.type == "cuda" else None
        self.separate = weighs and self._weights_need_room()
        buffers = 2 if matrix.overlap else 1
        self.weights = self._room(buffers * rows * (self.stride or cols) if self.separate else 0, self.weights_dtype)
        if matrix.scratch is None:
            scratch = backend.scratch(rows, cols, size) if backend.wants_scratch and rows and cols else 0
            self.scratch = self._room(scratch, torch.float32)
        else:  # with what the statistics pass has left there
            self.scratch = matrix.scratch
        self.pairs = matrix.negatives()
        self.x_block = x[:0]
        self.factor = matrix.params[:1]
        self.rescale: Tensor | None = None
        if weighs and self.weights_dtype == torch.float16:
            self._scale_float16_weights(gains, _FLOAT16_SCALE if bounded else _FLOAT16_SCALE_OF_STALE)
        elif unscaled:
            self.factor, self.rescale = torch.ones_like(self.factor), self.factor

    def _room(self, length: int, dtype: torch.dtype) -> Tensor:
        if not length:
            return _nothing(dtype, self.matrix.x.device)
        return torch.empty(length, dtype=dtype, device=self.matrix.x.device)

    def _weights_need_room(self) -> bool:
        """Kept scores must survive, and rounded weights do not fit where the scores are; a band's have their room."""
        if self.matrix.scratch is not None:
            return False
        survive = self.matrix.scores is not None and not self.matrix.is_band
        return self.rounded or survive or not self.matrix.backend.score_tile

    def _scale_float16_weights(self, gains: tuple[Tensor | None, ...], scale: float) -> None:
        """Weights leave a panel times `factor`, and sums are multiplied by `rescale`."""
        present = [g.abs().amax() for g in gains if g is not None and g.numel()]
        largest = torch.stack(present).sum() if present else torch.ones_like(self.matrix.params[0])
        largest = largest.clamp(min=1e-30)
        self.factor = (scale / largest).reshape(1)
        self.rescale = self.matrix.params[:1] * (largest / scale)

    def row_blocks(self) -> Iterator[slice]:
        """Row blocks, with their copy in the operands' dtype at hand."""
        for i in blocks(self.matrix.x.shape[0], self.rows):
            self.x_block = self._operand(self.matrix.x, i)
            yield i

    def col_blocks(self, i: slice) -> Iterator[slice]:
        """Column blocks that go with one row block."""
        for j in blocks(self.matrix.y.shape[0], self.cols):
            if not self.matrix.symmetric or j.start >= i.start:
                yield j

    def _operand(self, matrix: Tensor, block: slice) -> Tensor:
        """A block of an operand, in the dtype that the backend takes."""
        rows = matrix if block.stop - block.start == matrix.shape[0] else matrix[block]
        return rows if rows.dtype == self.operand_dtype else rows.to(self.operand_dtype)

    def serves_columns(self, i: slice, j: slice) -> bool:
        """A symmetric matrix's panels off the diagonal also stand for their mirror images."""
        return not self.matrix.symmetric or i != j

    def panel(self, i: slice, j: slice, dparams: Tensor | None = None, buffer: int = 0) -> Panel:
        """The panel of one row block and one column block, with its weights in one of the buffers."""
        matrix = self.matrix
        shape = (i.stop - i.start, j.stop - j.start)
        if matrix.scratch is not None:  # the weights of a band, all of them
            scores = present(matrix.scores)
        elif matrix.scores is not None and matrix.is_band:
            scores = self._of_band(matrix.scores, i, j)
        elif matrix.scores is not None:
            scores = matrix.scores[i, j]
        else:
            scores = self.scores[: shape[0] * shape[1]].view(shape) if self.scores.shape[0] else self.scores
        return Panel(
            x=self.x_block,
            y=self._operand(matrix.y, j),
            scores=scores,
            params=matrix.params,
            pairs=self.pairs.block(i, j),
            bfloat16_values=matrix.x.dtype == torch.bfloat16,
            weights=self._weights(shape, buffer) if self.separate else scores,
            dparams=dparams,
            factor=self.factor,
            scratch=self.scratch,
            keeps=matrix.scratch is not None,
            guide=self._guide(i, j),
        )

    def _of_band(self, band: Tensor, i: slice, j: slice) -> Tensor:
        """A panel's part of what a band has for all of its pairs, panel by panel: products want rows without gaps."""
        rows, cols = i.stop - i.start, j.stop - j.start
        start = i.start * len(self.matrix.y) + rows * j.start
        return band.view(-1)[start : start + rows * cols].view(rows, cols)

    def _guide(self, i: slice, j: slice) -> Tensor | None:
        """Room for a guide's dot products of a panel."""
        if self.matrix.guide is not None:
            return self._of_band(self.matrix.guide, i, j)
        rows, cols = i.stop - i.start, j.stop - j.start
        return self.guide[: rows * cols].view(rows, cols) if self.guide.shape[0] else None

    def _weights(self, shape: tuple[int, int], buffer: int) -> Tensor:
        """Room for the weights of a panel [R, C]."""
        stride = self.stride or shape[1]
        start = self.weights.shape[0] // 2 if buffer else 0
        return self.weights[start : start + shape[0] * stride].view(shape[0], stride)[:, : shape[1]]

    def accumulate(
        self, sums: Tensor, weights: Tensor, block: Tensor, block_in_operand_dtype: Tensor, fresh: bool = False
    ) -> None:
        """sums += weights @ block, in the weights' dtype, with sums in the scores' dtype; fresh: sums is unwritten."""
        beta = 0 if fresh else 1
        if not self.rounded:
            torch.addmm(sums, weights, block_in_operand_dtype.to(self.dtype), beta=beta, out=sums)
        elif weights.is_cuda and ADDS_IN_FLOAT32:
            torch.addmm(sums, weights, block, out_dtype=torch.float32, beta=beta, out=sums)
        elif self.matrix.backend.multiplies(weights.dtype):
            self.matrix.backend.multiply(weights, block, sums, not fresh)
        elif weights.dtype == torch.float16:  # their products pass float16's largest number
            torch.addmm(sums, weights.to(self.dtype), block.to(self.dtype), beta=beta, out=sums)
        elif fresh:
            sums.copy_(weights @ block)
        else:
            sums += weights @ block


def room_of_band(matrix: ScoreMatrix, rows: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Room for the scores of a band [rows, M], and for a guide's, if there is one: scores, nothing, guide.

    Or for its weights, and for the scratch of a backend that keeps: weights, scratch, nothing.
    """
    backend, device, cols = matrix.backend, matrix.x.device, len(matrix.y)
    if not backend.keeps(matrix.x.dtype, matrix.x.shape[1]):
        scores = torch.empty(rows, cols, dtype=score_dtype(matrix.x.dtype), device=device)
        return scores, None, torch.empty_like(scores) if matrix.pairs.guide_features else None
    # as wide as other panels' weights are; see Workspace
    stride = blocks_of(cols, STEP) * STEP if device.type == "cuda" else cols
    scratch = backend.scratch(rows, cols, replace(matrix.size(), band=True))
    weights = torch.empty(rows, stride, dtype=backend.weights_dtype(device, matrix.x.dtype), device=device)
    return weights[:, :cols], torch.empty(scratch, dtype=torch.float32, device=device), None


@lru_cache(maxsize=64)
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room for nothing."""
    return torch.empty(0, dtype=dtype, device=device)
