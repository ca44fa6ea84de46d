"""Searches over the ranks of a group find what one process finds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from launch import run, succeeded
from torch import Tensor
from torch import distributed as dist

import contrastive_kernels as ck

D = 8


def inputs(n: int, m: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, some of them equal, and ids."""
    g = torch.Generator().manual_seed(n + m)
    x, y = torch.randn(n, D, generator=g), torch.randn(m, D, generator=g)
    y[m // 2 :] = y[: m - m // 2]  # ties, on other ranks too
    return x, y, torch.randint(4, (n,), generator=g), torch.randint(4, (m,), generator=g)


def search(x: Tensor, y: Tensor, ids: tuple[Tensor, Tensor], two: Tensor, **over: Any) -> dict[str, Any]:
    positives = two[:, 0]
    drawn = ck.sample_negatives(
        x, y, 3.0, positives=positives, exclude=ids, generator=torch.Generator().manual_seed(5), **over
    )
    metrics = ck.retrieval_metrics(x, y, (1, 3, 10), positives=positives, **over)
    several = ck.retrieval_metrics(x, y, (1, 3, 10), positives=two, relevance=two.clamp(min=0) * 0 + 2, **over)
    return {
        "drawn": drawn,
        "hardest": ck.hardest_negatives(x, y, positives=positives, **over),
        "many": ck.hardest_negatives(x, y, k=4, skip=1, margin=0.5, positives=positives, exclude=ids, **over),
        "ranks": metrics.ranks,
        "several": several.positive_ranks,
        "figures": (metrics.recall, metrics.median_rank, metrics.mean_reciprocal_rank),
        "graded": (several.mean_average_precision, several.precision, several.ndcg),
    }


def places(sizes: list[int], rank: int) -> slice:
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def on_ranks(rows: list[int], cols: list[int], positives: Tensor) -> dict[str, Any]:
    rank = dist.get_rank()
    i, j = places(rows, rank), places(cols, rank)
    x, y, row_ids, col_ids = inputs(sum(rows), sum(cols))
    own = torch.where(positives[i] < 0, -1, positives[i] - j.start)
    return search(x[i], y[j], (row_ids[i], col_ids[j]), own, group="world", uneven=True)


@pytest.mark.parametrize("rows, cols", [([3, 3], [3, 3]), ([4, 0, 6], [9, 5, 0]), ([2, 1], [70, 130])], ids=str)
def test_searches(rows, cols, tmp_path):
    """Every row's positive lies on its own rank, if it has one."""
    g = torch.Generator().manual_seed(1)
    positives = torch.full((sum(rows), 2), -1)
    for rank in range(len(rows)):
        i, j = places(rows, rank), places(cols, rank)
        if cols[rank]:
            positives[i] = torch.randint(j.start, j.stop, (rows[rank], 2), generator=g)
    x, y, row_ids, col_ids = inputs(sum(rows), sum(cols))
    wanted = search(x, y, (row_ids, col_ids), positives)
    found = succeeded(run(len(rows), on_ranks, tmp_path, rows, cols, positives))
    for name in ("drawn", "hardest", "many", "ranks", "several"):
        assert torch.equal(torch.cat([one[name] for one in found]), wanted[name]), name
    assert all(one["figures"] == wanted["figures"] for one in found)
    torch.testing.assert_close([one["graded"] for one in found], [wanted["graded"]] * len(found), equal_nan=True)
