"""The driver of searches: walks panels of the score matrix and keeps, of every row, its best columns or counts.

No gradients, no columns' state. As in ``driver.py``, one workspace of bounded size holds a panel, and memory beside
x [N, D], y [M, D] and the result is that of the workspace.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends import Backend
from ..backends.torch import search_scores
from ..panels.pairs import Pairs
from ..panels.panel import SearchPanel
from ..panels.size import SMALLEST_PANEL, PanelBytes, blocks, score_dtype, square_side
from ..panels.terms import PairTerm

__all__ = ["Search", "count", "find", "find_many", "merged", "panel_side"]


@dataclass(frozen=True)
class Search:
    """One score matrix z = scale * x yT + bias, and what is left out of it."""

    term: PairTerm
    #: [N, D], [M, D] contiguous, of one dtype
    x: Tensor
    y: Tensor
    #: [3] scale, bias and 0 in the dtype of the scores
    params: Tensor
    #: which pairs count
    pairs: Pairs
    backend: Backend
    workspace_bytes: int
    #: [1] int64, of the noise
    seed: Tensor | None = None
    #: the dtype of the scores, if it is not that of the operands' dtype
    score_dtype: torch.dtype | None = None


def find(search: Search) -> tuple[Tensor, Tensor]:
    """Each row's best score [N] and its column [N] int64; -inf and -1 where there is none."""
    n, device = len(search.x), search.x.device
    best = torch.full((n,), -torch.inf, dtype=search.params.dtype, device=device)
    column = torch.full((n,), -1, dtype=torch.int64, device=device)
    for i, panel in _panels(search):
        panel.best, panel.best_column = best[i], column[i]
        search.backend.search_panel(search.term, panel)
    return best, column


def find_many(search: Search, most: int, upper: Tensor | None) -> tuple[Tensor, Tensor]:
    """Each row's largest scores of at most `upper` [N], in falling order [N, most]; and their columns int64.

    Of equal scores the first column comes first. -inf and -1 where there are no more.
    """
    n, device = len(search.x), search.x.device
    best = torch.full((n, most), -torch.inf, dtype=search.params.dtype, device=device)
    column = torch.full((n, most), -1, dtype=torch.int64, device=device)
    for i, panel in _panels(search):
        z = search_scores(panel)
        if upper is not None:
            z.masked_fill_(z > upper[i, None], -torch.inf)
        highest, where = _largest(z, most)
        where += panel.pairs.first_column
        best[i], column[i] = merged((best[i], highest), (column[i], where), most)
    return best, column


def merged(scores: Sequence[Tensor], columns: Sequence[Tensor], most: int) -> tuple[Tensor, Tensor]:
    """The largest [R, most] of several rows of scores [R, .], and their columns; of equal ones the first column."""
    score, column = torch.cat(list(scores), 1), torch.cat(list(columns), 1)
    column, order = column.sort(dim=1, stable=True)
    score, falling = score.gather(1, order).sort(dim=1, descending=True, stable=True)
    column = column.gather(1, falling).masked_fill_(score == -torch.inf, -1)
    return score[:, :most], column[:, :most]


def _largest(z: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The `most` largest of every row [R, .] and where they are; of equal ones the first."""
    columns = z.shape[1]
    most = min(most, columns)
    if z.dtype == torch.float64:
        score, where = z.sort(dim=1, descending=True, stable=True)
        return score[:, :most], where[:, :most]
    # topk takes any of equal ones: so that none are, a score's bits, in its order, stand before its place from the end
    bits = (z + 0.0).view(torch.int32)  # -0 becomes 0
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64).mul_(2**32)
    key += torch.arange(columns - 1, -1, -1, dtype=torch.int64, device=z.device)
    where = columns - 1 - (key.topk(most, 1).values & 0xFFFFFFFF)
    return z.gather(1, where), where


def count(search: Search, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """How many of each row's scores lie below `low` and above `high`, [N] or several bounds [K, N]; two int64 alike."""
    below, above = (torch.zeros(low.shape, dtype=torch.int64, device=search.x.device) for _ in range(2))
    bounds = list(zip(*(v if v.dim() == 2 else [v] for v in (low, high, below, above))))
    for i, panel in _panels(search):
        for of_rows in bounds:
            panel.low, panel.high, panel.below, panel.above = (v[i] for v in of_rows)
            search.backend.search_panel(search.term, panel)
            panel.scores_ready = True
    return below, above


def _panels(search: Search) -> Iterator[tuple[slice, SearchPanel]]:
    """Every panel with its rows, row block by row block."""
    x, y = search.x, search.y
    dtype = search.score_dtype or score_dtype(x.dtype)
    side = panel_side(x, y, dtype, search.backend, search.workspace_bytes)
    scores = torch.empty(min(side, len(x)) * min(side, len(y)), dtype=dtype, device=x.device)
    for i in blocks(len(x), side):
        x_block = x[i].to(dtype)
        for j in blocks(len(y), side):
            shape = (i.stop - i.start, j.stop - j.start)
            tile = scores[: shape[0] * shape[1]].view(shape)
            yield (
                i,
                SearchPanel(
                    x=x_block,
                    y=y[j].to(dtype),
                    scores=tile,
                    weights=tile,
                    params=search.params,
                    pairs=search.pairs.block(i, j),
                    bfloat16_values=x.dtype == torch.bfloat16 and dtype == torch.float32,
                    seed=search.seed,
                ),
            )


def panel_side(x: Tensor, y: Tensor, dtype: torch.dtype, backend: Backend, workspace_bytes: int) -> int:
    """The side of a square panel for scores in `dtype`: as large as the workspace allows, in multiples of 64."""
    per_row = 2 * x.shape[1] * dtype.itemsize if x.dtype != dtype else 0  # copies of the operands' blocks
    size = PanelBytes(dtype.itemsize * (1 + backend.search_temporaries), per_row, 0)
    side = square_side(len(x), len(y), size, workspace_bytes)
    if side is None:
        raise ValueError(
            f"workspace_bytes: expected at least {size.of(SMALLEST_PANEL, SMALLEST_PANEL)} for the smallest panel "
            f"with D = {x.shape[1]}; got {workspace_bytes}"
        )
    return side
