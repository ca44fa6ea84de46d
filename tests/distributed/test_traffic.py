"""What moves between ranks, counted at the collective calls; what a rank holds; what happens when one is missing."""

from __future__ import annotations

import os
import resource
import time
from typing import Any

import pytest
import table
import torch
from launch import Failure, run, succeeded
from torch import distributed as dist

import contrastive_kernels as ck
from contrastive_kernels.distributed import count_traffic
from contrastive_kernels.distributed.replicated import for_few_messages

N, D = 12, 16


def elements(mesh: tuple[int, int] | None, strategy: str) -> int:
    """Entries of features and gradients that a step of CLIP's loss receives on this rank."""
    group: Any = "world" if mesh is None else dist.device_mesh.init_device_mesh("cpu", mesh)
    image, text = (torch.randn(N, D, requires_grad=True) for _ in range(2))
    with count_traffic() as traffic:
        ck.clip_loss(image, text, 5.0, group=group, strategy=strategy).backward()
    return traffic.elements


@pytest.mark.parametrize("ranks, mesh", [(4, (4, 1)), (4, (1, 4)), (4, (2, 2)), (6, (2, 3)), (6, (6, 1)), (4, None)])
def test_a_grid_receives_what_the_plan_says(ranks, mesh, tmp_path):
    """R - 1 ranks' y and C - 1 ranks' x, and their gradients; by default the grid is as square as may be."""
    found = succeeded(run(ranks, elements, tmp_path, mesh, "grid"))
    rows, cols = mesh or (2, 2)
    assert found == [2 * N * D * (rows - 1 + cols - 1)] * ranks


def test_a_square_grid_receives_two_thirds_of_a_row_and_a_third_of_both_sides(tmp_path):
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    (square, *_), (row, *_) = (
        succeeded(run(4, elements, tmp_path / name, mesh, "grid")) for name, mesh in (("1", (2, 2)), ("2", (4, 1)))
    )
    both_sides = 2 * 2 * N * D * 3  # x and y of three others, and the gradients of both
    assert 3 * square == 2 * row and 3 * square == both_sides


def test_a_ring_receives_every_column_twice(tmp_path):
    """The columns on both trips, and on the second one their gradients, which come home at last."""
    assert succeeded(run(3, elements, tmp_path, None, "ring")) == [N * D * (2 + 2 + 3)] * 3


def padded(strategy: str) -> int:
    """The same of shards of 1 and of 7 rows, which a gather pads."""
    n = 7 if dist.get_rank() else 1
    image, text = (torch.randn(n, D, requires_grad=True) for _ in range(2))
    with count_traffic() as traffic:
        ck.clip_loss(image, text, 5.0, group="world", uneven=True, strategy=strategy).backward()
    return traffic.elements


@pytest.mark.parametrize(
    "strategy, expected",
    [("grid", [7 * D + 1 * D, 7 * D + 7 * D]), ("replicated", [2 * 7 * D] * 2), ("strips", [2 * 7 * D] * 2)],
)
def test_padding_counts(strategy, expected, tmp_path):
    assert succeeded(run(2, padded, tmp_path, strategy)) == expected


def messages(strategy: str) -> int:
    """Collective calls of a step."""
    image, text = (torch.randn(N, D, requires_grad=True) for _ in range(2))
    ck.clip_loss(image, text, 5.0, group="world", strategy=strategy).backward()
    with count_traffic() as traffic:
        ck.clip_loss(image, text, 5.0, group="world", strategy=strategy).backward()
    return traffic.calls


@pytest.mark.parametrize("strategy, expected", [("auto", 2), ("strips", 3)])
def test_a_small_batch_takes_two_messages(strategy, expected, tmp_path):
    """Sizes with all rows, and what comes from upstream: "auto" knows when that is best. Strips have states between."""
    assert succeeded(run(2, messages, tmp_path, strategy)) == [expected] * 2


# ---- memory ----


def peak(strategy: str, n: int) -> float:
    """MiB by which a step of n rows of this rank raises the peak of its memory."""
    features = [torch.randn(n, 64, requires_grad=True) for _ in range(2)]
    small = [torch.randn(8, 64, requires_grad=True) for _ in range(2)]
    ck.clip_loss(*small, 5.0, group="world", strategy=strategy).backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ck.clip_loss(*features, 5.0, group="world", strategy=strategy, workspace_bytes=8 * 2**20).backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


@pytest.mark.parametrize("strategy", ["grid", "ring"])
def test_no_rank_holds_the_matrix(strategy, tmp_path):
    """20,000 rows on two ranks: a block of the matrix has 800 MB on either, the features of all of them 10 MB."""
    for mebibytes in succeeded(run(2, peak, tmp_path, strategy, 10_000, seconds=120)):
        assert mebibytes < 100


# ---- faults ----


def mistaken(kind: str) -> None:
    rank = dist.get_rank()
    x = torch.randn(4, 8 if rank or kind != "features" else 9, requires_grad=kind != "gradient" or rank == 0)
    y = torch.randn(len(x), x.shape[1])
    if kind == "dtype" and rank == 0:
        x, y = x.bfloat16(), y.bfloat16()
    if kind == "argument" and rank == 1:
        y = y[:3]
    if kind == "rows" and rank == 1:
        x, y = x[:3], y[:3]
    loss = ck.nt_xent if kind == "loss" and rank == 0 else ck.clip_loss
    scale = 5.0 + (kind == "scale" and rank)
    reduction = "sum" if kind == "reduction" and rank else "mean"
    loss(x, y, scale, group="world", reduction=reduction)


@pytest.mark.parametrize(
    "kind, words",
    [
        ("features", ["features=9", "features=8"]),
        ("dtype", ["torch.bfloat16", "torch.float32"]),
        ("loss", ["loss=nt_xent", "loss=clip_loss"]),
        ("scale", ["scale=5.0", "scale=6.0"]),
        ("reduction", ["reduction=mean", "reduction=sum"]),
        ("gradient", ["gradients of="]),
        ("argument", ["rank 1 raised ValueError: image_features and text_features: expected the same number of rows"]),
        ("rows", ["uneven: expected True", "[4, 3]"]),
    ],
)
def test_a_mistake_on_one_rank_is_an_error_on_all(kind, words, tmp_path):
    start = time.monotonic()
    found = run(2, mistaken, tmp_path, kind)
    assert time.monotonic() - start < 30  # nobody waited for the group's time-out
    for one in found:
        assert isinstance(one, Failure) and one.kind == "ValueError"
        assert all(word in one.text for word in words), one.text
    assert found[0].text == found[1].text


def dying(when: str) -> None:
    features = [torch.randn(4, 8, requires_grad=True) for _ in range(2)]
    if dist.get_rank() == 1 and when == "before":
        os._exit(1)
    loss = ck.clip_loss(*features, 5.0, group="world")
    if dist.get_rank() == 1:
        os._exit(1)
    loss.backward()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_rank_that_dies_is_an_error_with_words_on_the_others(when, tmp_path):
    survivor, dead = run(2, dying, tmp_path, when, seconds=5)
    assert dead is None
    assert isinstance(survivor, Failure) and survivor.kind == "RuntimeError"
    assert "rank 0 of 2 could not exchange" in survivor.text and "died" in survivor.text


def leaving_out() -> None:
    """A rank that never calls the loss."""
    if dist.get_rank() == 1:
        time.sleep(8)
    else:
        ck.clip_loss(torch.eye(4), torch.eye(4), 5.0, group="world")


def test_a_rank_that_leaves_the_call_out_is_waited_for_as_long_as_the_group_says(tmp_path):
    waiting, _ = run(2, leaving_out, tmp_path, seconds=3)
    assert isinstance(waiting, Failure) and "left out this call" in waiting.text


def in_a_part_of_the_world() -> float:
    """Ranks 1 and 2 of three share a loss; rank 0 is in no group of them."""
    part = dist.new_group([1, 2])
    if dist.get_rank() == 0:
        with pytest.raises(ValueError, match="this process belongs to"):
            ck.clip_loss(torch.eye(4), torch.eye(4), 5.0, group=part)
        return 0.0
    x = torch.eye(8)[4 * dist.get_rank() - 4 : 4 * dist.get_rank()]
    return ck.clip_loss(x, x, 5.0, group=part).item()


def test_a_group_that_is_a_part_of_the_world(tmp_path):
    _, one, other = succeeded(run(3, in_a_part_of_the_world, tmp_path))
    assert one == other == pytest.approx(ck.clip_loss(torch.eye(8), torch.eye(8), 5.0).item(), rel=1e-6)


# ---- the plan ----


LOSSES = ("info_nce", "clip_loss", "nt_xent", "sigmoid", "decomposable")


def all_counted(strategy: str, n: int) -> list[tuple[int, int]]:
    """Elements and bytes that a step of each loss receives on this rank."""
    return [counted(loss, strategy, n) for loss in LOSSES]


def counted(loss: str, strategy: str, n: int) -> tuple[int, int]:
    """Of one loss."""
    x, y = (torch.randn(n, D, requires_grad=True) for _ in range(2))
    scale = torch.tensor(3.0, requires_grad=True)
    more: tuple[Any, ...] = ()
    if loss in ("sigmoid", "decomposable"):
        more = (-1.0,) if loss == "sigmoid" else (torch.zeros(n),)
    # (the default grid's groups are made in the first call)
    getattr(ck, loss)(x, y, scale, *more, group="world", strategy=strategy).backward()
    with count_traffic() as traffic:
        getattr(ck, loss)(x, y, scale, *more, group="world", strategy=strategy).backward()
    return traffic.elements, traffic.bytes


@pytest.mark.parametrize("ranks", [4, 6])
@pytest.mark.parametrize("strategy", ["replicated", "strips", "grid", "ring"])
def test_the_plan_counts_what_a_rank_receives(strategy, ranks, tmp_path):
    planned = [ck.plan(N * ranks, None, D, loss=loss, world=ranks, strategy=strategy).over_ranks for loss in LOSSES]
    for found in succeeded(run(ranks, all_counted, tmp_path, strategy, N)):
        assert found == [(each.elements, each.bytes) for each in planned]


@pytest.mark.parametrize(
    "ranks, rows, strategy",
    [(2, 512, "replicated"), (2, 514, "grid"), (4, 1024, "strips"), (4, 1028, "grid"), (3, 513, "grid")],
)
def test_few_messages_for_few_rows(ranks, rows, strategy):
    """All rows and all pairs, all rows and a rank's own pairs, or a grid, which of a prime number is one column."""
    assert ck.plan(rows, None, 256, world=ranks).over_ranks.strategy == strategy


@pytest.mark.parametrize("ranks", range(2, 9))
def test_what_all_ranks_gather_each_brings(ranks):
    """A rank decides by its own share whether its rows go with the first message."""
    for rows, cols in ((512, 512), (1024, 1024), (64, 8192), (16_384, 32)):
        if for_few_messages(ranks, rows, cols, 256) is not None:
            for n, m in ((0, 0), (rows, 3 * cols // 10), (3 * rows // 10, cols), (rows, 1), (1, cols)):
                assert for_few_messages(ranks, n, m, 256) is not None


def test_the_table_in_the_docs_is_the_plan():
    page = table.PAGE.read_text()
    assert table.page_with(page, table.table()) == page, "python tests/distributed/table.py writes it anew"
