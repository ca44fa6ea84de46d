"""The workspace: everything of the size of a panel, within its bound, and the walk over the panels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..backends import Backend
from ..panels.panel import Panel, in_pieces
from ..panels.size import PanelBytes, Size, score_dtype
from .matrix import Stream
from .shapes import BAND, BAND_SHARE, SMALLEST_PANEL, largest_side, nearly_equal, square_side, wave_shape

__all__ = [
    "MULTIPROCESSORS",
    "Workspace",
    "band_rows",
    "blocks",
    "multiprocessors",
    "panel_bytes",
    "panel_shape",
    "size_of",
]


#: By compute capability (NVIDIA's data sheets of A100, A40, RTX 4090, H100 SXM, B200, RTX 5090), where there is no GPU
#: to ask: for plans and the interpreter.
MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}


#: float16 weights, at most the largest gain, are kept times this: softmax-sized ones would fall subnormal.
_FLOAT16_SCALE = 2.0**14


#: ... with room for weights up to 255 times their gains where normalisers are known beforehand, and perhaps stale.
_FLOAT16_SCALE_OF_STALE = 2.0**8


class Workspace:
    """The memory of one pass over the panels of a stream.

    Parameters
    ----------
    stream : Stream
        The score matrix.
    weighs : bool
        Whether the pass makes weights.
    gains : tuple of Tensor
        The gains of both sides; needed where weights are float16.
    bounded : bool
        The gains bound the weights: normalisers are of this matrix, not known beforehand and perhaps stale.
    """

    def __init__(
        self, stream: Stream, weighs: bool = False, gains: tuple[Tensor | None, ...] = (), bounded: bool = True
    ) -> None:
        self.stream = stream
        x, device, backend = stream.x, stream.x.device, stream.backend
        self.dtype = score_dtype(x.dtype)
        self.operand_dtype = x.dtype if backend.native_operands else self.dtype
        weights_dtype = backend.weights_dtype(device, x.dtype)
        self.rounded = weights_dtype != self.dtype
        # kept scores must survive, and rounded weights do not fit where the scores are
        survive = stream.scores is not None and not stream.is_band
        self.separate = weighs and (self.rounded or survive or not backend.score_tile)
        size = size_of(stream)
        self.rows, self.cols = panel_shape(backend, size, weighs)
        rows, cols = min(self.rows, len(x)), min(self.cols, len(stream.y))
        holds_scores = backend.score_tile and stream.scores is None
        self.scores = torch.empty(rows * cols if holds_scores else 0, dtype=self.dtype, device=device)
        # A last, ragged panel keeps the stride of the others: cuBLAS wants its rows aligned. (Not on the CPU: oneDNN's
        # bfloat16 product, as of torch 2.13, reads the gap behind a row, and NaN there reaches the result.)
        self.stride = self.cols if device.type == "cuda" else None
        self.weights = torch.empty(
            (2 if stream.overlap else 1) * rows * (self.stride or cols) if self.separate else 0,
            dtype=weights_dtype,
            device=device,
        )
        self.scratch = torch.empty(backend.scratch(rows, cols, size) if rows and cols else 0, device=device)
        self.exclude = stream.exclude()
        self.x_block = x[:0]
        self.factor, self.rescale = stream.params[:1], None
        if weighs and weights_dtype == torch.float16:
            largest = sum(g.abs().amax() for g in gains if g is not None and len(g))
            largest = torch.as_tensor(largest, dtype=self.dtype, device=device).clamp(min=1e-30)
            scale = _FLOAT16_SCALE if bounded else _FLOAT16_SCALE_OF_STALE
            self.factor = (scale / largest).reshape(1)
            self.rescale = stream.params[:1] * (largest / scale)

    def row_blocks(self) -> Iterator[slice]:
        """Row blocks, with their copy in the operands' dtype at hand."""
        for i in blocks(len(self.stream.x), self.rows):
            self.x_block = self.stream.x[i].to(self.operand_dtype)
            yield i

    def col_blocks(self, i: slice) -> Iterator[slice]:
        """Column blocks that go with one row block."""
        for j in blocks(len(self.stream.y), self.cols):
            if not self.stream.symmetric or j.start >= i.start:
                yield j

    def serves_columns(self, i: slice, j: slice) -> bool:
        """A symmetric stream's panels off the diagonal also stand for their mirror images."""
        return not self.stream.symmetric or i != j

    def panel(self, i: slice, j: slice, dparams: Tensor | None = None, buffer: int = 0) -> Panel:
        """The panel of one row block and one column block, with its weights in one of the buffers."""
        stream = self.stream
        shape = (i.stop - i.start, j.stop - j.start)
        if stream.scores is not None and stream.is_band:  # panel by panel: products want rows without gaps
            start = i.start * len(stream.y) + shape[0] * j.start
            scores = stream.scores.view(-1)[start : start + shape[0] * shape[1]].view(shape)
        elif stream.scores is not None:
            scores = stream.scores[i, j]
        else:
            scores = self.scores[: shape[0] * shape[1]].view(shape) if len(self.scores) else self.scores
        return Panel(
            x=self.x_block,
            y=stream.y[j].to(self.operand_dtype),
            scores=scores,
            params=stream.params,
            exclude=self.exclude[i],
            first_column=j.start,
            bfloat16_values=stream.x.dtype == torch.bfloat16,
            weights=self._weights(shape, buffer) if self.separate else scores,
            dparams=dparams,
            factor=self.factor,
            scratch=self.scratch,
        )

    def _weights(self, shape: tuple[int, int], buffer: int) -> Tensor:
        """Room for the weights of a panel [R, C]."""
        stride = self.stride or shape[1]
        start = len(self.weights) // 2 if buffer else 0
        return self.weights[start : start + shape[0] * stride].view(shape[0], stride)[:, : shape[1]]

    def accumulate(self, sums: Tensor, weights: Tensor, block: Tensor, block_in_operand_dtype: Tensor) -> None:
        """sums += weights @ block, in the weights' dtype, with sums in the scores' dtype."""
        if not self.rounded:
            torch.addmm(sums, weights, block_in_operand_dtype.to(self.dtype), out=sums)
        elif weights.is_cuda and _ADDS_IN_FLOAT32:
            torch.addmm(sums, weights, block, out_dtype=torch.float32, out=sums)
        elif weights.dtype == torch.float16:  # their products pass float16's largest number
            torch.addmm(sums, weights.to(self.dtype), block.to(self.dtype), out=sums)
        else:
            sums += weights @ block


#: torch 2.10 adds 16-bit products to float32 sums without rounding them in between (on CUDA). 2.8 and 2.9 have the
#: overload too, but want sums of the operands' dtype (pytorch#167931).
_ADDS_IN_FLOAT32 = torch.__version__ >= "2.10"


def blocks(n: int, size: int) -> Iterator[slice]:
    """Consecutive blocks of at most `size`."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def size_of(stream: Stream) -> Size:
    """What the shape of the stream's panels depends on."""
    x = stream.x
    return Size(
        len(x), len(stream.y), x.shape[1], x.dtype, x.device, stream.symmetric, stream.workspace_bytes,
        multiprocessors(x.device), stream.backend.native_operands and in_pieces(x) and in_pieces(stream.y),
        2 if stream.overlap else 1, stream.is_band,
    )  # fmt: skip


def panel_shape(backend: Backend, size: Size, weighs: bool) -> tuple[int, int]:
    """Rows and columns of panels."""
    # Counted alike for both passes, so that a workspace that serves the forward pass serves the backward pass.
    both = panel_bytes(backend, size, True)
    if size.band:
        return _band_panel_shape(both, size)
    if backend.score_tile and size.device.type != "cuda":
        side = square_side(size.rows, size.cols, both, size.workspace_bytes)
        shape = None if side is None else (side, side)
    elif both.of(SMALLEST_PANEL, SMALLEST_PANEL) > size.workspace_bytes:
        shape = None
    else:
        shape = wave_shape(
            size.rows, size.cols, size.features, panel_bytes(backend, size, weighs), size.workspace_bytes,
            size.multiprocessors, 2 * weighs, size.symmetric,
        )  # fmt: skip
    if shape is None:
        raise ValueError(
            f"workspace_bytes: expected at least {both.of(SMALLEST_PANEL, SMALLEST_PANEL)} for the smallest panel "
            f"with D = {size.features}; got {size.workspace_bytes}"
        )
    return shape


def band_rows(backend: Backend, size: Size, whole: bool) -> int | None:
    """Rows of a band, whose scores fit the workspace and so are made only once; None: it cannot hold enough of them.

    `whole`: all rows, for columns have normalisers too.
    """
    smallest = panel_bytes(backend, size, True).of(SMALLEST_PANEL, SMALLEST_PANEL)
    if not backend.score_tile or smallest > size.workspace_bytes:  # refused alike with and without gradients
        return None
    score, share = score_dtype(size.dtype), size.workspace_bytes // BAND_SHARE
    beside = panel_bytes(backend, replace(size, band=True), True)
    side = largest_side(beside, share)
    if side is None or (side < BAND and side < max(size.rows, size.cols)):
        return None
    per_row = score.itemsize * size.cols
    if whole:
        return max(size.rows, 1) if per_row * size.rows <= share else None
    rounded = backend.weights_dtype(size.device, size.dtype) != score
    rows = nearly_equal(size.rows, 2 * BAND if rounded else BAND)
    return rows if per_row * rows <= size.workspace_bytes - beside.of(side, side) else None


def _band_panel_shape(beside: PanelBytes, size: Size) -> tuple[int, int]:
    """Rows and columns of panels of a band: all of it, where they take nothing beside its scores."""
    if beside == PanelBytes(0.0, 0.0, 0.0) and not size.symmetric:
        return max(size.rows, 1), max(size.cols, 1)
    side = square_side(size.rows, size.cols, beside, size.workspace_bytes // BAND_SHARE) or SMALLEST_PANEL
    return side, side


def panel_bytes(backend: Backend, size: Size, weighs: bool) -> PanelBytes:
    """What a panel takes of the workspace."""
    scores = score_dtype(size.dtype)
    weights_dtype = backend.weights_dtype(size.device, size.dtype)
    separate = weights_dtype != scores or not backend.score_tile
    tile = scores.itemsize * ((not size.band) + backend.temporaries) if backend.score_tile else 0
    route = backend.route(size)
    per_score = tile + (weights_dtype.itemsize * size.buffers if separate and weighs else 0) + route.scratch_per_score
    if size.dtype == scores:
        return PanelBytes(per_score, route.scratch_per_row, route.scratch_per_row)
    if backend.native_operands:  # a block of sums
        block = size.features * scores.itemsize * weighs
        return PanelBytes(per_score, block + route.scratch_per_row, route.scratch_per_row)
    # copies of the operands' blocks, a block of sums, and a product in the operands' dtype
    return PanelBytes(per_score, size.features * (3 * scores.itemsize + 2), 0)


def multiprocessors(device: torch.device) -> int:
    """Of the GPU, or an H100's where there is none to ask."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).multi_processor_count
    return MULTIPROCESSORS[90]
