"""Replicated: every rank has all rows, for batches whose messages cost more than they. One message brings everything.

A rank computes the statistics of the whole matrix, and sends nothing more; or of its own strips, whose states it sends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from ..engine.gradients import Wanted
from ..engine.matrix import Problem
from ..operators.parts import part_of
from ..panels.pairs import Pairs
from ..panels.panel import Side
from .grid import grid_rows
from .group import Ranks, Sizes
from .lines import Lines, among_all
from .route import Block, Made, Own, Route
from .rules import Rule
from .transport import Transport, count_entries

__all__ = ["Brought", "Replicated", "Strips", "for_few_messages"]

#: Multiplications of all scores, N M D, up to which a rank computes them all rather than wait for a message of states.
WHOLE = 2**26
#: The same by rank, up to which it computes strips rather than wait for a grid's many messages. (A grid of a single row
#: or column has few, and fewer products than strips.)
STRIPS = 2**26


def for_few_messages(ranks: int, rows: int, cols: int, features: int) -> str | None:
    """How ranks compute a global matrix so small that messages are what it costs; None for another one."""
    multiplications = rows * cols * features
    if multiplications <= WHOLE:
        return "replicated"
    square = 1 < grid_rows(ranks, 1, 1) < ranks  # (of a rank's own rows as of all)
    return "strips" if square and multiplications <= STRIPS * ranks else None


class Brought:
    """What a rank tells all others of its rows, in one line of bytes."""

    def __init__(self, problem: Problem, rule: Rule) -> None:
        self.problem, self.rule = problem, rule
        # (elsewhere ranks may have an offset or an index, as each likes, and their lines have the same parts)
        #: whether the positives of all rows lie on the diagonal of the whole matrix
        self.aligned = rule.diagonal and problem.offset == 0
        own = {
            "x": (problem.x, False),
            "y": (None if rule.mirrored else problem.y, True),
            "index": (None if self.aligned else _index(problem), False),
            "row_ids": (problem.pairs.row_ids, False),
            "col_ids": (problem.pairs.col_ids, True),
        } | {f"rule {i}": vector for i, vector in enumerate(rule.vectors())}
        self._given = {name: (tensor, of_cols) for name, (tensor, of_cols) in own.items() if tensor is not None}
        self.lines = Lines(list(self._given.values()), len(problem.x), len(problem.y))

    def of_all(self, transport: Transport, sizes: Sizes, cols: Sequence[int]) -> dict[str, Tensor]:
        """The same of all ranks, by name."""
        lines = sizes.lines
        if lines is None:
            lines = self.lines.gather(transport, sizes.rows, cols)
        count_entries((transport.size - 1) * self.lines.entries(sizes.rows, cols))
        found = dict(zip(self._given, self.lines.read(lines, sizes.rows, cols)))
        index = found.get("index")
        if index is not None:  # from among a rank's own columns to those of all
            found["index"] = among_all(index, sizes.rows, cols)
        return found


class Replicated(Route):
    """The concatenated batch on this rank.

    Parameters
    ----------
    ranks : Ranks
        Who shares it.
    brought : Brought
        This rank's rows, and the loss of them.
    sizes : Sizes
        All ranks'.
    call : str
        The loss's name.
    keeps : bool
        Scores that fit a quarter of the workspace are kept for the gradients.
    """

    whole = alone = True

    def __init__(self, ranks: Ranks, brought: Brought, sizes: Sizes, call: str, *, keeps: bool) -> None:
        super().__init__(Sizes(sizes.rows, sizes.cols, sizes.memory))  # (lines are read now, and need not stay)
        problem, rule, rank = brought.problem, brought.rule, ranks.rank
        self._ranks, self._all = ranks.size, ranks.transport(call)
        cols = sizes.rows if rule.mirrored else sizes.cols
        first_row, first_col = sum(sizes.rows[:rank]), sum(cols[:rank])
        self._rows = slice(first_row, first_row + len(problem.x))
        self._cols = slice(first_col, first_col + len(problem.y))
        self.places = self._rows, self._cols
        found, aligned = brought.of_all(self._all, sizes, cols), brought.aligned
        x = found["x"]
        self._own = problem
        #: of all ranks' rows
        self.problem = replace(
            problem,
            x=x,
            y=x if rule.mirrored else found["y"],
            offset=0 if aligned else None,
            index=found.get("index"),
            pairs=Pairs.of((None, found.get("row_ids"), found.get("col_ids"))),
        )
        self.rule = rule.of([tensor for name, tensor in found.items() if name.startswith("rule ")])
        self._aligned, self._mirrored, self._keeps = aligned, rule.mirrored, keeps

    def _part(self, rows: slice, cols: slice) -> Block:
        """Some rows of the whole matrix against some columns."""
        whole = Own(self.problem, self.rule.term, self._mirrored)
        out = (0, None) if self._aligned and not self._mirrored else (None, whole.excluded())
        pairs = self.problem.pairs.leaving_out(*out).block(rows, cols)
        return Block(whole, self.problem.x[rows], self.problem.y[cols], pairs, keeps=self._keeps)

    @cached_property
    def _block(self) -> Block:
        """All of it, for losses that no operator of one process computes."""
        return self._part(slice(0, len(self.problem.x)), slice(0, len(self.problem.y)))

    def statistics(self, params: Tensor, *, cols: bool) -> tuple[Tensor, Tensor | None]:
        """The states of all rows and columns."""
        return self._block.statistics(params, cols=cols)

    def gradients(self, params: Tensor, row: Side, col: Side, wanted: Wanted, *, fold: bool) -> Made:
        """The gradients of this rank's rows and columns, of those of all."""
        made = self._block.gradients(params, row, col, wanted, fold=fold)
        dx, dy = (part_of(g, place) for g, place in zip((made.dx, made.dy), self.places))
        # (of scale and bias an equal share)
        return Made(dx, dy, None if made.dparams is None else made.dparams / self._ranks, made.row, made.col)

    def total(self, own: Tensor) -> Tensor:
        """The numbers themselves, which are of all rows."""
        return own

    def own(self, vector: Tensor) -> Tensor:
        """Of all rows [..., N], this rank's."""
        return vector[..., self._rows]

    def own_cols(self, vector: Tensor) -> Tensor:
        """Of all columns [..., M], this rank's."""
        return vector[..., self._cols]

    def of_all(self, vector: Tensor) -> Tensor:
        """Of this rank's rows, all ranks'."""
        return self._all.all_gather(vector, self.sizes.rows)

    def own_problem(self, problem: Problem) -> Problem:
        """This rank's rows and columns."""
        return self._own


class Strips(Replicated):
    """The concatenated batch on this rank, which computes its own rows against all columns, and all against its own.

    A message more, of states, and 4 products of N M D / P.
    """

    alone = False

    @cached_property
    def _strips(self) -> tuple[Block, Block | None]:
        """This rank's rows and, unless they are the same, its columns."""
        by_rows = self._part(self._rows, slice(0, len(self.problem.y)))
        return by_rows, None if self._mirrored else self._part(slice(0, len(self.problem.x)), self._cols)

    def statistics(self, params: Tensor, *, cols: bool) -> tuple[Tensor, Tensor | None]:
        """The states of all rows and columns, which a message brings."""
        by_rows, by_cols = self._strips
        row, col = by_rows.statistics(params, cols=False)[0], None
        if cols and by_cols is not None:
            col = by_cols.statistics(params, cols=True)[1]
        return self._states_of_all(row, col)

    def _states_of_all(self, row: Tensor, col: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """All ranks' states of their rows [k, N] and columns [k, M]."""
        states = [(row.T, False)] if col is None else [(row.T, False), (col.T, True)]
        sizes = (self.sizes.rows, self.sizes.rows if self._mirrored else self.sizes.cols)
        lines = Lines(states, row.shape[1], row.shape[1] if col is None else col.shape[1])
        found = [v.T.contiguous() for v in lines.read(lines.gather(self._all, *sizes), *sizes)]
        return found[0], None if col is None else found[1]

    def gradients(self, params: Tensor, row: Side, col: Side, wanted: Wanted, *, fold: bool) -> Made:
        """The gradients of this rank's rows and columns."""
        (by_rows, by_cols), made = self._strips, Made(None, None, None)
        if wanted.x or wanted.params or fold:
            made = by_rows.gradients(params, _of(row, self._rows), col, wanted._replace(y=False), fold=fold)
        if by_cols is not None and (wanted.y or (fold and col.gain is not None)):
            of_cols = by_cols.gradients(params, row, _of(col, self._cols), Wanted(False, wanted.y, False), fold=fold)
            made = replace(made, dy=of_cols.dy, col=of_cols.col)
        if fold and made.row is not None:
            made.row, made.col = self._states_of_all(made.row, None if col.gain is None else made.col)
        return made


def _of(side: Side, place: slice) -> Side:
    """Vectors of some rows or columns, dense."""
    if side.gain is None:
        return side
    normalizer = None if side.normalizer is None else side.normalizer[:, place].contiguous()
    return Side(None, normalizer, side.gain[place])


def _index(problem: Problem) -> Tensor | None:
    """The positives of this rank's rows among its own columns; None where they are none of them."""
    if problem.index is not None or problem.offset is None:
        return problem.index
    return torch.arange(len(problem.x), dtype=torch.int64, device=problem.x.device) + problem.offset
