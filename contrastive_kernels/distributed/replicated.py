"""Replicated: every rank has all rows and computes the whole matrix, for batches whose messages cost more than they.

One message brings everything; nothing is merged, summed or sent home. What a rank computes is P times its share.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..engine.gradients import Wanted
from ..engine.matrix import Problem
from ..panels.pairs import Pairs
from ..panels.panel import Side
from .group import Ranks, Sizes
from .route import Block, Made, Own, Route
from .rules import Rule

__all__ = ["Replicated", "worth_replicating"]

#: Multiplications of all scores, N M D, up to which a rank computes them all rather than wait for several messages.
MULTIPLICATIONS = 2**25


def worth_replicating(rows: int, cols: int, features: int) -> bool:
    """Whether a global matrix is so small that messages are what it costs."""
    return rows * cols * features <= MULTIPLICATIONS


class Replicated(Route):
    """The concatenated batch on this rank.

    Parameters
    ----------
    ranks : Ranks
        Who shares it.
    problem : Problem
        This rank's rows.
    rule : Rule
        The loss of them.
    sizes : Sizes
        All ranks'.
    call : str
        The loss's name.
    keeps : bool
        Scores that fit a quarter of the workspace are kept for the gradients.
    """

    whole = True

    def __init__(self, ranks: Ranks, problem: Problem, rule: Rule, sizes: Sizes, call: str, *, keeps: bool) -> None:
        rank, self._ranks, self._all = ranks.rank, ranks.size, ranks.transport(call)
        self._sizes, cols = sizes.rows, sizes.rows if rule.mirrored else sizes.cols
        first_row, first_col = sum(self._sizes[:rank]), sum(cols[:rank])
        self._rows = slice(first_row, first_row + len(problem.x))
        self._cols = slice(first_col, first_col + len(problem.y))
        # (elsewhere ranks may have an offset or an index, as each likes, and their messages have one length)
        aligned = rule.diagonal and problem.offset == 0
        own = {
            "x": (problem.x, self._sizes),
            "y": (None if rule.mirrored else problem.y, cols),
            "index": (None if aligned else _index(problem, first_col), self._sizes),
            "row_ids": (problem.pairs.row_ids, self._sizes),
            "col_ids": (problem.pairs.col_ids, cols),
        } | {f"rule {i}": (v, cols if of_cols else self._sizes) for i, (v, of_cols) in enumerate(rule.vectors())}
        given = {name: (tensor, of) for name, (tensor, of) in own.items() if tensor is not None}
        found = dict(zip(given, self._all.all_gather_together(list(given.values()))))
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
        whole = Own(self.problem, rule.term, rule.mirrored)
        out = (0, None) if aligned and not rule.mirrored else (None, whole.excluded())
        self._block = Block(whole, x, self.problem.y, self.problem.pairs.leaving_out(*out), keeps=keeps)

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
        return self._all.all_gather(vector, self._sizes)

    def own_of(self, made: Made) -> Made:
        """This rank's gradients of all; of scale and bias an equal share."""
        dx, dy = (
            None if g is None else g[place].clone() for g, place in ((made.dx, self._rows), (made.dy, self._cols))
        )
        dparams = None if made.dparams is None else made.dparams / self._ranks
        return Made(dx, dy, dparams, extras=tuple([None if g is None else self.own(g) for g in made.extras]))


def _index(problem: Problem, first_col: int) -> Tensor | None:
    """The positives of this rank's rows among all ranks' columns; None where they are none of them."""
    index = problem.index
    if index is None:
        if problem.offset is None:
            return None
        index = torch.arange(len(problem.x), dtype=torch.int64, device=problem.x.device) + problem.offset
    return torch.where(index < 0, index, index + first_col)
