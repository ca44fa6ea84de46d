"""lightly's losses and these: the same values, gradients and memory banks, with every option."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from against import assert_no_worse, assert_same, features, value_and_gradients
from launch import run, succeeded
from lightly.loss import DCLLoss, DCLWLoss, NTXentLoss
from torch import Tensor
from torch import distributed as dist

from contrastive_kernels.integrations import common
from contrastive_kernels.integrations import lightly as ours

lightly = sys.modules["lightly"]
THEIRS = {"NTXentLoss": NTXentLoss, "DCLLoss": DCLLoss, "DCLWLoss": DCLWLoss}
# (lightly makes a tensor of a tensor)
pytestmark = pytest.mark.filterwarnings("ignore:To copy construct from a tensor")


def learned_weight(x: Tensor, y: Tensor) -> Tensor:
    """A weight with a gradient."""
    return (x - y).square().sum(1)


OPTIONS = [
    ("NTXentLoss", {}),
    ("NTXentLoss", {"temperature": 0.05, "gather_distributed": True}),
    ("NTXentLoss", {"temperature": -0.5}),
    ("DCLLoss", {}),
    ("DCLLoss", {"temperature": 0.3, "weight_fn": learned_weight}),
    ("DCLWLoss", {}),
    ("DCLWLoss", {"temperature": 0.2, "sigma": 0.9}),
]


@pytest.mark.parametrize("n", [2, 3, 33])
@pytest.mark.parametrize("kind, options", OPTIONS, ids=str)
def test_two_views(kind, options, n):
    assert_same(getattr(ours, kind)(**options), THEIRS[kind](**options), features(n, unit=False))


def test_ntxent_of_one_sample():
    assert_same(ours.NTXentLoss(), NTXentLoss(), features(1, unit=False))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind, options", OPTIONS, ids=str)
def test_sixteen_bits_are_no_worse(kind, options, dtype):
    batches = [features(33, seed=k, unit=False) for k in range(8)]
    assert_no_worse(getattr(ours, kind)(**options), THEIRS[kind](**options), batches, dtype)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("n, size", [(8, 32), (8, 20), (3, 3)])
def test_memory_bank(n, size, frozen):
    """Several steps, with keys of a momentum encoder or not: the bank moves as lightly's."""
    losses = []
    for kind in (ours.NTXentLoss, NTXentLoss):
        torch.manual_seed(0)
        losses.append(kind(temperature=0.1, memory_bank_size=(size, 16)).double())
    for step in range(4):
        found = []
        for loss in losses:
            x, y = features(n, seed=step, unit=False)
            x.requires_grad_()
            y.requires_grad_(not frozen)
            value = loss(x, y)
            value.backward()
            found.append([value.detach(), x.grad, y.grad])
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
        assert torch.equal(losses[0].memory_bank.bank, losses[1].memory_bank.bank)


def test_memory_bank_stands_still_without_gradients():
    loss = ours.NTXentLoss(memory_bank_size=(20, 16)).double()
    before = loss.memory_bank.bank.clone()
    loss(*features(4))
    assert torch.equal(loss.memory_bank.bank, before)


def test_memory_bank_in_float32_under_autocast():
    x, y = features(8, dtype=torch.float32)
    values = []
    for kind in (ours.NTXentLoss, NTXentLoss):
        torch.manual_seed(0)
        loss = kind(memory_bank_size=(64, 16))
        exact = loss(x, y)
        with torch.autocast("cpu", torch.bfloat16):
            values.append(abs(loss(x, y).float() - exact).item())
    assert values[0] <= values[1] + 1e-3


# ---- several ranks ----


def by_rank(kind: str, options: dict[str, Any], n: int) -> list[list[Tensor]]:
    rank, size = dist.get_rank(), dist.get_world_size()
    tensors = [v[rank * n : (rank + 1) * n] for v in features(size * n, unit=False)]
    return [value_and_gradients(kind_(**options), tensors) for kind_ in (getattr(ours, kind), THEIRS[kind])]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("kind, options", [OPTIONS[k] for k in (0, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("gather", [True, False])
def test_over_ranks(kind, options, gather, ranks, tmp_path):
    over = {**options, "gather_distributed": gather}
    for found, wanted in succeeded(run(ranks, by_rank, tmp_path, kind, over, 4)):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def bank_by_rank() -> list[list[Tensor]]:
    found = []
    for kind in (ours.NTXentLoss, NTXentLoss):
        torch.manual_seed(0)
        loss = kind(memory_bank_size=(20, 16), gather_distributed=True).double()
        for step in range(3):
            tensors = features(8, seed=10 * step + dist.get_rank(), unit=False)
            last = value_and_gradients(loss, tensors)
        found.append([*last, loss.memory_bank.bank])
    return found


def test_memory_bank_over_ranks(tmp_path):
    for found, wanted in succeeded(run(2, bank_by_rank, tmp_path)):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_patched_and_install():
    with ours.patched():
        assert {name: getattr(lightly.loss, name) for name in THEIRS} == {n: getattr(ours, n) for n in THEIRS}
    assert {name: getattr(lightly.loss, name) for name in THEIRS} == THEIRS
    try:
        ours.install()
        assert lightly.loss.NTXentLoss is ours.NTXentLoss
    finally:
        common.replace("lightly", {v: k for k, v in ours._CLASSES.items()})
    assert lightly.loss.NTXentLoss is NTXentLoss
