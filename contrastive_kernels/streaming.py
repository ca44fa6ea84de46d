"""The driver: walks panels of the score matrix and turns their weights into gradients.

``reduce`` gives the rows' and columns' state, ``weigh`` the gradients; both see x [N, D] and y [M, D] whole and hand
one panel at a time to a backend. Memory is O((N + M) D): one workspace of bounded size holds the panel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .backends import Backend
from .backends.panel import Panel, Side
from .specs import EXPONENTIAL, PairTerm

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
]

#: Panels are squares of at most this side: 4 MiB of float32 scores stay in a shared cache, and the gradient products
#: are large enough for the vendor's GEMM to run at its rate.
LARGEST_PANEL = 1024
#: ... and of at least this side: below, the workspace is refused.
SMALLEST_PANEL = 64
#: Score matrices up to this size are kept from the forward to the backward pass, which saves one product of four where
#: memory is no concern.
KEPT_SCORES_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Positives:
    """Where the positive of each row lies: at ``row + offset``, at ``index[row]`` (-1: in no column), or nowhere."""

    offset: int | None = None
    index: Tensor | None = None

    @property
    def exist(self) -> bool:
        """Whether any row has a positive."""
        return self.offset is not None or self.index is not None

    def columns(self, rows: Tensor) -> Tensor:
        """The positives' columns [N] for row numbers [N]; -1 in no column."""
        if self.index is not None:
            return self.index
        return torch.full_like(rows, -1) if self.offset is None else rows + self.offset

    def select(self, y: Tensor, rows: slice) -> Tensor:
        """The positives of these rows, [rows, D]; any row of y where there is none."""
        if self.index is None:
            return y[self._shifted(rows)]
        return y[self.index[rows].clamp(min=0)]

    def coefficients(self, values: Tensor) -> Tensor:
        """values [N], with 0 where a row has no positive."""
        return values if self.index is None else values.masked_fill(self.index < 0, 0.0)

    def add_to(self, sums: Tensor, rows: slice, block: Tensor, values: Tensor) -> None:
        """sums[p(i)] += values_i * block_i for these rows; the same order of additions in every run."""
        if self.index is None:
            sums[self._shifted(rows)].addcmul_(block, values[:, None])
            return
        index, product = self.index[rows].clamp(min=0), block * values[:, None]
        if sums.device.type == "cpu":
            sums.index_add_(0, index, product)
        else:  # index_add_ on a GPU adds in no fixed order
            sums.index_put_((index,), product, accumulate=True)

    def _shifted(self, rows: slice) -> slice:
        offset = self.offset or 0
        return slice(rows.start + offset, rows.stop + offset)


@dataclass(frozen=True)
class Stream:
    """One score matrix z = scale * x yT + bias, what it leaves out, and how it is walked."""

    term: PairTerm
    #: [N, D], [M, D] contiguous, of one dtype
    x: Tensor
    y: Tensor
    #: [2] scale and bias in the dtype of the scores
    params: Tensor
    positives: Positives
    backend: Backend
    workspace_bytes: int
    #: the gradients' dtype, if it is not the operands'
    gradient_dtype: torch.dtype | None = None
    #: [N, M] the whole matrix of dot products, where it is small and was kept
    scores: Tensor | None = None
    #: y is x, and no row is its own negative: panels above the diagonal serve their mirror images too
    symmetric: bool = False

    def exclude(self) -> Tensor:
        """Columns left out of each row, [N, K]."""
        rows = torch.arange(len(self.x), device=self.x.device)
        if self.symmetric:
            return torch.stack([self.positives.columns(rows), rows], 1)
        return self.positives.columns(rows)[:, None] if self.positives.exist else rows[:, None][:, :0]


@dataclass
class Gradients:
    """dL/dx [N, D], dL/dy [M, D], dL/d(scale, bias) [2] in float64; None: not wanted."""

    dx: Tensor | None = None
    dy: Tensor | None = None
    dparams: Tensor | None = None


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores, statistics and values for operands of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def keeps_scores(x: Tensor, y: Tensor, workspace_bytes: int) -> bool:
    """Whether the whole matrix of scores is small enough to be kept for the backward pass."""
    size = x.shape[0] * y.shape[0] * score_dtype(x.dtype).itemsize
    return size <= min(KEPT_SCORES_BYTES, workspace_bytes // 4)


def reduce(stream: Stream, rows: bool, cols: bool) -> tuple[Tensor | None, Tensor | None]:
    """One pass: the state over their negatives of every row [state_rows, N] and every column [state_rows, M].

    Fills stream.scores if there is one.
    """
    row = _neutral_state(stream, len(stream.x)) if rows else None
    col = row if stream.symmetric else (_neutral_state(stream, len(stream.y)) if cols else None)
    workspace = _Workspace(stream)
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
    want_x, want_y, want_params = wanted
    workspace = _Workspace(stream, weighs=True)
    # The rows are swept one block after the other, so their sums are finished block by block where nothing comes late.
    by_block = late_positive is None and not stream.symmetric
    dx = _Sums(stream, stream.x, workspace.side if by_block else None) if want_x else None
    dy = dx if stream.symmetric else (_Sums(stream, stream.y) if want_y else None)
    dparams = torch.zeros(2, dtype=_partials_dtype(stream), device=stream.x.device) if want_params else None
    for i in workspace.row_blocks():
        for j in workspace.col_blocks(i):
            panel = workspace.panel(i, j, dparams)
            panel.scores_ready = stream.scores is not None
            panel.row = _side_part(row, i)
            panel.col = _side_part(col, j) if workspace.serves_columns(i, j) else Side()
            stream.backend.weight_panel(stream.term, panel)
            if dx is not None:
                workspace.accumulate(dx.part(i), panel.weights, stream.y[j], panel.y)
            if dy is not None:
                workspace.accumulate(dy.part(j), panel.weights.T, stream.x[i], panel.x)
        if dx is not None and dx.blocked:
            _add_positives_to_rows(stream, dx, i, positive)
            dx.finish(i)
    del workspace
    coefficients = late_positive() if late_positive is not None else positive
    for i in _row_chunks(stream):
        if dx is not None and not dx.blocked:
            _add_positives_to_rows(stream, dx, i, coefficients)
        if dy is not None and coefficients is not None:
            block = stream.x[i].to(dy.sums.dtype)
            stream.positives.add_to(dy.sums, i, block, stream.positives.coefficients(coefficients)[i])
    for sums in (dx, dy):
        if sums is not None and not sums.blocked:
            sums.finish(slice(0, len(sums.out)))
    return Gradients(None if dx is None else dx.out, None if dy is None or stream.symmetric else dy.out, dparams)


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

    def __init__(self, stream: Stream, like: Tensor, block: int | None = None) -> None:
        dtype, total = stream.gradient_dtype or like.dtype, score_dtype(like.dtype)
        self.out = torch.empty(like.shape, dtype=dtype, device=like.device)
        self.blocked = block is not None and dtype != total
        if dtype == total:
            self.sums = self.out.zero_()
        else:
            rows = len(like) if block is None else block
            self.sums = torch.zeros(rows, like.shape[1], dtype=total, device=like.device)

    def part(self, rows: slice) -> Tensor:
        """The sums of these rows [rows, D]."""
        return self.sums[: rows.stop - rows.start] if self.blocked else self.sums[rows]

    def finish(self, rows: slice) -> None:
        """Rounds these rows to the gradient's dtype and clears the block for the next ones."""
        if self.sums is not self.out:
            self.out[rows] = self.part(rows)
            if self.blocked:
                self.sums.zero_()


class _Workspace:
    """Everything of the size of a panel, within the bound, and the walk over the panels."""

    def __init__(self, stream: Stream, weighs: bool = False) -> None:
        self.stream = stream
        x, device = stream.x, stream.x.device
        self.dtype = score_dtype(x.dtype)
        self.upcast = x.dtype != self.dtype
        weights_dtype = _weights_dtype(x)
        self.rounded = weights_dtype != self.dtype
        # kept scores must survive, and rounded weights do not fit where the scores are
        self.separate = weighs and (self.rounded or stream.scores is not None)
        self.side = self._choose_side(weights_dtype)
        rows, cols = min(self.side, len(x)), min(self.side, len(stream.y))
        self.scores = torch.empty(rows * cols if stream.scores is None else 0, dtype=self.dtype, device=device)
        self.weights = torch.empty(rows * cols if self.separate else 0, dtype=weights_dtype, device=device)
        self.exclude = stream.exclude()
        self.x_block = x[:0]

    def _choose_side(self, weights_dtype: torch.dtype) -> int:
        """The side of a square panel: as large as the workspace allows, in multiples of 64."""
        stream, size = self.stream, self.dtype.itemsize
        longest = max(len(stream.x), len(stream.y), 1)
        # Counted alike for both passes, so that a workspace that serves the forward pass serves the backward pass.
        per_score = size * (1 + stream.backend.temporaries) + (weights_dtype.itemsize if self.rounded else 0)
        # copies of the operands' blocks, a block of sums, and a product in the operands' dtype
        per_row = stream.x.shape[1] * (3 * size + 2) if self.upcast else 0
        side = LARGEST_PANEL
        while side > SMALLEST_PANEL and side * side * per_score + side * per_row > stream.workspace_bytes:
            side -= 64
        needed = side * side * per_score + side * per_row
        if needed > stream.workspace_bytes:
            raise ValueError(
                f"workspace_bytes: expected at least {needed} for the smallest panel with D = {stream.x.shape[1]}; "
                f"got {stream.workspace_bytes}"
            )
        blocks = -(-longest // side)
        return -(-longest // (64 * blocks)) * 64  # blocks of nearly equal size

    def row_blocks(self) -> Iterator[slice]:
        """Row blocks, with their copy in the scores' dtype at hand."""
        for i in _blocks(len(self.stream.x), self.side):
            self.x_block = self.stream.x[i].to(self.dtype)
            yield i

    def col_blocks(self, i: slice) -> Iterator[slice]:
        """Column blocks that go with one row block."""
        for j in _blocks(len(self.stream.y), self.side):
            if not self.stream.symmetric or j.start >= i.start:
                yield j

    def serves_columns(self, i: slice, j: slice) -> bool:
        """A symmetric stream's panels off the diagonal also stand for their mirror images."""
        return not self.stream.symmetric or i != j

    def panel(self, i: slice, j: slice, dparams: Tensor | None = None) -> Panel:
        """The panel of one row block and one column block."""
        stream = self.stream
        shape = (i.stop - i.start, j.stop - j.start)
        kept = stream.scores
        scores = self.scores[: shape[0] * shape[1]].view(shape) if kept is None else kept[i, j]
        return Panel(
            x=self.x_block,
            y=stream.y[j].to(self.dtype),
            scores=scores,
            params=stream.params,
            exclude=self.exclude[i],
            first_column=j.start,
            bfloat16_values=stream.x.dtype == torch.bfloat16,
            weights=self.weights[: shape[0] * shape[1]].view(shape) if self.separate else scores,
            dparams=dparams,
        )

    def accumulate(self, sums: Tensor, weights: Tensor, block: Tensor, block_in_score_dtype: Tensor) -> None:
        """sums += weights @ block, in the operands' dtype if the weights are, with sums in the scores' dtype."""
        if self.rounded:
            sums += weights @ block
        else:
            torch.addmm(sums, weights, block_in_score_dtype, out=sums)


def _weights_dtype(x: Tensor) -> torch.dtype:
    """bfloat16 where the device multiplies it faster than float32, else the dtype of the scores."""
    onednn = x.dtype == torch.bfloat16 and x.device.type == "cpu" and torch.backends.mkldnn.is_available()
    if onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    return score_dtype(x.dtype)


def _neutral_state(stream: Stream, n: int) -> Tensor:
    """The state of nothing: sum 0, and maximum -inf where the term has one."""
    state = torch.zeros(stream.term.state_rows, n, dtype=score_dtype(stream.x.dtype), device=stream.x.device)
    if stream.term is EXPONENTIAL:
        state[0] = -torch.inf
    return state


def _partials_dtype(stream: Stream) -> torch.dtype:
    """float64 for the sums over all pairs, where the device has it."""
    return torch.float32 if stream.x.device.type == "mps" else torch.float64


def _blocks(n: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def _row_chunks(stream: Stream) -> Iterator[slice]:
    """Rows whose copies in the dtype of the scores fit the workspace."""
    fitting = stream.workspace_bytes // (2 * score_dtype(stream.x.dtype).itemsize * stream.x.shape[1])
    return _blocks(len(stream.x), max(SMALLEST_PANEL, min(fitting, LARGEST_PANEL)))


def _part(vector: Tensor | None, block: slice) -> Tensor | None:
    """One block of a vector [..., n]."""
    return None if vector is None else vector[..., block]


def _side_part(side: Side, block: slice) -> Side:
    return Side(_part(side.state, block), _part(side.normalizer, block), _part(side.gain, block))
