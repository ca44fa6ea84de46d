"""The one place that decides how a matrix is walked; operator, fake and plan read the same answer."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache

from ..backends import Backend
from ..panels.size import (
    BAND,
    BAND_SHARE,
    KEPT_FEATURES,
    KEPT_SHARE,
    SMALLEST_PANEL,
    STEP,
    PanelBytes,
    Size,
    blocks_of,
    gemm_tiles,
    largest_side,
    nearly_equal,
    score_dtype,
    square_side,
    wave_shape,
    workspace_for,
)

__all__ = ["Place", "Strategy", "choose", "one_walk_with_scales", "panel_bytes", "panel_shape", "require_panel"]

#: Score matrices up to this size are kept from the forward to the backward pass, which saves one product of four where
#: memory is no concern.
KEPT_SCORES_BYTES = 4 * 2**20
#: Matrices of at most so many scores are computed in one call, with weights in float32 in their place: 4 MiB stay in
#: most caches.
WHOLE_SCORES = 2**20


#: A GPU's matrices of one panel and at most so many scores are computed by launches that are prepared: with more,
#: the GPU takes longer than its host.
PREPARED_SCORES = 2**26
#: Of up to so many scores, a call of the backend for each direction takes less time than the operations of torch around
#: one walk (measured on CPUs).
TWO_CALLS_SCORES = 2**15


class Place(Enum):
    """Where the scores lie between the product that makes them and the weights that they become."""

    #: in a GPU's registers: each pass makes them anew
    ON_CHIP = "on chip"
    #: in one panel of the workspace: each pass makes them anew
    TILE = "tile"
    #: all of them, from the forward to the backward pass
    KEPT = "kept"
    #: those of a band of rows, or their exponentials: made once, for gradients that come with the value
    BAND = "band"
    #: all of them: one call of the backend gives value and weights
    WHOLE = "whole"


@dataclass(frozen=True, slots=True)
class Strategy:
    """Where the scores lie, and how many rows a band has."""

    place: Place
    rows: int = 0

    @property
    def gradients_come_with_the_value(self) -> bool:
        """Whether the forward pass makes the gradients of a sum of losses."""
        return self.place in (Place.BAND, Place.WHOLE)


def choose(
    backend: Backend,
    size: Size,
    *,
    whole: bool,
    summed: bool,
    gradients: bool,
    one_call: bool = True,
    exponentials: bool = False,
) -> Strategy:
    """How a softmax loss is computed.

    Parameters
    ----------
    backend : Backend
        Who computes it.
    size : Size
        Of the matrix.
    whole : bool
        Columns have normalisers too, so that no band of rows can be finished before the others.
    summed : bool
        A mean or a sum, whose gradients are known up to one factor; otherwise every row has a factor of its own.
    gradients : bool
        Some are wanted.
    one_call : bool
        The backends' one call for small matrices knows this loss.
    exponentials : bool
        A pair's weight is its exponential times a sum of factors of its row and of its column.
    """
    if one_call and summed and fits_one_call(backend, size.rows, size.cols, size.workspace_bytes, bool(size.guide)):
        return Strategy(Place.WHOLE)
    if summed and gradients:
        rows = kept_rows(backend, size, whole) if exponentials else None
        rows = band_rows(backend, size, whole) if rows is None else rows
        if rows is not None:
            return Strategy(Place.BAND, rows)
    if not backend.score_tile:
        return Strategy(Place.ON_CHIP)
    kept = gradients and not summed and not size.guide
    kept = kept and _score_bytes(size) <= min(KEPT_SCORES_BYTES, size.workspace_bytes // 4)
    return Strategy(Place.KEPT if kept else Place.TILE)


def fits_one_call(backend: Backend, rows: int, cols: int, workspace_bytes: int, guided: bool = False) -> bool:
    """Whether there are scores, and all of them, in float32, are few enough for one call of the backend.

    guided: beside a guide's.
    """
    per_score = 20 if guided else 16
    return backend.whole_matrix and 0 < rows * cols <= WHOLE_SCORES and per_score * rows * cols <= workspace_bytes


def one_walk_with_scales(backend: Backend, rows: int, cols: int, *, biased: bool, one_call: bool) -> bool:
    """Whether one walk over the scores serves rows and columns with scales of their own.

    Otherwise each direction is a walk of its own, over features times their scales: with kernels that know one scale
    (Triton's and CUDA's), with `biased` candidates, for a bias of columns is none of rows, and in very small matrices
    whose loss the backend's `one_call` knows.
    """
    if biased or not backend.scales_by_row:
        return False
    return not (one_call and backend.whole_matrix and rows * cols <= TWO_CALLS_SCORES)


def can_be_prepared(backend: Backend, size: Size) -> bool:
    """Whether the matrix is one panel, and a small one."""
    if not backend.vectors or not 0 < size.rows * size.cols <= PREPARED_SCORES:
        return False
    rows, cols = panel_shape(backend, size, True)
    return rows >= size.rows and cols >= size.cols


def _score_bytes(size: Size) -> int:
    return size.rows * size.cols * score_dtype(size.dtype).itemsize


def panel_shape(backend: Backend, size: Size, weighs: bool) -> tuple[int, int]:
    """Rows and columns of panels."""
    # Counted alike for both passes, so that a workspace that serves the forward pass serves the backward pass.
    both = panel_bytes(backend, size, True)
    if size.band:
        return _band_panel_shape(backend, both, size)
    if backend.score_tile and size.device.type != "cuda":
        side = square_side(size.rows, size.cols, both, size.workspace_bytes, size.symmetric)
        shape = None if side is None else (side, side)
    elif both.of(SMALLEST_PANEL, SMALLEST_PANEL) > size.workspace_bytes:
        shape = None
    else:
        shape = wave_shape(
            size.rows, size.cols, size.features, panel_bytes(backend, size, weighs), size.workspace_bytes,
            size.multiprocessors, 2 * weighs, size.symmetric,
        )  # fmt: skip
    if shape is None:
        raise _too_small(size, both)
    return shape


def require_panel(backend: Backend, size: Size) -> None:
    """ValueError where the workspace does not hold the smallest panel; for who needs some of it before the panels."""
    both = panel_bytes(backend, size, True)
    if both.of(SMALLEST_PANEL, SMALLEST_PANEL) > size.workspace_bytes:
        raise _too_small(size, both)


def _too_small(size: Size, both: PanelBytes) -> ValueError:
    return ValueError(
        f"workspace_bytes: expected at least {both.of(SMALLEST_PANEL, SMALLEST_PANEL)} for the smallest panel "
        f"with D = {size.features}; got {size.workspace_bytes}"
    )


def band_rows(backend: Backend, size: Size, whole: bool) -> int | None:
    """Rows of a band, whose scores fit the workspace and so are made only once; None: it cannot hold enough of them.

    `whole`: all rows, for columns have normalisers too.
    """
    if not backend.score_tile:
        return None
    smallest = panel_bytes(backend, size, True).of(SMALLEST_PANEL, SMALLEST_PANEL)
    if smallest > size.workspace_bytes:  # refused alike with and without gradients
        return None
    score, share = score_dtype(size.dtype), size.workspace_bytes // BAND_SHARE
    beside = panel_bytes(backend, replace(size, band=True), True)
    side = largest_side(beside, share)
    if side is None or (side < BAND and side < max(size.rows, size.cols)):
        return None
    per_row = score.itemsize * size.cols * (2 if size.guide else 1)
    if whole:
        return max(size.rows, 1) if per_row * size.rows <= share else None
    rounded = backend.weights_dtype(size.device, size.dtype) != score
    most, room = 2 * BAND if rounded else BAND, size.workspace_bytes - beside.of(side, side)
    # with a guide a band saves more, and half of its rows fit wherever all of them do without
    choices = (nearly_equal(size.rows, count) for count in ((most, most // 2) if size.guide else (most,)))
    return next((rows for rows in choices if per_row * rows <= room), None)


def kept_rows(backend: Backend, size: Size, whole: bool) -> int | None:
    """Rows of a band, of which a GPU's backend keeps what its weights want; None: not asked for, or not worth it."""
    if not backend.keeps(size.dtype, size.features) or size.features < KEPT_FEATURES:
        return None
    if size.symmetric or not size.cols or not asked_to_keep(size):
        return None
    taken = panel_bytes(backend, replace(size, band=True), True)
    steps = blocks_of(size.cols, STEP)  # (in whole numbers, which may be symbols)
    per_row = steps * math.ceil(STEP * taken.per_score) + math.ceil(taken.per_row)
    most = (size.workspace_bytes - steps * math.ceil(STEP * taken.per_col)) // per_row // STEP * STEP
    if most >= size.rows:
        return max(size.rows, 1)
    if whole or most < STEP or KEPT_SHARE * gemm_tiles(most, size.features) < size.multiprocessors:
        return None
    return nearly_equal(size.rows, most)


def asked_to_keep(size: Size) -> bool:
    """Whether the workspace is larger than a GPU's default one: nobody has timed there what is kept."""
    return size.device.type != "cuda" or size.workspace_bytes > workspace_for(size.device)


def _band_panel_shape(backend: Backend, beside: PanelBytes, size: Size) -> tuple[int, int]:
    """Rows and columns of panels of a band: all of it, where they take nothing beside its scores, or are these."""
    if backend.keeps(size.dtype, size.features) or (beside == PanelBytes(0.0, 0.0, 0.0) and not size.symmetric):
        return max(size.rows, 1), max(size.cols, 1)
    side = square_side(size.rows, size.cols, beside, size.workspace_bytes // BAND_SHARE) or SMALLEST_PANEL
    return side, side


def panel_bytes(backend: Backend, size: Size, weighs: bool) -> PanelBytes:
    """What a panel takes of the workspace."""
    scores = score_dtype(size.dtype)
    weights_dtype = backend.weights_dtype(size.device, size.dtype)
    separate = weights_dtype != scores or not backend.score_tile
    tile = scores.itemsize * ((not size.band) + backend.temporaries) if backend.score_tile else 0
    if size.guide and backend.guide_tile and not size.band:
        tile += scores.itemsize
    route = backend.route(size)
    per_score = tile + (weights_dtype.itemsize * size.buffers if separate and weighs else 0) + route.scratch_per_score
    if size.dtype == scores:
        return PanelBytes(per_score, route.scratch_per_row, route.scratch_per_row)
    if backend.native_operands:  # a block of sums
        block = (scores.itemsize if weighs else 0) * size.features
        return PanelBytes(per_score, block + route.scratch_per_row, route.scratch_per_row)
    # copies of a guide's blocks; of the operands', a block of sums, and a product in the operands' dtype
    copies = 2 * scores.itemsize * size.guide
    if backend.multiplies(size.dtype):
        return PanelBytes(per_score, (scores.itemsize if weighs else 0) * size.features + copies, 0)
    return PanelBytes(per_score, size.features * (3 * scores.itemsize + 2) + copies, 0)


#: Overhead dominates small batches, so the answers are remembered. (Not for a fake's sizes, which may be symbols.)
remembered = lru_cache(maxsize=256)(choose)
remembered_shape = lru_cache(maxsize=256)(panel_shape)
