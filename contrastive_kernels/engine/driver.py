"""The driver: walks panels of the score matrix and turns their weights into gradients.

The statistics pass gives the rows' and columns' state, the gradient pass the gradients; both see x [N, D] and y [M, D]
whole and hand one panel at a time to a backend. Memory is O((N + M) D): one workspace of bounded size holds the panel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..panels.panel import Panel, Side
from ..panels.size import LARGEST_SQUARE, SMALLEST_PANEL, blocks, score_dtype
from .gradients import Gradients, GradientSums, Sums, Wanted
from .matrix import ScoreMatrix
from .overlap import Overlap
from .workspace import Workspace, room_of_band

__all__ = [
    "band_passes",
    "gradient_pass",
    "log_sums",
    "neutral_state",
    "normalizer_of",
    "positive_dots",
    "positive_logits",
    "softmax_side",
    "statistics_pass",
]


def statistics_pass(matrix: ScoreMatrix, *, cols: bool) -> tuple[Tensor, Tensor | None]:
    """One pass: the state over their negatives of every row [state_rows, N] and every column [state_rows, M].

    Fills matrix.scores if there is one. Of a symmetric matrix the columns' state is the rows'.
    """
    row = neutral_state(matrix, len(matrix.x))
    col = row if matrix.symmetric else (neutral_state(matrix, len(matrix.y)) if cols else None)
    workspace = Workspace(matrix)
    for i in workspace.row_blocks():
        for j in workspace.col_blocks(i):
            panel = workspace.panel(i, j)
            panel.row, panel.col = Side(_part(row, i)), Side()
            if workspace.serves_columns(i, j):
                panel.col = Side(_part(col, j))
            _mark_fresh(matrix, panel, i, j)
            matrix.backend.reduce_panel(matrix.term, panel)
    return row, None if matrix.symmetric else col


def neutral_state(matrix: ScoreMatrix, n: int) -> Tensor:
    """The state of nothing: sum 0, and shift -inf where the term has one; unwritten for a backend that knows it."""
    if matrix.by_kernels:
        return torch.empty(matrix.term.state_rows, n, dtype=score_dtype(matrix.x.dtype), device=matrix.x.device)
    state = torch.zeros(matrix.term.state_rows, n, dtype=score_dtype(matrix.x.dtype), device=matrix.x.device)
    if matrix.term.has_shift:
        state[0] = -torch.inf
    return state


def normalizer_of(state: Tensor) -> Tensor:
    """The log-sum-exp of a (shift, sum) state [2, n] as two numbers, (shift, rest): (0, -inf) where there was nothing.

    Their sum, rounded to one number, loses the rest where the shift is large.
    """
    return torch.stack([state[0].masked_fill(state[1] == 0, 0.0), state[1].log()])


def log_sums(normalizer: Tensor) -> Tensor:
    """The log-sum-exp [n] as one rounded number; -inf where there was nothing."""
    return normalizer[0] + normalizer[1]


def softmax_side(normalizer: Tensor, gain: Tensor | None, target: Tensor | None = None) -> Side:
    """The side whose weights are gain * exp(z - normaliser) - target; a log-sum of nothing gives no weight."""
    if gain is None:
        return Side()
    shift, rest = normalizer
    return Side(
        normalizer=torch.stack([shift, rest.masked_fill(rest == -torch.inf, torch.inf)]),
        gain=gain.contiguous(),
        target=target,
    )


def gradient_pass(
    matrix: ScoreMatrix,
    row: Side,
    col: Side,
    wanted: Wanted,
    positive: Tensor | None = None,
    late_positive: Callable[[], Tensor] | None = None,
    dparams: Tensor | None = None,
) -> Gradients:
    """One pass: the gradients of the sum of all pair terms with respect to x, y and params, as far as `wanted`.

    Parameters
    ----------
    matrix : ScoreMatrix
        The score matrix. Where it is symmetric, dx is the whole gradient and there is no dy.
    row, col : Side
        Whole vectors: normaliser and gain [N], [M], and the states to fold into, if any.
    wanted : Wanted
        Which of dx, dy and dparams.
    positive : Tensor, optional
        dL/d<x_i, y_p(i)> [N], the positive pairs' part of dx and dy.
    late_positive : callable, optional
        Gives `positive` where it depends on the states, once they are complete.
    dparams : Tensor, optional
        What the sums for scale and bias begin with [2]; it is added to.
    """
    bounded = not matrix.term.has_shift or (row.state is None and col.state is None)
    gains = row.gain, col.gain, row.target, col.target
    workspace = Workspace(matrix, weighs=True, gains=gains, bounded=bounded, unscaled=wanted.candidates)
    # The rows are swept one block after the other, so their sums are finished block by block, unless positives depend
    # on later blocks.
    by_block = late_positive is None and not matrix.symmetric
    if matrix.by_kernels:  # one block has dx and dy finished at once
        by_block = by_block and workspace.rows < len(matrix.x)
    block = workspace.rows if by_block else None
    sums = GradientSums(matrix, wanted, block, dparams, zeroed=not matrix.by_kernels)
    _weigh_panels(matrix, workspace, row, col, sums, positive)
    rescale = workspace.rescale
    if sums.dcandidates is not None:
        sums.dcandidates /= workspace.factor
    del workspace
    if late_positive is not None:
        positive = late_positive()
    if matrix.by_kernels:
        return _finish_by_kernels(matrix, sums, positive, rescale)
    sums.rescale(rescale)
    _add_positives(matrix, sums, positive)
    return sums.finish()


def band_passes(
    matrix: ScoreMatrix,
    rows: int,
    sides: Callable[[slice, Tensor, Tensor | None], tuple[Side, Side, Tensor | None]],
    wanted: Wanted,
    *,
    cols: bool,
) -> Gradients:
    """Statistics and gradients band after band: a band's scores are made once, and they or exponentials serve both.

    Parameters
    ----------
    matrix : ScoreMatrix
        The score matrix.
    rows : int
        Rows of a band, as :func:`.strategy.choose` gives them.
    sides : callable
        Gives normaliser and gain of a band's rows and columns, and the coefficients of its positive pairs, if any, from
        the rows of the band and their states.
    wanted : Wanted
        Which of dx, dy and dparams.
    cols : bool
        Whether the columns' states are wanted; they are complete where one band holds all rows.
    """
    sums = GradientSums(matrix, wanted, None if matrix.symmetric else rows)
    dtype, n = score_dtype(matrix.x.dtype), len(matrix.x)
    room = room_of_band(matrix, min(rows, n))
    coefficients: Tensor | None = None
    rescale: Tensor | None = None
    for i in blocks(n, rows):
        band = matrix.band(i, *room)
        row, col, positive = sides(i, *statistics_pass(band, cols=cols))
        # (weights in float16, whose factor would differ from band to band, have no scores in memory)
        workspace = Workspace(band, weighs=True, unscaled=wanted.candidates)
        _weigh_panels(band, workspace, row, col, sums.band(i), positive)
        rescale = workspace.rescale
        if positive is not None:
            coefficients = torch.empty(n, dtype=dtype, device=matrix.x.device) if coefficients is None else coefficients
            coefficients[i] = positive
    del room
    sums.rescale(rescale)
    _add_positives(matrix, sums, coefficients)
    return sums.finish()


def _weigh_panels(
    matrix: ScoreMatrix, workspace: Workspace, row: Side, col: Side, sums: GradientSums, positive: Tensor | None
) -> None:
    """Adds the products of all panels' weights; finishes the rows' sums where they are kept by block."""
    overlap = Overlap(matrix.x.device, matrix.overlap)
    dx, dy, fresh = sums.dx, sums.dy, matrix.by_kernels
    for i in workspace.row_blocks():
        for j in workspace.col_blocks(i):
            panel = workspace.panel(i, j, sums.dparams, overlap.buffer)
            panel.scores_ready = matrix.scores is not None and not panel.keeps
            panel.row = _side_part(row, i)
            panel.col = _side_part(col, j) if workspace.serves_columns(i, j) else Side()
            _mark_fresh(matrix, panel, i, j)
            with overlap.making():
                matrix.backend.weight_panel(matrix.term, panel)
            if sums.dcandidates is not None:
                sums.dcandidates[j] += panel.weights.sum(0, dtype=sums.dcandidates.dtype)
            if dx is not None:
                workspace.accumulate(dx.part(i), panel.weights, matrix.y[j], panel.y, fresh and j.start == 0)
            if dy is not None:  # (of a symmetric matrix, dy is dx)
                first = fresh and i.start == 0 and (j.start > 0 or not matrix.symmetric)
                workspace.accumulate(dy.part(j), panel.weights.T, matrix.x[i], panel.x, first)
            overlap.multiplied()
            del panel  # its blocks' copies, before the next ones are made
        if dx is None or not dx.blocked:
            continue
        if matrix.by_kernels:
            positives = matrix.positives.band(i)
            matrix.backend.finish_gradients(
                matrix.x, matrix.y, positives.index, matrix.positives.offset, positive, workspace.rescale,
                (dx.part(i), dx.out[i]), None, i.start,
            )  # fmt: skip
        else:
            dx.rescale(workspace.rescale)
            _add_positives_to_rows(matrix, dx, i, positive)
            dx.finish(i)


def _mark_fresh(matrix: ScoreMatrix, panel: Panel, i: slice, j: slice) -> None:
    """Says which of a panel's states nobody has written yet."""
    if matrix.by_kernels:
        panel.row.fresh, panel.col.fresh = j.start == 0, i.start == 0


def _finish_by_kernels(
    matrix: ScoreMatrix, sums: GradientSums, coefficients: Tensor | None, rescale: Tensor | None
) -> Gradients:
    """The positive pairs' part of what is not finished yet, and its rounding, in one kernel."""
    index = matrix.positives.index
    if index is not None and coefficients is not None and sums.dy is not None:
        sums.rescale(rescale)
        rescale = None
        for i in _row_chunks(matrix):  # rows may share a positive: torch adds in a fixed order
            block = matrix.x[i].to(sums.dy.sums.dtype)
            matrix.positives.add_to(sums.dy.sums, i, block, matrix.positives.coefficients(coefficients)[i])
    dx, dy = sums.dx, None if matrix.symmetric else sums.dy
    parts = [None if s is None or s.blocked else (s.sums, s.out) for s in (dx, dy)]
    matrix.backend.finish_gradients(
        matrix.x, matrix.y, index, matrix.positives.offset, coefficients, rescale, parts[0], parts[1]
    )
    return sums.result()


def _add_positives(matrix: ScoreMatrix, sums: GradientSums, coefficients: Tensor | None) -> None:
    """The positive pairs' part of dx, where its rows are not finished yet, and of dy."""
    dx, dy = sums.dx, sums.dy
    for i in _row_chunks(matrix):
        if dx is not None and not dx.blocked:
            _add_positives_to_rows(matrix, dx, i, coefficients)
        if dy is not None and coefficients is not None:
            block = matrix.x[i].to(dy.sums.dtype)
            matrix.positives.add_to(dy.sums, i, block, matrix.positives.coefficients(coefficients)[i])


def _add_positives_to_rows(matrix: ScoreMatrix, dx: Sums, i: slice, coefficients: Tensor | None) -> None:
    """dx_i += coefficient_i * y_p(i) for one block of rows."""
    if coefficients is not None:
        partner = matrix.positives.select(matrix.y, i).to(dx.sums.dtype)
        dx.part(i).addcmul_(partner, matrix.positives.coefficients(coefficients)[i, None])


def positive_logits(matrix: ScoreMatrix, dots: Tensor) -> Tensor:
    """z_i,p(i) [N] from the positives' dot products, with what their columns add."""
    z_pos = matrix.params[0] * dots + matrix.params[1]
    return matrix.pairs.add_to_positives(z_pos, matrix.positives.columns(len(dots)))


def positive_dots(matrix: ScoreMatrix) -> Tensor:
    """<x_i, y_p(i)> [N] in the dtype of the scores; 0 where a row has no positive."""
    if matrix.dots is not None:
        return matrix.dots
    dtype = score_dtype(matrix.x.dtype)
    dots = torch.empty(len(matrix.x), dtype=dtype, device=matrix.x.device)
    for i in _row_chunks(matrix):
        partner = matrix.positives.select(matrix.y, i).to(dtype)
        torch.sum(matrix.x[i].to(dtype) * partner, 1, out=dots[i])
    return matrix.positives.coefficients(dots)


def _row_chunks(matrix: ScoreMatrix) -> Iterator[slice]:
    """Rows whose copies in the dtype of the scores fit the workspace, and on a CPU its caches."""
    fitting = matrix.workspace_bytes // (2 * score_dtype(matrix.x.dtype).itemsize * matrix.x.shape[1])
    if matrix.x.device.type == "cpu":
        fitting = min(fitting, LARGEST_SQUARE)
    return blocks(len(matrix.x), max(SMALLEST_PANEL, fitting))


def _part(vector: Tensor | None, block: slice) -> Tensor | None:
    """One block of a vector [..., n]."""
    return None if vector is None else vector[..., block]


def _side_part(side: Side, block: slice) -> Side:
    return Side(
        _part(side.state, block), _part(side.normalizer, block), _part(side.gain, block), _part(side.target, block),
        dscale=_part(side.dscale, block),
    )  # fmt: skip
