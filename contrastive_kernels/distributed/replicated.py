"""Replicated: every rank has all rows and computes the whole matrix, for batches whose messages cost more than they.

One message brings everything; nothing is merged, summed or sent home. What a rank computes is P times its share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from ..engine.gradients import Wanted
from ..engine.matrix import Problem
from ..panels.pairs import Pairs
from ..panels.panel import Side
from .group import Ranks, Sizes
from .lines import Lines, among_all
from .route import Block, Made, Own, Route
from .rules import Rule
from .transport import Transport, count_entries

__all__ = ["Brought", "Replicated", "worth_replicating"]

#: Multiplications of all scores, N M D, up to which a rank computes them all rather than wait for several messages.
MULTIPLICATIONS = 2**26


def worth_replicating(rows: int, cols: int, features: int) -> bool:
    """Whether a global matrix is so small that messages are what it costs."""
    return rows * cols * features <= MULTIPLICATIONS


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

    whole = True

    def __init__(self, ranks: Ranks, brought: Brought, sizes: Sizes, call: str, *, keeps: bool) -> None:
        super().__init__(sizes)
        problem, rule, rank = brought.problem, brought.rule, ranks.rank
        self._ranks, self._all = ranks.size, ranks.transport(call)
        cols = sizes.rows if rule.mirrored else sizes.cols
        first_row, first_col = sum(sizes.rows[:rank]), sum(cols[:rank])
        self._rows = slice(first_row, first_row + len(problem.x))
        self._cols = slice(first_col, first_col + len(problem.y))
        found, aligned = brought.of_all(self._all, sizes, cols), brought.aligned
        x = found["x"]
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

    @cached_property
    def _block(self) -> Block:
        """The whole matrix, for losses that no operator of one process computes."""
        whole = Own(self.problem, self.rule.term, self._mirrored)
        out = (0, None) if self._aligned and not self._mirrored else (None, whole.excluded())
        pairs = self.problem.pairs.leaving_out(*out)
        return Block(whole, self.problem.x, self.problem.y, pairs, keeps=self._keeps)

    def statistics(self, params: Tensor, *, cols: bool) -> tuple[Tensor, Tensor | None]:
        """The states of all rows and columns."""
        return self._block.statistics(params, cols=cols)

    def gradients(self, params: Tensor, row: Side, col: Side, wanted: Wanted, *, fold: bool) -> Made:
        """The gradients of all rows and columns."""
        return self._block.gradients(params, row, col, wanted, fold=fold)

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

    def own_of(self, made: Made) -> Made:
        """This rank's gradients of all; of scale and bias an equal share."""
        dx, dy = (
            None if g is None else g[place].clone() for g, place in ((made.dx, self._rows), (made.dy, self._cols))
        )
        dparams = None if made.dparams is None else made.dparams / self._ranks
        return Made(dx, dy, dparams, extras=tuple([None if g is None else self.own(g) for g in made.extras]))


def _index(problem: Problem) -> Tensor | None:
    """The positives of this rank's rows among its own columns; None where they are none of them."""
    if problem.index is not None or problem.offset is None:
        return problem.index
    return torch.arange(len(problem.x), dtype=torch.int64, device=problem.x.device) + problem.offset
