"""Sizes: what the shape of panels depends on, what a panel takes, how a matrix is cut; without tensors' values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import cast

import torch
from torch import Tensor

__all__ = [
    "BAND",
    "BAND_SHARE",
    "KEPT_FEATURES",
    "KEPT_SHARE",
    "LARGEST_SQUARE",
    "SMALLEST_PANEL",
    "STEP",
    "PanelBytes",
    "Size",
    "blocks_of",
    "gemm_tiles",
    "largest_side",
    "nearly_equal",
    "number",
    "saved_dtype",
    "score_dtype",
    "square_side",
    "wave_shape",
    "workspace_for",
]


@dataclass(frozen=True)
class Size:
    """What the shape of a matrix's panels depends on, and by which route a backend computes them."""

    rows: int
    cols: int
    features: int
    dtype: torch.dtype
    device: torch.device
    symmetric: bool
    workspace_bytes: int
    #: of the GPU
    multiprocessors: int
    #: rows of both operands can be copied in pieces of 16 bytes
    pieces: bool = False
    #: panels of weights that are held at a time
    buffers: int = 1
    #: a band of rows, whose scores, or exponentials, are kept, and are replaced by the weights
    band: bool = False
    #: scores may be too high to count
    capped: bool = False
    #: the width of a guide's features, whose scores are made beside; 0: there is none
    guide: int = 0
    #: of a GPU that is not there (90 for 9.0); None: the device is
    capability: int | None = None


@dataclass(frozen=True)
class PanelBytes:
    """What a panel of R x C scores takes: per_score * R * C + per_row * R + per_col * C bytes."""

    per_score: float
    per_row: float
    per_col: float

    def of(self, rows: int, cols: int) -> int:
        """Bytes of one panel."""
        return -int(-(self.per_score * rows * cols + self.per_row * rows + self.per_col * cols) // 1)


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores, statistics and values for operands of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def saved_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of gradients that wait for the upstream factor: float16 would lose small ones to underflow."""
    return torch.float32 if dtype == torch.float16 else dtype


def number(like: Tensor, value: float) -> Tensor:
    """A number in the dtype and on the device of a tensor; infinite past the dtype's end, which torch refuses."""
    try:
        return like.new_full((), value)
    except RuntimeError:
        return like.new_full((), math.copysign(math.inf, value))


#: On a CPU panels are squares of at most this side: 4 MiB of float32 scores stay in a shared cache, and the gradient
#: products are large enough for the vendor's GEMM to run at its rate.
LARGEST_SQUARE = 1024
#: ... and of a symmetric matrix of less: of the panels on its diagonal, one half is made for nothing.
LARGEST_OF_SYMMETRIC = 768


#: No side is smaller: a workspace that cannot hold such a square is refused.
SMALLEST_PANEL = 64


#: Sides are multiples of this.
STEP = 64


#: Rows of a band, whose scores are made once: every band reads and writes the columns' sums, which takes more than the
#: product that it saves with fewer, and with more the scores leave the caches. Twice as many where weights are rounded,
#: for their products are made before they are added.
BAND = 512


#: The same on a GPU that keeps exponentials: its bands are as large as the workspace allows, if there are as many
#: features (the pass in between moves 4 bytes a score, as long as 400 features' product takes), and if the product that
#: is as long as a band gives this part of the multiprocessors an output tile, 1 / 2 (arithmetic: docs/performance.md).
KEPT_FEATURES, KEPT_SHARE = 512, 2


#: What a band's panels take beside its scores is at most this part of the workspace, 1 / 4.
BAND_SHARE = 4


#: Multiprocessors by compute capability (NVIDIA's data sheets of A100, A40, RTX 4090, H100 SXM, B200, RTX 5090), where
#: there is no GPU to ask: for plans and the interpreter.
MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}


#: The default workspace of every device but a GPU.
WORKSPACE = 64 * 2**20


#: A GPU's is at most this, and at most this part of its memory. For large batches a panel's products then take hundreds
#: of microseconds, several times what starting its kernels takes, and the float32 sums are read and written 0.4 times
#: as often as with 64 MiB (arithmetic: `contrastive_kernels.plan`, docs/roofline.md).
GPU_WORKSPACE, GPU_SHARE = 512 * 2**20, 64


#: Output tiles of the vendor's GEMM on a GPU, which come in waves of one per multiprocessor.
_GEMM_TILE = (128, 256)


#: 16-bit products a GPU finishes while it moves a byte: 700 TFLOP/s sustained and 3.35 TB/s on an H100 (NVIDIA's data
#: sheet). An A100 and a B200 lie within a factor of 1.5.
_FLOP_PER_BYTE = 200


#: ... and while it starts a kernel: 5 us of 700 TFLOP/s.
_FLOP_PER_LAUNCH = 3.5e9


#: Kernels that one panel starts.
_LAUNCHES = 4


def blocks_of(n: int, size: int) -> int:
    """Number of blocks of this size."""
    return -(-n // size)


def gemm_tiles(rows: int, cols: int) -> int:
    """Output tiles of a product on a GPU."""
    return blocks_of(rows, _GEMM_TILE[0]) * blocks_of(cols, _GEMM_TILE[1])


def _round_up(n: int) -> int:
    return blocks_of(n, STEP) * STEP


def square_side(n: int, m: int, size: PanelBytes, workspace_bytes: int, symmetric: bool = False) -> int | None:
    """The side of square panels for a CPU, as large as the workspace allows; None: it is too small."""
    side = largest_side(size, workspace_bytes)
    if side is None:
        return None
    return nearly_equal(max(n, m), min(side, LARGEST_OF_SYMMETRIC) if symmetric else side)


def largest_side(size: PanelBytes, workspace_bytes: int) -> int | None:
    """The side of the largest square panel for a CPU; None: the workspace is too small."""
    side = LARGEST_SQUARE
    while side > SMALLEST_PANEL and size.of(side, side) > workspace_bytes:
        side -= STEP
    return None if size.of(side, side) > workspace_bytes else side


def nearly_equal(n: int, side: int) -> int:
    """The size of as few blocks of n as sides up to this one, a multiple of STEP, allow."""
    longest = max(n, 1)
    return _round_up(blocks_of(longest, blocks_of(longest, side)))


@lru_cache(maxsize=256)
def wave_shape(
    n: int, m: int, d: int, size: PanelBytes, workspace_bytes: int, multiprocessors: int, products: int, square: bool
) -> tuple[int, int] | None:
    """Rows and columns of panels for a GPU, by the time they would take; None: the workspace is too small.

    A panel costs its products, in whole waves of output tiles; a read and a write of the float32 sums it adds to; and
    its launches. Blocks are nearly equal in size.

    Parameters
    ----------
    n, m, d : int
        The score matrix and the number of features.
    size : PanelBytes
        What a panel takes.
    workspace_bytes : int
        What there is.
    multiprocessors : int
        Of the GPU.
    products : int
        Gradient products that follow: 0 to 2.
    square : bool
        Rows and columns are cut alike (a symmetric score matrix, of which half the panels are walked).
    """
    best: tuple[float, tuple[int, int]] | None = None
    for rows in _sides(n, _fitting(SMALLEST_PANEL, size.per_col, size.per_row, size.per_score, workspace_bytes)):
        sides = (
            [rows] if square else _sides(m, _fitting(rows, size.per_row, size.per_col, size.per_score, workspace_bytes))
        )
        fitting = (c for c in sides if size.of(rows, c) <= workspace_bytes)
        for cols in islice(fitting, 8):  # sides come in falling order, and far smaller ones are never better
            cost = _cost(n, m, d, rows, cols, multiprocessors, products, square)
            if best is None or cost < best[0]:
                best = cost, (rows, cols)
    if best is not None:
        return best[1]
    smallest = SMALLEST_PANEL, SMALLEST_PANEL
    return smallest if size.of(*smallest) <= workspace_bytes else None


def _fitting(other: int, per_other: float, per_side: float, per_score: float, workspace_bytes: int) -> float:
    """A bound of the sides that fit beside another one."""
    per = per_score * other + per_side
    return (workspace_bytes - per_other * other) / per if per else float("inf")


def _sides(n: int, bound: float) -> Iterator[int]:
    """Sides of at most `bound` that cut n into nearly equal blocks, the largest first.

    Large ones are a 64th apart, for which no difference in time is known: there are no more than some hundreds.
    """
    longest = max(n, 1)
    side = min(_round_up(longest), max(int(min(bound, longest + STEP)) // STEP, 1) * STEP)
    while True:
        side = _round_up(blocks_of(longest, blocks_of(longest, side)))  # as few blocks as this side allows
        yield side
        if side == SMALLEST_PANEL:
            return
        side -= max(side // STEP // 64, 1) * STEP


def _cost(n: int, m: int, d: int, rows: int, cols: int, multiprocessors: int, products: int, square: bool) -> float:
    """Time of all panels, counted in flop."""
    row_blocks, col_blocks = blocks_of(n, rows), blocks_of(m, cols)
    panels = row_blocks * (row_blocks + 1) / 2 if square else row_blocks * col_blocks
    tile_rows, tile_cols = _GEMM_TILE
    tile_flop = 2 * tile_rows * tile_cols
    wave = tile_flop * multiprocessors
    cost = d * wave * blocks_of(blocks_of(rows, tile_rows) * blocks_of(cols, tile_cols), multiprocessors)
    for length, depth in [(rows, cols), (cols, rows)][:products]:
        cost += depth * wave * blocks_of(blocks_of(length, tile_rows) * blocks_of(d, tile_cols), multiprocessors)
        cost += 8 * d * length * _FLOP_PER_BYTE
    return panels * (cost + _LAUNCHES * _FLOP_PER_LAUNCH)


def blocks(n: int, size: int) -> Iterator[slice]:
    """Consecutive blocks of at most `size`."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def multiprocessors(device: torch.device) -> int:
    """Of the GPU, or an H100's where there is none to ask."""
    return _gpu(device)[0] if device.type == "cuda" else MULTIPROCESSORS[90]


def workspace_for(device: torch.device, given: int | None = None, *, here: bool = True) -> int:
    """Bytes that hold panels: those that are given, or what suits the device; `here`: it can be asked."""
    if given is not None:
        return given
    if device.type != "cuda":
        return WORKSPACE
    return _gpu(device)[1] if here else GPU_WORKSPACE


def _gpu(device: torch.device) -> tuple[int, int]:
    """Multiprocessors and default workspace of a GPU."""
    index = cast("int | None", device.index)
    if index is None and torch.cuda.is_available():  # which GPU is the current one may change
        index = torch.cuda.current_device()
    return _gpu_at(index)


@lru_cache(maxsize=64)
def _gpu_at(index: int | None) -> tuple[int, int]:
    """The same by index; an H100's where there is none to ask."""
    if not torch.cuda.is_available():
        return MULTIPROCESSORS[90], GPU_WORKSPACE
    found = torch.cuda.get_device_properties(index)
    return found.multi_processor_count, min(GPU_WORKSPACE, found.total_memory // GPU_SHARE)
