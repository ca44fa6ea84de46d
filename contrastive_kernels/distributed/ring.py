"""The ring: columns travel from rank to rank, with what belongs to them, so that no rank ever holds more than two
ranks' columns.

On the first trip their states go with them, on the second one the sums of their gradients. The next rank's columns are
under way while this one's are multiplied.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..engine.gradients import Wanted
from ..panels.pairs import Pairs
from ..panels.panel import Side
from .group import Ranks, Sizes
from .route import Block, Made, Own, Route, merged
from .transport import Arrival

__all__ = ["Ring"]

#: Messages between the same two ranks that may overtake each other.
_COLUMNS, _VECTORS, _PAIRS, _STATE, _SUMS = range(5)


class _Guest(NamedTuple):
    """The columns that are here."""

    #: whose they are
    rank: int
    #: [k, m] what goes with them, one vector below the other
    vectors: Tensor
    block: Block


def _as_it_is(vector: Any) -> Any:
    return vector


class Ring(Route):
    """This rank's place in the ring."""

    def __init__(self, ranks: Ranks, own: Own, sizes: Sizes, call: str) -> None:
        self._own, self._sizes = own, sizes
        self._all = ranks.transport(call)

    def _trip(self, vectors: Tensor) -> Iterator[_Guest]:
        """Every rank's columns, this one's first, with the vectors [k, m] that go with them."""
        own, rank, size = self._own, self._all.rank, self._all.size
        y, pairs = own.problem.y.contiguous(), own.problem.pairs
        for step in range(size):
            here, following = (rank - step) % size, (rank - step - 1) % size
            coming, m = None, self._sizes.cols[following]
            if step + 1 < size:
                coming = (
                    self._all.pass_on(y, (m, y.shape[1]), _COLUMNS),
                    self._all.pass_on(vectors, (len(vectors), m), _VECTORS),
                    pairs.mapped(_as_it_is, partial(self._all.pass_on, arriving=(m,), tag=_PAIRS)),
                )
            said = self._leaving_out(pairs) if here == rank else pairs
            yield _Guest(here, vectors, Block(own, own.problem.x, y, said, keeps=False))
            if coming is not None:
                y, vectors = coming[0].wait(), coming[1].wait()
                pairs = coming[2].mapped(_as_it_is, Arrival.wait)

    def _leaving_out(self, pairs: Pairs) -> Pairs:
        """What is said of the pairs of this rank's rows and columns, among which the positives are."""
        own = self._own
        if own.problem.index is None and not own.mirrored:
            return pairs.leaving_out(own.problem.offset, None)
        return pairs.leaving_out(None, own.excluded())

    def statistics(self, params: Tensor, *, cols: bool) -> tuple[Tensor, Tensor | None]:
        """The states over the whole matrix of this rank's rows and columns."""
        term, travelling = self._own.term, None
        rows: list[Tensor] = []
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
        total, travelling, sums = Made(None, None, None), None, None
        states: list[Tensor] = []
        for guest in self._trip(vectors):
            n = len(vectors)
            side = Side() if not n else Side(None, guest.vectors[: n - 1] if n > 1 else None, guest.vectors[n - 1])
            made = guest.block.gradients(params, row, side, wanted, fold=fold)
            total = _sum(total, made)
            if fold and made.row is not None:
                states.append(made.row)
                if made.col is not None:
                    travelling = self._merge_and_pass(guest, made.col, travelling)
            if made.dy is not None:
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
