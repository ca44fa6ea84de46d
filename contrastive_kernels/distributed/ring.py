"""The ring: columns travel from rank to rank, with what belongs to them, so that no rank ever holds more than two
ranks' columns.

On the first trip their states go with them, on the second one the sums of their gradients. The next rank's columns are
under way while this one's are multiplied.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..engine.gradients import Wanted
from ..panels.pairs import EVERY_PAIR, Pairs
from ..panels.panel import Side
from .group import Ranks, Sizes
from .route import Block, Made, Own, Route, merged
from .transport import Arrival

__all__ = ["Ring"]

#: Messages between the same two ranks that may overtake each other.
_COLUMNS, _VECTORS, _STATE, _SUMS = range(4)


class _Guest(NamedTuple):
    """The columns that are here."""

    #: whose they are
    rank: int
    y: Tensor
    #: [k, m] what goes with them, one vector below the other
    vectors: Tensor
    block: Block


class Ring(Route):
    """This rank's place in the ring."""

    def __init__(self, ranks: Ranks, own: Own, sizes: Sizes, call: str) -> None:
        self._own, self._sizes = own, sizes
        self._all = ranks.transport(call)

    def _trip(self, vectors: Tensor) -> Iterator[_Guest]:
        """Every rank's columns, this one's first, with the vectors [k, m] that go with them."""
        own, rank, size = self._own, self._all.rank, self._all.size
        y, col_bias = own.problem.y.contiguous(), own.problem.pairs.col_bias
        if col_bias is not None:
            vectors = torch.cat([vectors, col_bias[None]])
        for step in range(size):
            here, following = (rank - step) % size, (rank - step - 1) % size
            coming = None
            if step + 1 < size:
                m = self._sizes.cols[following]
                coming = (
                    self._all.pass_on(y, (m, y.shape[1]), _COLUMNS),
                    self._all.pass_on(vectors, (len(vectors), m), _VECTORS) if len(vectors) else None,
                )
            bias = None if col_bias is None else vectors[-1].contiguous()
            pairs = self._pairs() if here == rank else EVERY_PAIR
            block = Block(own, own.problem.x, y, pairs._replace(col_bias=bias), keeps=False)
            yield _Guest(here, y, vectors, block)
            if coming is not None:
                y = coming[0].wait()
                vectors = vectors[:, :0].new_empty(len(vectors), len(y)) if coming[1] is None else coming[1].wait()

    def _pairs(self) -> Pairs:
        """What is said of the pairs of this rank's rows and columns."""
        own = self._own
        if own.problem.index is None and not own.mirrored:
            return Pairs(own.problem.offset)
        return Pairs(columns=own.excluded())

    def statistics(self, params: Tensor, *, cols: bool) -> tuple[Tensor, Tensor | None]:
        """The states over the whole matrix of this rank's rows and columns."""
        term, rows, travelling = self._own.term, [], None
        no_vectors = params.new_empty(0, len(self._own.problem.y))
        for guest in self._trip(no_vectors):
            row, col = guest.block.statistics(params, cols=cols)
            rows.append(row)
            if col is not None:
                travelling = self._merge_and_pass(guest, col, travelling)
        return merged(torch.stack(rows), term), travelling

    def _merge_and_pass(self, guest: _Guest, col: Tensor, arrived: Tensor | None) -> Tensor:
        """Adds to the state of a guest's columns and sends it on; gives that of the next one's, at last of one's own.

        (The state of the columns that begin their trip here has not come from anywhere.)
        """
        if guest.rank != self._all.rank:
            assert arrived is not None
            col = merged(torch.stack([arrived, col]), self._own.term)
        following = self._sizes.cols[(guest.rank - 1) % self._all.size]
        return self._all.pass_on(col, (len(col), following), _STATE).wait()

    def gradients(self, params: Tensor, row: Side, col: Side, wanted: Wanted, *, fold: bool) -> Made:
        """The gradients of this rank's rows and columns."""
        own = self._own
        given = [] if col.gain is None else [col.gain[None]]
        if col.gain is not None and col.normalizer is not None:
            given.insert(0, col.normalizer)
        vectors = torch.cat(given) if given else params.new_empty(0, len(own.problem.y))
        total, states = Made(None, None, None), []
        travelling, sums = None, None
        for guest in self._trip(vectors):
            n = len(vectors)
            side = Side() if not n else Side(None, guest.vectors[: n - 1] if n > 1 else None, guest.vectors[n - 1])
            made = guest.block.gradients(params, row, side, wanted, fold=fold)
            total = _sum(total, made)
            if fold:
                states.append(made.row)
                if made.col is not None:
                    travelling = self._merge_and_pass(guest, made.col, travelling)
            if wanted.y:
                sums = self._add_and_pass(guest, made.dy, sums)
        row_state = merged(torch.stack(states), own.term) if fold else None
        return Made(total.dx, None if sums is None else sums.wait(), total.dparams, row_state, travelling)

    def _add_and_pass(self, guest: _Guest, dy: Tensor, arriving: Arrival | None) -> Arrival:
        """Adds to the gradient's sums of a guest's columns and sends them on; those of the next one's are coming."""
        if guest.rank != self._all.rank:
            assert arriving is not None
            dy = arriving.wait().add_(dy)
        following = self._sizes.cols[(guest.rank - 1) % self._all.size]
        return self._all.pass_on(dy, (following, dy.shape[1]), _SUMS)

    def total(self, own: Tensor) -> Tensor:
        """The sum over ranks."""
        return self._all.sum(own)

    def join(self, own: Tensor, cols: bool = False) -> Tensor:
        """A vector's parts of all ranks."""
        return self._all.all_gather(own, self._sizes.cols if cols else self._sizes.rows)


def _sum(total: Made, made: Made) -> Made:
    """The gradients of this rank's rows, and its share of those of the parameters, over the blocks so far."""
    if total.dx is not None and made.dx is not None:
        total.dx += made.dx
    if total.dparams is not None and made.dparams is not None:
        total.dparams += made.dparams
    first = total.dx is None and total.dparams is None
    return Made(made.dx, None, made.dparams) if first else total
