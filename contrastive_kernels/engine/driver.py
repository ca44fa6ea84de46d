"""The driver: walks panels of the score matrix and turns their weights into gradients.

``reduce`` gives the rows' and columns' state, ``weigh`` the gradients; both see x [N, D] and y [M, D] whole and hand
one panel at a time to a backend. Memory is O((N + M) D): one workspace of bounded size holds the panel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..backends import Backend
from ..panels.panel import Side
from ..panels.size import score_dtype
from ..panels.terms import EXPONENTIAL
from .gradients import Gradients, _GradientSums, _Sums
from .matrix import Stream
from .overlap import Overlap
from .shapes import LARGEST_SQUARE, SMALLEST_PANEL
from .workspace import Workspace, blocks

__all__ = ["KEPT_SCORES_BYTES", "keeps_scores", "log_sums", "positive_dots", "reduce", "weigh", "weigh_bands"]


#: Score matrices up to this size are kept from the forward to the backward pass, which saves one product of four where
#: memory is no concern.
KEPT_SCORES_BYTES = 4 * 2**20


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


def _neutral_state(stream: Stream, n: int) -> Tensor:
    """The state of nothing: sum 0, and maximum -inf where the term has one."""
    state = torch.zeros(stream.term.state_rows, n, dtype=score_dtype(stream.x.dtype), device=stream.x.device)
    if stream.term is EXPONENTIAL:
        state[0] = -torch.inf
    return state


def _row_chunks(stream: Stream) -> Iterator[slice]:
    """Rows whose copies in the dtype of the scores fit the workspace."""
    fitting = stream.workspace_bytes // (2 * score_dtype(stream.x.dtype).itemsize * stream.x.shape[1])
    return blocks(len(stream.x), max(SMALLEST_PANEL, min(fitting, LARGEST_SQUARE)))


def _part(vector: Tensor | None, block: slice) -> Tensor | None:
    """One block of a vector [..., n]."""
    return None if vector is None else vector[..., block]


def _side_part(side: Side, block: slice) -> Side:
    return Side(_part(side.state, block), _part(side.normalizer, block), _part(side.gain, block))
