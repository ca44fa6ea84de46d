"""The driver of searches: walks panels of the score matrix and keeps, of every row, its best column or a count.

No gradients, no columns' state. As in ``driver.py``, one workspace of bounded size holds a panel, and memory beside
x [N, D], y [M, D] and the result is that of the workspace.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends import Backend
from ..panels.pairs import Pairs
from ..panels.panel import SearchPanel
from ..panels.size import SMALLEST_PANEL, PanelBytes, blocks, score_dtype, square_side
from ..panels.terms import PairTerm

__all__ = ["Search", "count", "find", "panel_side"]


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


def count(search: Search, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """How many of each row's scores lie below `low` [N] and above `high` [N]; two int64 vectors [N]."""
    below, above = (torch.zeros(len(search.x), dtype=torch.int64, device=search.x.device) for _ in range(2))
    for i, panel in _panels(search):
        panel.low, panel.high, panel.below, panel.above = low[i], high[i], below[i], above[i]
        search.backend.search_panel(search.term, panel)
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
