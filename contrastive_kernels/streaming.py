"""The driver: walks panels of the score matrix and turns their weights into gradients.

``reduce`` gives the rows' and columns' state, ``weigh`` the gradients; both see x [N, D] and y [M, D] whole and hand
one panel at a time to a backend. Memory is O((N + M) D): one workspace of bounded size holds the panel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from .backends import Backend
from .engine.matrix import Stream
from .engine.positives import Positives
from .engine.shapes import LARGEST_SQUARE, SMALLEST_PANEL
from .overlap import Overlap
from .panels.panel import Side
from .panels.size import score_dtype
from .panels.terms import EXPONENTIAL
from .workspace import Workspace, blocks

__all__ = [
    "Gradients",
    "Positives",
    "Stream",
    "keeps_scores",
    "log_sums",
    "positive_dots",
    "reduce",
    "score_dtype",
    "weigh",
    "weigh_bands",
]

#: Score matrices up to this size are kept from the forward to the backward pass, which saves one product of four where
#: memory is no concern.
KEPT_SCORES_BYTES = 4 * 2**20


@dataclass
class Gradients:
    """dL/dx [N, D], dL/dy [M, D], dL/d(scale, bias) [2] in float64; None: not wanted."""

    dx: Tensor | None = None
    dy: Tensor | None = None
    dparams: Tensor | None = None


def keeps_scores(rows: int, cols: int, dtype: torch.dtype, backend: Backend, workspace_bytes: int) -> bool:
    """Whether the whole matrix of scores is small enough to be kept for the backward pass."""
    if not backend.score_tile:
        return False
    size = rows * cols * score_dtype(dtype).itemsize
    return size <= min(KEPT_SCORES_BYTES, workspace_bytes // 4)


def reduce(stream: Stream, rows: bool, cols: bool) -> tuple[Tensor | None, Tensor | None]:
    """One pass: the state over their negatives of every row [state_rows, N] and every column [state_rows, M].

    Fills stream.scores if there is one.
    """
    row = _neutral_state(stream, len(stream.x)) if rows else None
    col = row if stream.symmetric else (_neutral_state(stream, len(stream.y)) if cols else None)
    workspace = Workspace(stream)
    for i in workspace.row_blocks():
        for j in workspace.col_blocks(i):
            panel = workspace.panel(i, j)
            panel.row = Side(_part(row, i))
            panel.col = Side(_part(col, j)) if workspace.serves_columns(i, j) else Side()
            stream.backend.reduce_panel(stream.term, panel)
    return row, col


def log_sums(state: Tensor) -> Tensor:
    """The log-sum-exp [n] of a (maximum, sum) state [2, n]; -inf where there was nothing."""
    return state[0] + state[1].log()


def weigh(
    stream: Stream,
    row: Side,
    col: Side,
    wanted: tuple[bool, bool, bool],
    positive: Tensor | None = None,
    late_positive: Callable[[], Tensor] | None = None,
) -> Gradients:
    """One pass: the gradients of the sum of all pair terms with respect to x, y and params, as far as `wanted`.

    Parameters
    ----------
    stream : Stream
        The score matrix. Where it is symmetric, dx is the whole gradient and there is no dy.
    row, col : Side
        Whole vectors: normaliser and gain [N], [M], and the states to fold into, if any.
    wanted : tuple of bool
        Whether dx, dy and dparams are wanted.
    positive : Tensor, optional
        dL/d<x_i, y_p(i)> [N], the positive pairs' part of dx and dy.
    late_positive : callable, optional
        Gives `positive` where it depends on the states, once they are complete.
    """
    bounded = stream.term is not EXPONENTIAL or (row.state is None and col.state is None)
    workspace = Workspace(stream, weighs=True, gains=(row.gain, col.gain), bounded=bounded)
    # The rows are swept one block after the other, so their sums are finished block by block where nothing comes late.
    by_block = late_positive is None and not stream.symmetric
    sums = _GradientSums(stream, wanted, workspace.rows if by_block else None)
    _weigh_panels(stream, workspace, row, col, sums, positive)
    sums.rescale(workspace.rescale)
    del workspace
    _add_positives(stream, sums, late_positive() if late_positive is not None else positive)
    return sums.finish()


def weigh_bands(
    stream: Stream,
    rows: int,
    cols: bool,
    sides: Callable[[slice, Tensor | None, Tensor | None], tuple[Side, Side, Tensor]],
    wanted: tuple[bool, bool, bool],
) -> Gradients:
    """One pass of reductions and weights, band after band: a band's scores are made once, and serve both.

    Parameters
    ----------
    stream : Stream
        The score matrix.
    rows : int
        Rows of a band, as :func:`.workspace.band_rows` gives them.
    cols : bool
        Whether the columns' states are wanted; they are complete where one band holds all rows.
    sides : callable
        Gives normaliser and gain of a band's rows and columns, and the coefficients of its positive pairs, from the
        rows of the band and their states.
    wanted : tuple of bool
        Whether dx, dy and dparams are wanted.
    """
    sums = _GradientSums(stream, wanted, None if stream.symmetric else rows)
    scores = stream.x.new_empty(min(rows, len(stream.x)), len(stream.y), dtype=score_dtype(stream.x.dtype))
    for i in blocks(len(stream.x), rows):
        band = stream.band(i, scores)
        row, col, positive = sides(i, *reduce(band, True, cols))
        part = sums.band(i)
        # (weights in float16, whose factor would differ from band to band, have no scores in memory)
        _weigh_panels(band, Workspace(band, weighs=True), row, col, part, positive)
        _add_positives(band, part, positive)
    del scores
    return sums.finish()


def _weigh_panels(
    stream: Stream, workspace: Workspace, row: Side, col: Side, sums: _GradientSums, positive: Tensor | None
) -> None:
    """Adds the products of all panels' weights; finishes the rows' sums where they are kept by block."""
    overlap = Overlap(stream.x.device, stream.overlap)
    dx, dy = sums.dx, sums.dy
    for i in workspace.row_blocks():
        for j in workspace.col_blocks(i):
            panel = workspace.panel(i, j, sums.dparams, overlap.buffer)
            panel.scores_ready = stream.scores is not None
            panel.row = _side_part(row, i)
            panel.col = _side_part(col, j) if workspace.serves_columns(i, j) else Side()
            with overlap.making():
                stream.backend.weight_panel(stream.term, panel)
            if dx is not None:
                workspace.accumulate(dx.part(i), panel.weights, stream.y[j], panel.y)
            if dy is not None:
                workspace.accumulate(dy.part(j), panel.weights.T, stream.x[i], panel.x)
            overlap.multiplied()
            del panel  # its blocks' copies, before the next ones are made
        if dx is not None and dx.blocked:
            dx.rescale(workspace.rescale)
            _add_positives_to_rows(stream, dx, i, positive)
            dx.finish(i)


def _add_positives(stream: Stream, sums: _GradientSums, coefficients: Tensor | None) -> None:
    """The positive pairs' part of dx, where its rows are not finished yet, and of dy."""
    dx, dy = sums.dx, sums.dy
    for i in _row_chunks(stream):
        if dx is not None and not dx.blocked:
            _add_positives_to_rows(stream, dx, i, coefficients)
        if dy is not None and coefficients is not None:
            block = stream.x[i].to(dy.sums.dtype)
            stream.positives.add_to(dy.sums, i, block, stream.positives.coefficients(coefficients)[i])


def positive_dots(stream: Stream) -> Tensor:
    """<x_i, y_p(i)> [N] in the dtype of the scores; 0 where a row has no positive."""
    dtype = score_dtype(stream.x.dtype)
    dots = torch.empty(len(stream.x), dtype=dtype, device=stream.x.device)
    for i in _row_chunks(stream):
        partner = stream.positives.select(stream.y, i).to(dtype)
        torch.sum(stream.x[i].to(dtype) * partner, 1, out=dots[i])
    return stream.positives.coefficients(dots)


def _add_positives_to_rows(stream: Stream, dx: _Sums, i: slice, coefficients: Tensor | None) -> None:
    """dx_i += coefficient_i * y_p(i) for one block of rows."""
    if coefficients is not None:
        partner = stream.positives.select(stream.y, i).to(dx.sums.dtype)
        dx.part(i).addcmul_(partner, stream.positives.coefficients(coefficients)[i, None])


class _Sums:
    """The float32 (or float64) sums of one gradient: all of it, or one block of rows after the other."""

    def __init__(self, out: Tensor, dtype: torch.dtype, block: int | None = None) -> None:
        self.out = out
        self.blocked = block is not None and out.dtype != dtype
        if out.dtype == dtype:
            self.sums = out.zero_()
        else:
            rows = len(out) if block is None else block
            self.sums = torch.zeros(rows, out.shape[1], dtype=dtype, device=out.device)

    def band(self, rows: slice) -> _Sums:
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


class _GradientSums:
    """The sums of the wanted gradients of a stream; dx in blocks of so many rows, if any."""

    def __init__(self, stream: Stream, wanted: tuple[bool, bool, bool], block: int | None) -> None:
        x, y = stream.x, stream.y
        dtype, total = stream.gradient_dtype or x.dtype, score_dtype(x.dtype)
        self.symmetric = stream.symmetric
        self.dx = _Sums(_room(x, dtype), total, block) if wanted[0] else None
        # of a symmetric stream, dx is the whole gradient
        self.dy = _Sums(_room(y, dtype), total) if wanted[1] and not self.symmetric else None
        if self.symmetric:
            self.dy = self.dx
        self.dparams = torch.zeros(2, dtype=_partials_dtype(stream), device=x.device) if wanted[2] else None

    def band(self, rows: slice) -> _GradientSums:
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
        dy = None if self.symmetric else self.dy
        return Gradients(None if self.dx is None else self.dx.out, None if dy is None else dy.out, self.dparams)

    def _open(self) -> list[_Sums]:
        """Each once."""
        both = [self.dx] if self.symmetric else [self.dx, self.dy]
        return [sums for sums in both if sums is not None and not sums.blocked]


def _neutral_state(stream: Stream, n: int) -> Tensor:
    """The state of nothing: sum 0, and maximum -inf where the term has one."""
    state = torch.zeros(stream.term.state_rows, n, dtype=score_dtype(stream.x.dtype), device=stream.x.device)
    if stream.term is EXPONENTIAL:
        state[0] = -torch.inf
    return state


def _room(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(like.shape, dtype=dtype, device=like.device)


def _partials_dtype(stream: Stream) -> torch.dtype:
    """float64 for the sums over all pairs, where the device has it."""
    return torch.float32 if stream.x.device.type == "mps" else torch.float64


def _row_chunks(stream: Stream) -> Iterator[slice]:
    """Rows whose copies in the dtype of the scores fit the workspace."""
    fitting = stream.workspace_bytes // (2 * score_dtype(stream.x.dtype).itemsize * stream.x.shape[1])
    return blocks(len(stream.x), max(SMALLEST_PANEL, min(fitting, LARGEST_SQUARE)))


def _part(vector: Tensor | None, block: slice) -> Tensor | None:
    """One block of a vector [..., n]."""
    return None if vector is None else vector[..., block]


def _side_part(side: Side, block: slice) -> Side:
    return Side(_part(side.state, block), _part(side.normalizer, block), _part(side.gain, block))
