"""Searches over the ranks of a group: every rank's rows meet the candidates of all of them, which travel in a ring."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..engine.search import Search, find, find_many, merged
from ..operators.search import count_ranks
from .group import Ranks, Sizes
from .ring import travel

__all__ = ["Corpus", "best_of_all_ranks", "largest_of_all_ranks"]


def best_of_all_ranks(ranks: Ranks, call: str, sizes: Sizes, search: Search) -> Tensor:
    """The column of each row's best score among the columns of all ranks [n] int64, -1 where none is left."""
    best = torch.full((len(search.x),), -torch.inf, dtype=search.params.dtype, device=search.x.device)
    column = torch.full_like(best, -1, dtype=torch.int64)
    for among in _visits(ranks, call, sizes, search):
        score, found = find(among)
        # of equal ones the first, whatever the order of the visits
        better = (score > best) | ((score == best) & (found >= 0) & ((found < column) | (column < 0)))
        best, column = torch.where(better, score, best), torch.where(better, found, column)
    return column


def largest_of_all_ranks(
    ranks: Ranks, call: str, sizes: Sizes, search: Search, most: int, upper: Tensor | None
) -> Tensor:
    """The columns of each row's largest scores of at most `upper` [n] among all ranks' [n, most], -1 at the end."""
    best = torch.full((len(search.x), most), -torch.inf, dtype=search.params.dtype, device=search.x.device)
    column = torch.full_like(best, -1, dtype=torch.int64)
    for among in _visits(ranks, call, sizes, search):
        score, found = find_many(among, most, upper)
        best, column = merged((best, score), (column, found), most)
    return column


def _visits(ranks: Ranks, call: str, sizes: Sizes, search: Search) -> Iterator[Search]:
    """The same search among the columns of every rank.

    Columns count from the first one of rank 0. So do the rows that noise depends on, and the seed is that of rank 0:
    the draws are those of one process.
    """
    transport, pairs, seed = ranks.transport(call), search.pairs, search.seed
    first_row, first = sum(sizes.rows[: ranks.rank]), sum(sizes.cols[: ranks.rank])
    if seed is not None:
        seed = transport.all_gather(seed, [1] * ranks.size)[:1]
    columns = None if pairs.columns is None else torch.where(pairs.columns < 0, -1, pairs.columns + first)
    own = [search.y] if pairs.col_ids is None else [search.y, pairs.col_ids]
    for rank, (y, *ids) in travel(transport, sizes.cols, own):
        start = sum(sizes.cols[:rank])
        said = pairs._replace(columns=columns, col_ids=ids[0] if ids else None, first_row=first_row, first_column=start)
        if len(y) and len(search.x):
            yield replace(search, y=y, pairs=said, seed=seed)


class Corpus:
    """The documents of all ranks, as the metrics of retrieval ask them."""

    def __init__(self, ranks: Ranks, call: str, sizes: Sizes, y: Tensor) -> None:
        self._transport, self._sizes, self._y = ranks.transport(call), sizes, y
        #: how many there are
        self.size = sum(sizes.cols)

    def count(
        self, x: Tensor, index: Tensor, low: Tensor, high: Tensor, backend: str, workspace_bytes: int
    ) -> tuple[Tensor, Tensor]:
        """How many scores lie below `low` and above `high`, [n] or [K, n], without a row's own `index` [n, P]."""
        below, above = (torch.zeros(low.shape, dtype=torch.int64, device=x.device) for _ in range(2))
        for rank, (y,) in travel(self._transport, self._sizes.cols, [self._y]):
            left_out = index if rank == self._transport.rank else index[:, :0]
            if len(x) and len(y):
                parts = count_ranks(x, y, left_out, low, high, backend, workspace_bytes)
                below, above = below + parts[0], above + parts[1]
        return below, above

    def largest(self, own: Tensor) -> Tensor:
        """The largest of the ranks' numbers."""
        return self._transport.all_gather(own.reshape(1), [1] * self._transport.size).amax()

    def joined(self, own: Tensor) -> Tensor:
        """The queries' vectors [n] of all ranks, one after the other."""
        return self._transport.all_gather(own, self._sizes.rows)
