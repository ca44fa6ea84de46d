"""The ring: columns travel from rank to rank, with what belongs to them, so that no rank ever holds more than two
ranks' columns.

On the first trip their states go with them, on the second one the sums of their gradients. The next rank's columns are
under way while this one's are multiplied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..engine.gradients import Wanted
from ..panels.pairs import Pairs
from ..panels.panel import Side
from .group import Ranks, Sizes
from .route import Block, Made, Own, Route, merged
from .transport import Arrival, Transport

__all__ = ["Ring", "travel"]

#: Tags of messages beside those of `travel`, which counts its tensors from 0: some may overtake each other.
_STATE, _SUMS = 16, 17


def travel(transport: Transport, cols: Sequence[int], own: Sequence[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
    """Every rank's tensors [m, ...], this rank's first, the next ones under way: (whose, the tensors).

    `cols`: the numbers m of all ranks, which all go through to the end.
    """
    here, rank, size = list(own), transport.rank, transport.size
    for step in range(size):
        guest, following = (rank - step) % size, (rank - step - 1) % size
        coming: list[Arrival] = []
        if step + 1 < size:
            coming = [transport.pass_on(v, (cols[following], *v.shape[1:]), tag) for tag, v in enumerate(here)]
        yield guest, here
        if coming:
            here = [arrival.wait() for arrival in coming]


class _Guest(NamedTuple):
    """The columns that are here."""

    #: whose they are
    rank: int
    #: their normaliser and gain, if these are known
    side: Side
    block: Block


class Ring(Route):
    """This rank's place in the ring."""

    def __init__(self, ranks: Ranks, own: Own, sizes: Sizes, call: str) -> None:
        super().__init__(sizes)
        self._own = own
        self._all = ranks.transport(call)

    def _trip(self, side: Side) -> Iterator[_Guest]:
        """Every rank's columns, this one's first, with what goes with them."""
        own, said = self._own, list[Tensor]()
        own.problem.pairs.mapped(_as_it_is, said.append)
        vectors = [] if side.gain is None else [side.gain]
        if side.gain is not None and side.normalizer is not None:
            vectors.append(side.normalizer.T[:, None])  # (no matrix of features)
        for rank, (y, *rest) in travel(self._all, self.sizes.cols, [own.problem.y, *said, *vectors]):
            of_columns, given = iter(rest), rest[len(said) :]
            pairs = own.problem.pairs.mapped(_as_it_is, lambda _, of_columns=of_columns: next(of_columns))  # type: ignore[misc]
            if rank == self._all.rank:
                pairs = self._leaving_out(pairs)
            normalizer = given[1][:, 0].T.contiguous() if len(given) == 2 else None
            guests = Side(None, normalizer, given[0]) if given else Side()
            yield _Guest(rank, guests, Block(own, own.problem.x, y, pairs, keeps=False))

    def _leaving_out(self, pairs: Pairs) -> Pairs:
        """What is said of the pairs of this rank's rows and columns, among which the positives are."""
        own = self._own
        if own.problem.index is None and not own.mirrored:
            return pairs.leaving_out(own.problem.offset, None)
        return pairs.leaving_out(None, own.excluded())

    def statistics(self, params: Tensor, *, cols: bool) -> tuple[Tensor, Tensor | None]:
        """The states over the whole matrix of this rank's rows and columns."""
        rows: list[Tensor] = []
        travelling = None
        for guest in self._trip(Side()):
            row, col = guest.block.statistics(params, cols=cols)
            rows.append(row)
            if col is not None:
                travelling = self._merge_and_pass(guest, col, travelling)
        return merged(torch.stack(rows), self._own.term), travelling

    def gradients(self, params: Tensor, row: Side, col: Side, wanted: Wanted, *, fold: bool) -> Made:
        """The gradients of this rank's rows and columns."""
        states: list[Tensor] = []
        total, travelling, sums = Made(None, None, None), None, None
        for guest in self._trip(col):
            made = guest.block.gradients(params, row, guest.side, wanted, fold=fold)
            total = _sum(total, made)
            if fold and made.row is not None:
                states.append(made.row)
                if made.col is not None:
                    travelling = self._merge_and_pass(guest, made.col, travelling)
            if made.dy is not None:
                sums = self._add_and_pass(guest, made.dy, sums)
        row_state = merged(torch.stack(states), self._own.term) if fold else None
        return Made(total.dx, None if sums is None else sums.wait(), total.dparams, row_state, travelling)

    def _merge_and_pass(self, guest: _Guest, col: Tensor, arrived: Tensor | None) -> Tensor:
        """Adds to the state of a guest's columns and sends it on; gives that of the next one's, at last of one's own.

        (The state of the columns that begin their trip here has not come from anywhere.)
        """
        if guest.rank != self._all.rank:
            assert arrived is not None
            col = merged(torch.stack([arrived, col]), self._own.term)
        following = self.sizes.cols[(guest.rank - 1) % self._all.size]
        return self._all.pass_on(col[None], (1, len(col), following), _STATE).wait()[0]

    def _add_and_pass(self, guest: _Guest, dy: Tensor, arriving: Arrival | None) -> Arrival:
        """Adds to the gradient's sums of a guest's columns and sends them on; those of the next one's are coming."""
        if guest.rank != self._all.rank:
            assert arriving is not None
            dy = arriving.wait().add_(dy)
        following = self.sizes.cols[(guest.rank - 1) % self._all.size]
        return self._all.pass_on(dy, (following, dy.shape[1]), _SUMS)

    def total(self, own: Tensor) -> Tensor:
        """The sum over ranks."""
        return self._all.sum(own)


def _as_it_is(vector: Any) -> Any:
    return vector


def _sum(total: Made, made: Made) -> Made:
    """The gradients of this rank's rows, and its share of those of the parameters, over the blocks so far."""
    if total.dx is not None and made.dx is not None:
        total.dx += made.dx
    if total.dparams is not None and made.dparams is not None:
        total.dparams += made.dparams
    first = total.dx is None and total.dparams is None
    return Made(made.dx, None, made.dparams) if first else total
