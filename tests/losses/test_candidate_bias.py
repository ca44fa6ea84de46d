"""What is added to the candidates' logits: its gradient, and candidates of -inf, which are padding.

That every backend has it right, on every path, is in test_losses.py, test_cuda_pass.py and test_triton.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from derivatives import gradcheck, gradgradcheck
from made import few
from problems import BIASED, call

import contrastive_kernels as ck
from contrastive_kernels import reference
from contrastive_kernels.arguments.pairs import require_alone

BIAS = torch.tensor([0.3, -0.7, 1.1, 0.0, -2.0], dtype=torch.float64)


def by_hand(loss, x, y, scale, *rest):
    """The rows' losses [N] ([2N]), pair by pair."""
    n, bias = len(x), BIAS.tolist()
    first = list(range(n))
    if loss == "nt_xent":
        x = y = torch.cat([x, y])
        bias, first = bias * 2, [*range(n, 2 * n), *range(n)]
    added = float(rest[0]) if loss == "sigmoid" else 0.0
    z = [[float(scale * (a @ b)) + added for b in y] for a in x]

    def one_way(z):
        found = []
        for i, own in enumerate(first):
            h = [z[i][j] + bias[j] - z[i][own] - bias[own] for j in range(len(bias))]
            total = sum(math.exp(h[j]) for j in range(len(bias)) if j != own and (loss != "nt_xent" or j != i))
            if loss == "decomposable":
                log_u = -float(rest[0][i])
                found.append(math.exp(log_u) * (1 + total) - log_u - 1)
            else:
                found.append(math.log1p(total))
        return torch.tensor(found, dtype=torch.float64)

    if loss == "sigmoid":
        terms = [
            [math.log1p(math.exp((-1 if i == j else 1) * (z[i][j] + bias[j]))) for j in range(n)] for i in range(n)
        ]
        return torch.tensor([sum(row) for row in terms], dtype=torch.float64)
    if loss == "clip_loss":
        return (one_way(z) + one_way([list(column) for column in zip(*z)])) / 2
    return one_way(z)


@pytest.mark.parametrize("loss", BIASED)
def test_sums_by_hand(loss):
    """The reference, and the losses in float64."""
    leaves, rest = few(loss)
    want = by_hand(loss, *(leaf.detach() for leaf in leaves), *rest)
    for module in (reference, ck):
        rows = getattr(module, loss)(*leaves, *rest, candidate_bias=BIAS, reduction="none")
        torch.testing.assert_close(rows.detach(), want, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(want, call(loss, *leaves, *rest, reduction="none").detach()), "it plays a part"


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", BIASED)
def test_derivatives(loss, reduction):
    """Of everything at once, the bias among them, and of the bias alone."""
    leaves, rest = few(loss)
    weight = torch.tensor([0.5, 0.0, 2.0, 1.0, 1.5])
    bias = BIAS.clone().requires_grad_()

    def function(*leaves):
        *leaves, bias = leaves
        return call(loss, *leaves, *rest, candidate_bias=bias, weight=weight, reduction=reduction)

    for check in (gradcheck, gradgradcheck):
        assert check(function, (*leaves, bias))
        assert check(function, (*(leaf.detach() for leaf in leaves), bias))


def test_derivatives_of_given_positives():
    leaves, (log_z,) = few("decomposable", n=3, m=5)
    bias, logits = BIAS.clone().requires_grad_(), torch.randn(3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([-1, 4, 0])

    def loss(x, y, scale, bias, logits):
        options = {"positive_logits": logits, "positives": index}
        return ck.decomposable(x, y, scale, log_z, candidate_bias=bias, **options)

    for check in (gradcheck, gradgradcheck):
        assert check(loss, (*leaves, bias, logits))
        assert check(lambda *a: ck.info_nce(*a[:3], positives=index.abs(), candidate_bias=a[3]), (*leaves, bias))


@pytest.mark.parametrize("reduction, normalize", [("mean", False), ("none", False), ("mean", True)])
@pytest.mark.parametrize("loss", BIASED)
def test_padding_is_not_there(loss, reduction, normalize, backend):
    """Rows of NaN behind a bias of -inf: value and gradients are those of the batch without them."""
    n, m, dtype = 70, 90, torch.float32
    leaves, rest = few(loss, dtype, m, d=16)
    bias = torch.linspace(-1, 1, m).requires_grad_()
    weight = torch.linspace(0.5, 2, m)
    short = [v[:n].detach().clone().requires_grad_() for v in leaves[:2]]
    short_bias = bias.detach()[:n].clone().requires_grad_()
    options = {"reduction": reduction, "backend": backend, "normalize": normalize}
    want = call(
        loss, *short, *leaves[2:], *(v[:n] for v in rest), candidate_bias=short_bias, weight=weight[:n], **options
    )  # fmt: skip
    order = torch.randperm(m, generator=torch.Generator().manual_seed(0))
    x, y, padded = (
        torch.cat([v.detach()[:n], torch.full_like(v.detach()[n:], fill)])[order].requires_grad_()
        for v, fill in ((leaves[0], torch.nan), (leaves[1], torch.nan), (bias, -torch.inf))
    )
    ours = call(
        loss, x, y, *leaves[2:], *(v[order] for v in rest), candidate_bias=padded, weight=weight[order], **options
    )  # fmt: skip
    places = order.argsort()
    if reduction == "none":
        views = ours.view(-1, m)[:, places]
        assert (views[:, n:] == 0).all()
        ours = views[:, :n].reshape(-1)
    torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-6)
    upstream = torch.linspace(-1, 2, want.numel()).view(want.shape)
    found = torch.autograd.grad(ours, (x, y, *leaves[2:], padded), upstream)
    wanted = torch.autograd.grad(want, (*short, *leaves[2:], short_bias), upstream)
    for a, b in zip(found, wanted):
        if a.dim():
            a = a[places]
            assert (a[n:] == 0).all()
            a = a[:n]
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6 * (1 + b.abs().max().item()))


def test_nothing_but_padding(backend):
    for loss in BIASED:
        leaves, rest = few(loss, torch.float32, 6)
        value = call(loss, *leaves, *rest, candidate_bias=torch.full((6,), -torch.inf), backend=backend)
        assert value == 0
        for gradient in torch.autograd.grad(value, leaves):
            assert (gradient == 0).all()


def test_a_shift_of_all_candidates_changes_nothing(backend):
    for loss in ("info_nce", "clip_loss", "nt_xent"):
        leaves, _ = few(loss, torch.float32, 70, d=16)
        shift = torch.tensor(3.0, requires_grad=True)
        value = call(loss, *leaves, candidate_bias=shift.expand(70), backend=backend)
        torch.testing.assert_close(value, call(loss, *leaves, backend=backend))
        assert torch.autograd.grad(value, shift)[0].abs() < 1e-5


@pytest.mark.parametrize("module", [ck.InfoNCELoss, ck.ClipLoss, ck.NTXentLoss, ck.SigmoidLoss, ck.DecomposableLoss])
def test_modules_take_it(module):
    loss = {
        ck.InfoNCELoss: "info_nce", ck.ClipLoss: "clip_loss", ck.NTXentLoss: "nt_xent", ck.SigmoidLoss: "sigmoid",
        ck.DecomposableLoss: "decomposable",
    }[module]  # fmt: skip
    leaves, rest = few(loss)
    assert torch.equal(module()(*leaves, *rest, candidate_bias=BIAS), call(loss, *leaves, *rest, candidate_bias=BIAS))


def test_ranks_of_a_group_cannot_share_it_yet():
    require_alone(None, BIAS)
    require_alone(object(), None)
    with pytest.raises(NotImplementedError, match=r"candidate_bias: expected None in a process group; got Tensor"):
        require_alone(object(), BIAS)


def test_clip_takes_one_for_each_side():
    (x, y, scale), _ = few("clip_loss")
    found = ck.clip_loss(x, y, scale, candidate_bias=(BIAS, 2 * BIAS))
    want = (ck.info_nce(x, y, scale, candidate_bias=2 * BIAS) + ck.info_nce(y, x, scale, candidate_bias=BIAS)) / 2
    assert torch.equal(found, want)
    torch.testing.assert_close(found, reference.clip_loss(x, y, scale, candidate_bias=(BIAS, 2 * BIAS)))
