"""Sums over the columns whose id is the row's, in O((N + M) D): a row's product with its class's sum, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ..panels.size import blocks

__all__ = ["ClassSums", "square_norms"]

#: float64 numbers of a block of rows on a CPU, which stay in a core's cache: fresh pages take longer than the sums.
_CACHED = 2**17


class ClassSums:
    """Which columns have a row's id, as numbers of classes.

    Everything is sorted, so that the host waits for nothing: there are at most as many classes as columns.

    Parameters
    ----------
    row_ids, col_ids : Tensor
        int64 [N], [M].
    workspace_bytes : int
        Bound of the memory that sums take, if it holds one number of every class.
    """

    def __init__(self, row_ids: Tensor, col_ids: Tensor, workspace_bytes: int) -> None:
        ids, order = torch.sort(col_ids)
        count = col_ids.shape[0]
        self.workspace_bytes = workspace_bytes
        self.of_cols = torch.empty_like(order)
        if not count:
            self.classes, self.of_rows, self.found = 0, torch.zeros_like(row_ids), torch.zeros_like(row_ids).bool()
            return
        numbers = torch.zeros_like(ids)
        numbers[1:] = (ids[1:] != ids[:-1]).cumsum(0)
        self.of_cols[order] = numbers
        place = torch.searchsorted(ids, row_ids).clamp_(max=count - 1)
        self.of_rows, self.found = numbers[place], ids[place] == row_ids
        self.classes = int(numbers[-1]) + 1 if ids.device.type == "cpu" else count

    def dots(self, x: Tensor, y: Tensor) -> Tensor:
        """sum_j <x_i, y_j> [N] over the columns of row i's id, in float64."""
        wide = _wide(x)
        dots = torch.zeros(x.shape[0], dtype=wide, device=x.device)
        if not self.classes:
            return dots
        room = self.workspace_bytes // (2 * wide.itemsize)
        width = min(max(1, room // self.classes), x.shape[1])
        chunk = max(1, (min(room, _CACHED) if x.device.type == "cpu" else room) // width)
        for start in range(0, x.shape[1], width):
            features = slice(start, start + width)
            sums = torch.zeros(self.classes, width, dtype=wide, device=x.device)[:, : x.shape[1] - start]
            for rows in blocks(y.shape[0], chunk):
                self._add(sums, self.of_cols[rows], y[rows, features].to(wide))
            for rows in blocks(x.shape[0], chunk):
                dots[rows] += (x[rows, features].to(wide) * sums[self.of_rows[rows]]).sum(1)
        return dots.masked_fill_(~self.found, 0.0)

    def _add(self, sums: Tensor, classes: Tensor, block: Tensor) -> None:
        """sums[classes_j] += block_j, in one order."""
        if sums.device.type == "cpu":
            sums.index_add_(0, classes, block)
        else:  # index_add_ on a GPU adds in no fixed order
            sums.index_put_((classes,), block, accumulate=True)

    def sums(self, values: Tensor) -> Tensor:
        """sum_j values_j [N] over the columns of row i's id, in float64."""
        ones = torch.ones(self.of_rows.shape[0], 1, dtype=values.dtype, device=values.device)
        return self.dots(ones, values[:, None])


def square_norms(x: Tensor) -> Tensor:
    """<x_i, x_i> [N] in float64."""
    found = torch.empty(x.shape[0], dtype=_wide(x), device=x.device)
    for rows in blocks(x.shape[0], max(1, _CACHED // x.shape[1]) if x.device.type == "cpu" else max(1, x.shape[0])):
        torch.sum(x[rows].to(found.dtype).square(), 1, out=found[rows])
    return found


def _wide(x: Tensor) -> torch.dtype:
    """float64, where the device has it."""
    return torch.float32 if x.device.type == "mps" else torch.float64
