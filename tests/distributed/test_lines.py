"""Rows that travel behind the header of an agreement: in room that all ranks expect alike, whatever came before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from launch import run, succeeded
from torch import Tensor
from torch import distributed as dist

import contrastive_kernels as ck
from contrastive_kernels.distributed import count_traffic
from contrastive_kernels.distributed.lines import Expected, expected_of

D = 6


def batch(sizes: list[int], seed: int) -> tuple[Tensor, ...]:
    """All rows of all ranks, and this rank's."""
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(sum(sizes), D, generator=g, dtype=torch.float64) for _ in range(2))
    rank = dist.get_rank()
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    return x, y, *(v[own].clone().requires_grad_() for v in (x, y))


def check(sizes: list[int], seed: int, group: Any = "world", loss: str = "clip_loss") -> int:
    """One loss is that of one process, with its gradients; how many messages it took."""
    call = getattr(ck, loss)
    x, y, own_x, own_y = batch(sizes, seed)
    x, y = x.requires_grad_(), y.requires_grad_()
    wanted = call(x, y, 2.0)
    wanted.backward()
    with count_traffic() as traffic:
        found = call(own_x, own_y, 2.0, group=group, gradients="sum", uneven=True)
        found.backward()
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    start, rank = sum(sizes[: dist.get_rank()]), dist.get_rank()
    own = slice(start, start + sizes[rank])
    torch.testing.assert_close((own_x.grad, own_y.grad), (x.grad[own], y.grad[own]), rtol=1e-10, atol=1e-12)
    return traffic.calls


def other_sizes() -> list[int]:
    """Batches that grow, shrink and move from rank to rank; the room is that of the longest line before."""
    sizes = ([3, 3], [3, 3], [5, 1], [5, 1], [1, 5], [0, 4], [7, 7], [2, 2], [2, 2])
    return [check(list(each), seed) for seed, each in enumerate(sizes)]


def test_rows_that_do_not_fit_take_a_message_of_their_own(tmp_path):
    for found in succeeded(run(2, other_sizes, tmp_path)):
        assert found == [3, 2, 3, 2, 2, 2, 3, 2, 2]


def in_turns() -> list[int]:
    """Several functions in turn, of which some bring nothing: each is expected after the one before."""
    found = []
    for turn in range(4):
        found.append(check([3, 2], turn) + check([4, 4], turn, loss="nt_xent"))
        _, _, x, y = batch([3, 2], turn)
        ck.geometric_consistency(x, y, group="world", uneven=True).backward()
    return found


def test_functions_in_turn(tmp_path):
    for found in succeeded(run(2, in_turns, tmp_path)):
        assert found[2:] == [4, 4]


def of_groups() -> list[int]:
    """Two groups in turn, of all ranks and of two, while backward passes of the one wait for the other."""
    part = dist.new_group([0, 2])
    found = []
    for turn in range(3):
        *_, x, y = batch([2, 3, 1], turn)
        waiting = ck.info_nce(x, y, 2.0, group="world", uneven=True)
        if dist.get_rank() != 1:
            rows = torch.eye(4, dtype=torch.float64).requires_grad_()
            ck.clip_loss(rows, rows, 2.0, group=part).backward()
        found.append(check([2, 3, 1], turn))
        waiting.backward()
        assert x.grad is not None and x.grad.isfinite().all()
    return found


def test_groups_in_turn(tmp_path):
    for found in succeeded(run(3, of_groups, tmp_path)):
        assert found[-1] == 2


def mistaken() -> list[str]:
    """Mistakes of one rank between steps, when all expect rows: the same words on both, and the next step is right."""
    last, said = dist.get_rank() == 1, []
    for turn in range(2):
        check([3, 3], turn), check([3, 3], turn)
        *_, x, y = batch([3, 3], turn)
        mistakes: list[Any] = [
            lambda x=x, y=y: (ck.nt_xent if last else ck.clip_loss)(x, y, 2.0, group="world"),
            lambda x=x, y=y: (ck.geometric_consistency(x, y, group="world") if last
                              else ck.clip_loss(x, y, 2.0, group="world")),
            lambda x=x, y=y: ck.clip_loss(x, y[:2] if last else y, 2.0, group="world"),
            lambda x=x, y=y: ck.clip_loss(x[: 2 + last], y[: 2 + last], 2.0, group="world"),
            lambda x=x, y=y: ck.clip_loss(x, y, 2.0, group="world", strategy="ring" if last else "auto"),
            lambda x=x, y=y: ck.clip_loss(*(torch.cat([v] * (1 + last), 1) for v in (x, y)), 2.0, group="world"),
        ]  # fmt: skip
        for mistake in mistakes:
            with pytest.raises(ValueError) as caught:
                mistake()
            said.append(str(caught.value))
            check([3, 3], turn)
    return said


def test_mistakes_between_steps(tmp_path):
    one, other = succeeded(run(2, mistaken, tmp_path))
    assert one == other and len(one) == 12
    assert "loss=clip_loss" in one[0] and "loss=nt_xent" in one[0] and "uneven: expected True" in one[3]


def emptied() -> list[int]:
    """A large matrix between small ones leaves no room behind, nor does another strategy."""
    rooms = []
    for strategy in ("auto", "auto", "ring", "auto", "grid"):
        *_, x, y = batch([3, 3], 0)
        ck.clip_loss(x, y, 2.0, group="world", strategy=strategy).backward()
        rooms.append(expected_of(dist.group.WORLD).length)  # type: ignore[arg-type]
    return rooms


def test_what_brings_nothing_leaves_no_room(tmp_path):
    line = 2 * 3 * D * 8
    for found in succeeded(run(2, emptied, tmp_path)):
        assert found == [line, line, 0, line, 0]


def test_what_is_expected():
    """A function of the calls that were agreed on alone, bounded, and nothing after an error."""
    expected = Expected()
    assert expected.room == 0
    expected.learn("a", 80)
    assert expected.room == 80
    expected.learn("b", 0)
    assert expected.room == 0
    expected.learn("a", 80), expected.learn("b", 0)
    assert expected.room == 80
    expected.learn("a", 2**30)
    assert expected.room == 0
    expected.forget()
    assert expected.room == 0 and not expected.rooms


def of_one_row() -> list[Tensor]:
    """One row a rank, with ids, which the C++ pass reads as dense vectors."""
    x, y = (torch.randn(2, D, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    own, ids = slice(dist.get_rank(), dist.get_rank() + 1), torch.tensor([5, 7])
    found = []
    for loss, more in (("clip_loss", ()), ("sigmoid", (-1.0,)), ("info_nce", ())):
        for strategy in ("replicated", "strips"):
            value = getattr(ck, loss)(x[own], y[own], 2.0, *more, ids=ids[own], group="world", strategy=strategy)
            found.append(value - getattr(ck, loss)(x, y, 2.0, *more, ids=ids))
    return found


def test_one_row_a_rank(tmp_path):
    for rank in zip(*succeeded(run(2, of_one_row, tmp_path))):
        assert abs(sum(rank)) < 1e-5
