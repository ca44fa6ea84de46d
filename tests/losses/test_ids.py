"""Ids of rows and columns: pairs of equal ones are no negatives, and the sigmoid loss's positives.

That every backend has them right, on every path, is in test_losses.py, test_panel_pass.py and test_triton.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from derivatives import gradcheck, gradgradcheck
from made import few as make
from problems import ALL, call

import contrastive_kernels as ck
from contrastive_kernels import reference

#: Of either dtype and sign; a row without another of its id, and ids that 32 bits would take for equal.
ROWS, COLS = torch.tensor([3, -1, 3, 2**32 + 3, 8]), torch.tensor([3, 3, -1, 2**32 + 3, 7])


def ids_of(loss):
    """Of the samples of NT-Xent, else of rows and of columns."""
    return ROWS if loss == "nt_xent" else (ROWS, COLS)


def by_hand(loss, x, y, scale, *rest):
    """The rows' losses [N] ([2N]), pair by pair."""
    rows, cols, first = ROWS.tolist(), COLS.tolist(), list(range(len(x)))
    if loss == "nt_xent":
        x = y = torch.cat([x, y])
        rows = cols = rows * 2
        first = [*range(5, 10), *range(5)]
    bias = rest[0] if loss == "sigmoid" else 0.0
    z = [[float(scale * (x[i] @ y[j]) + bias) for j in range(len(y))] for i in range(len(x))]

    def one_way(z, rows, cols, normalizer=None):
        found = []
        for i, own in enumerate(first):
            left = [
                z[i][j] for j in range(len(cols)) if j != own and cols[j] != rows[i] and (loss != "nt_xent" or j != i)
            ]
            if normalizer is None:
                found.append(math.log1p(sum(math.exp(v - z[i][own]) for v in left)))
            else:
                log_u = -float(normalizer[i])
                found.append(math.exp(log_u) * (1 + sum(math.exp(v - z[i][own]) for v in left)) - log_u - 1)
        return torch.tensor(found, dtype=torch.float64)

    turned = [list(column) for column in zip(*z)]
    if loss == "sigmoid":
        signs = [[-1 if rows[i] == cols[j] else 1 for j in range(len(cols))] for i in range(len(rows))]
        sums = [sum(math.log1p(math.exp(s * v)) for s, v in zip(*pair)) for pair in zip(signs, z)]
        return torch.tensor(sums, dtype=torch.float64)
    if loss in ("info_nce", "nt_xent"):
        return one_way(z, rows, cols)
    if loss == "decomposable":
        return one_way(z, rows, cols, rest[0])
    normalizers = rest[0] if loss == "decomposable_pair" else (None, None)
    return (one_way(z, rows, cols, normalizers[0]) + one_way(turned, cols, rows, normalizers[1])) / 2


@pytest.mark.parametrize("loss", ALL)
def test_sums_by_hand(loss):
    """The reference, and the losses in float64."""
    leaves, rest = make(loss)
    want = by_hand(loss, *(leaf.detach() for leaf in leaves), *rest)
    for module in (reference, ck):
        function = getattr(module, loss.removesuffix("_pair"))
        rows = function(*leaves, *rest, ids=ids_of(loss), reduction="none")
        torch.testing.assert_close(rows.detach(), want, rtol=1e-12, atol=1e-12)
        mean = function(*leaves, *rest, ids=ids_of(loss))
        torch.testing.assert_close(mean.detach(), want.mean(), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(want, call(loss, *leaves, *rest, reduction="none").detach()), "ids play a part"


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", ALL)
def test_derivatives(loss, reduction):
    leaves, rest = make(loss)
    weight = torch.tensor([0.5, 0.0, 2.0, 1.0, 1.5])

    def function(*leaves):
        return call(loss, *leaves, *rest, ids=ids_of(loss), weight=weight, reduction=reduction)

    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


def test_derivatives_of_rectangles():
    ids = ROWS[:3], COLS
    leaves, rest = make("decomposable", n=3, m=5)
    x, y, scale = leaves
    logits = torch.randn(3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([4, 0, 4])

    def block(x, y, scale, logits):
        return ck.decomposable(x, y, scale, *rest, ids=ids, positive_logits=logits, positives=index - 1)

    for check in (gradcheck, gradgradcheck):
        assert check(lambda *a: ck.info_nce(*a, ids=ids, positives=index), leaves)
        assert check(lambda *a: ck.sigmoid(*a, -0.3, ids=ids, reduction="none"), leaves)
        assert check(block, (x, y, scale, logits))


@pytest.mark.parametrize("loss", ALL)
def test_only_equality_counts(loss, backend):
    """Other names for the same groups, in another dtype, give the same bits; so does one tensor for both sides."""
    leaves, rest = make(loss, torch.float32, 70, d=16)
    labels = torch.arange(70) % 9
    names = torch.tensor([-(2**40), 5, 2**62, 0, -1, 7, 8, 9, 2**32 + 5])[labels]
    found = []
    for ids in (
        labels,
        labels.int() - 300,
        labels.to(torch.uint8),
        labels.to(torch.uint32),
        names,
        (labels, labels),
        names[:, None].expand(70, 2)[:, 0],
    ):
        ids = ids[0] if loss == "nt_xent" and isinstance(ids, tuple) else ids
        value = call(loss, *leaves, *rest, ids=ids, backend=backend)
        found.append((value, *torch.autograd.grad(value, leaves)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_ids_that_all_differ_change_nothing(backend):
    """Nor do those that are equal where a pair matches anyway."""
    for loss in ALL:
        leaves, rest = make(loss, torch.float32, 70, d=16)
        plain = call(loss, *leaves, *rest, backend=backend)
        torch.testing.assert_close(call(loss, *leaves, *rest, ids=torch.arange(70), backend=backend), plain)
        if loss != "sigmoid":  # without a positive then
            away = torch.arange(70) if loss == "nt_xent" else (torch.arange(70), torch.arange(70, 140))
            torch.testing.assert_close(call(loss, *leaves, *rest, ids=away, backend=backend), plain)


@pytest.mark.parametrize("loss", ["info_nce", "clip_loss", "nt_xent"])
def test_rows_of_one_id_have_nothing_to_learn(loss, backend):
    leaves, _ = make(loss, torch.float32, 40, d=16)
    value = call(loss, *leaves, ids=torch.full((40,), 3), reduction="none", backend=backend)
    assert torch.equal(value, torch.zeros_like(value))
    for gradient in torch.autograd.grad(value.sum(), leaves):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_the_searches_exclude_the_same_pairs(backend):
    """As the scale grows the loss is the hardest negative's, which the search finds under the same ids."""
    x, y = (torch.nn.functional.normalize(torch.randn(60, 16), dim=1) for _ in range(2))
    ids = torch.randint(-3, 3, (60,)), torch.randint(-3, 3, (60,))
    hardest = ck.hardest_negatives(x, y, exclude=ids, backend=backend)
    losses = ck.info_nce(x, y, 1e4, ids=ids, reduction="none", backend=backend)
    gap = (x * y[hardest]).sum(1) - (x * y).sum(1)
    torch.testing.assert_close(losses / 1e4, gap.clamp(min=0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("module", [ck.InfoNCELoss, ck.ClipLoss, ck.NTXentLoss, ck.SigmoidLoss, ck.DecomposableLoss])
def test_modules_take_them(module):
    loss = {
        ck.InfoNCELoss: "info_nce", ck.ClipLoss: "clip_loss", ck.NTXentLoss: "nt_xent", ck.SigmoidLoss: "sigmoid",
        ck.DecomposableLoss: "decomposable",
    }[module]  # fmt: skip
    leaves, rest = make(loss)
    ids = ids_of(loss)
    assert torch.equal(module()(*leaves, *rest, ids=ids), call(loss, *leaves, *rest, ids=ids))


@pytest.mark.parametrize("loss", ALL)
def test_torch_func_and_vmap(loss):
    (x, *others), rest = make(loss)
    others = [leaf.detach() for leaf in others]

    def scalar(x):
        return call(loss, x, *others, *rest, ids=ids_of(loss))

    x = x.detach()
    jacobian = torch.autograd.functional.jacobian
    torch.testing.assert_close(torch.func.grad(scalar)(x), jacobian(scalar, x))
    torch.testing.assert_close(
        torch.func.jacrev(torch.func.grad(scalar))(x), torch.autograd.functional.hessian(scalar, x)
    )
    batch = torch.stack([x, 2 * x])
    want = torch.stack([jacobian(scalar, v) for v in batch])
    torch.testing.assert_close(torch.vmap(torch.func.grad(scalar))(batch), want)
