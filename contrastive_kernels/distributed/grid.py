"""The grid: ranks in R rows and C columns, each with the block of its row's x against its column's y.

A rank receives the rows of x of C - 1 ranks and those of y of R - 1, instead of one side of all P - 1 = R C - 1.
Its own pairs lie in its own block, so that positives need no message at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..engine.gradients import Wanted
from ..panels.pairs import Pairs
from ..panels.panel import Side
from .group import Ranks, Sizes
from .route import Block, Made, Own, Route, merged
from .transport import Transport

__all__ = ["Grid", "grid_rows"]


def grid_rows(ranks: int, rows: int, cols: int, shape: int | None = None) -> int:
    """The number R of rows of a grid of so many ranks whose blocks need the fewest elements.

    `rows`, `cols`: of the global matrix. `shape`: R where it is given.
    """
    if shape is not None:
        return shape
    divisors = [r for r in range(1, ranks + 1) if ranks % r == 0]
    # R - 1 ranks' columns and C - 1 ranks' rows; of equal ones the one with more rows, which gathers y alone
    return min(divisors, key=lambda r: ((r - 1) * cols + (ranks // r - 1) * rows, -r))


class Grid(Route):
    """This rank's place in the grid, with the block gathered."""

    def __init__(self, ranks: Ranks, own: Own, sizes: Sizes, call: str, *, keeps: bool) -> None:
        super().__init__(sizes)
        problem, rank = own.problem, ranks.rank
        self._own = own
        self._all = ranks.transport(call)
        rows = grid_rows(ranks.size, sum(sizes.rows), sum(sizes.cols), ranks.mesh and ranks.mesh[0])
        self._row, self._col = ranks.grid(rows, call)
        cols = ranks.size // rows
        a, b = divmod(rank, cols)
        # of the ranks in this rank's row their rows, of those in its column their columns
        self._rows = sizes.rows[a * cols : (a + 1) * cols]
        self._cols = sizes.cols[b::cols]
        x = self._row.all_gather(problem.x, self._rows)
        y = self._col.all_gather(problem.y, self._cols)
        pairs = self._pairs(sum(self._rows[:b]), sum(self._cols[:a]))
        self._block = Block(own, x, y, pairs, keeps=keeps)

    def _pairs(self, first_row: int, first_col: int) -> Pairs:
        """What is said of the block's pairs, in which this rank's own ones begin there."""
        own, problem = self._own, self._own.problem
        pairs = problem.pairs.mapped(
            lambda vector: self._row.all_gather(vector, self._rows),
            lambda vector: self._col.all_gather(vector, self._cols),
        )
        alone = sum(self._rows) == len(problem.x)
        if alone and problem.index is None and not own.mirrored:  # the block's rows are this rank's
            return pairs.leaving_out(None if problem.offset is None else problem.offset + first_col, None)
        excluded = own.excluded()
        if excluded is None:
            return pairs
        columns = excluded.new_full((sum(self._rows), excluded.shape[1]), -1)
        columns[first_row : first_row + len(excluded)] = torch.where(excluded < 0, excluded, excluded + first_col)
        return pairs.leaving_out(None, columns)

    def statistics(self, params: Tensor, *, cols: bool) -> tuple[Tensor, Tensor | None]:
        """The states over the whole matrix of this rank's rows and columns."""
        row, col = self._block.statistics(params, cols=cols)
        return self._merge(row, col)

    def _merge(self, row: Tensor | None, col: Tensor | None) -> tuple[Tensor, Tensor | None]:
        term = self._own.term
        assert row is not None
        rows = merged(self._row.to_owners(row.T[:, None], self._rows)[:, :, 0].transpose(1, 2), term)
        if col is None:
            return rows, None
        return rows, merged(self._col.to_owners(col.T[:, None], self._cols)[:, :, 0].transpose(1, 2), term)

    def gradients(self, params: Tensor, row: Side, col: Side, wanted: Wanted, *, fold: bool) -> Made:
        """The gradients of this rank's rows and columns."""
        row = _gathered(row, self._row, self._rows)
        col = _gathered(col, self._col, self._cols)
        made = self._block.gradients(params, row, col, wanted, fold=fold)
        if fold:
            made.row, made.col = self._merge(made.row, made.col)
        if made.dx is not None and wanted.x:
            made.dx = self._row.sum_to_owners(made.dx, self._rows)
        if made.dy is not None and wanted.y:
            made.dy = self._col.sum_to_owners(made.dy, self._cols)
        return made

    def total(self, own: Tensor) -> Tensor:
        """The sum over ranks."""
        return self._all.sum(own)


def _gathered(side: Side, transport: Transport, sizes: Sequence[int]) -> Side:
    """The vectors of the block's rows or columns, from those of this rank's."""
    if side.gain is None:
        return Side()
    if side.normalizer is None:
        return Side(None, None, transport.all_gather(side.gain, sizes))
    packed = torch.cat([side.normalizer, side.gain[None]]).T[:, None]  # (no matrix of features)
    found = transport.all_gather(packed, sizes)[:, 0].T.contiguous()
    return Side(None, found[:2], found[2])
