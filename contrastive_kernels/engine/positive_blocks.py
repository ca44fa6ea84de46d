"""The pairs of equal ids, in blocks: where rows and columns are sorted by their ids, they lie about a diagonal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..panels.size import blocks, score_dtype

__all__ = ["PositiveBlock", "PositiveBlocks"]

#: Rows of a block at most; with few of a class, most of a block's pairs are not of equal ids.
_ROWS = 128
#: Matrices of the size of a block's scores that are made of them at a time.
_TEMPORARIES = 6


class PositiveBlock(NamedTuple):
    """Some rows and columns, by their places among the sorted ones, and which of their pairs are positives [R, C]."""

    rows: slice
    cols: slice
    positives: Tensor


class PositiveBlocks:
    """Rows x [N, D] and columns y [M, D] sorted by their ids, in the dtype of the scores.

    Parameters
    ----------
    x, y, row_ids, col_ids : Tensor
        The features, and int64 [N], [M].
    symmetric : bool
        y is x, and no row is its own positive.
    workspace_bytes : int
        Bound of the memory that a block takes.
    """

    def __init__(
        self, x: Tensor, y: Tensor, row_ids: Tensor, col_ids: Tensor, symmetric: bool, workspace_bytes: int
    ) -> None:
        dtype = score_dtype(x.dtype)
        self.row_ids, self.row_order = torch.sort(row_ids, stable=True)
        self.col_ids, self.col_order = torch.sort(col_ids, stable=True)
        self.symmetric = symmetric
        self.x = x[self.row_order].to(dtype)
        self.y = self.x if symmetric else y[self.col_order].to(dtype)
        self.width = max(1, workspace_bytes // (_TEMPORARIES * dtype.itemsize * _ROWS))

    def __iter__(self) -> Iterator[PositiveBlock]:
        """Every pair once, in one order. The host waits once for the devices' sorted ids."""
        n, m = self.row_ids.shape[0], self.col_ids.shape[0]
        if not n or not m:
            return
        some = list(blocks(n, _ROWS))
        ends = torch.tensor([[i.start, i.stop - 1] for i in some], dtype=torch.int64, device=self.row_ids.device)
        first, last = self.row_ids[ends].T.contiguous()
        begin = torch.searchsorted(self.col_ids, first).tolist()
        stop = torch.searchsorted(self.col_ids, last, right=True).tolist()
        for i, start, end in zip(some, begin, stop):
            for j in blocks(end - start, self.width):
                cols = slice(start + j.start, start + j.stop)
                positives = self.row_ids[i, None] == self.col_ids[cols]
                if self.symmetric:
                    positives &= self.row_order[i, None] != self.col_order[cols]
                yield PositiveBlock(i, cols, positives)
