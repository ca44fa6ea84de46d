"""Denominators without the positive: DCL.

That every backend has them right, on every path, is in test_losses.py.
"""

from __future__ import annotations

import pytest
import torch
from derivatives import gradcheck, gradgradcheck
from problems import CPU_BACKENDS, SOFTMAX, call

import contrastive_kernels as ck
from contrastive_kernels import reference

MODULES = {"info_nce": ck.InfoNCELoss, "clip_loss": ck.ClipLoss, "nt_xent": ck.NTXentLoss}


def make(n=5, d=3, dtype=torch.float64):
    g = torch.Generator().manual_seed(6)
    x, y = (torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    return [v.requires_grad_() for v in (x, y, torch.tensor(1.7, dtype=dtype))]


@pytest.mark.parametrize("loss", SOFTMAX)
def test_sums_by_hand(loss):
    x, y, scale = (leaf.detach() for leaf in make())
    n, first = 5, torch.arange(5)
    if loss == "nt_xent":
        x = y = torch.cat([x, y])
        first = torch.cat([first + n, first])
    z = (scale * x @ y.T).tolist()
    ways = [(z, len(z)), ([list(column) for column in zip(*z)], len(z))][: 2 if loss == "clip_loss" else 1]
    want = []
    for i, own in enumerate(first.tolist()):
        each = []
        for table, count in ways:
            kept = [table[i][j] for j in range(count) if j != own and (loss != "nt_xent" or j != i)]
            each.append(torch.tensor(kept).double().exp().sum().log().item() - table[i][own])
        want.append(sum(each) / len(each))
    for module in (reference, ck):
        found = getattr(module, loss)(*make(), include_positive=False, reduction="none")
        torch.testing.assert_close(found.detach(), torch.tensor(want, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    assert min(want) < 0 or loss == "nt_xent", "it may be negative"


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", SOFTMAX)
def test_derivatives(loss, reduction):
    ids, bias = torch.tensor([0, 1, 0, 2, 3]), torch.randn(5, dtype=torch.float64, requires_grad=True)
    said = {"include_positive": False, "reduction": reduction, "weight": torch.tensor([1.0, 2.0, 0.0, 0.5, 1.0])}
    for check in (gradcheck, gradgradcheck):
        assert check(lambda *a: call(loss, *a, ids=ids, **said), make())
        assert check(lambda *a: call(loss, *a[:3], candidate_bias=a[3], **said), (*make(), bias))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("loss", SOFTMAX)
def test_a_row_without_negatives_has_none(loss, backend):
    leaves = make(dtype=torch.float32)
    value = call(loss, *leaves, ids=torch.zeros(5, dtype=torch.int64), include_positive=False, backend=backend)
    assert value == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(value, leaves))


@pytest.mark.parametrize("loss", SOFTMAX)
def test_modules(loss):
    leaves = make()
    found = MODULES[loss](include_positive=False)(*leaves)
    assert torch.equal(found, call(loss, *leaves, include_positive=False))
    with pytest.raises(TypeError, match="include_positive: expected a bool"):
        MODULES[loss](include_positive=0)


def test_one_graph():
    compiled = torch.compile(
        lambda x, y, s: ck.clip_loss(x, y, s, include_positive=False) + ck.nt_xent(x, y, s, include_positive=False),
        fullgraph=True, dynamic=True, backend="aot_eager",
    )  # fmt: skip
    for n in (12, 33):
        leaves = make(n, 8, torch.float32)
        value = sum(getattr(ck, loss)(*leaves, include_positive=False) for loss in ("clip_loss", "nt_xent"))
        torch.testing.assert_close(compiled(*leaves), value)
