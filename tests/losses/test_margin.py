"""Candidates above the positive by more than a margin are left out: by hand, at ties, and with no gradient of its own.

That every backend has it right, on every path, is in test_losses.py, test_panel_pass.py, test_cuda_pass.py and
test_triton.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from derivatives import gradcheck, gradgradcheck
from made import few
from problems import RATIOS, call

import contrastive_kernels as ck
from contrastive_kernels import reference
from contrastive_kernels.arguments.pairs import pairs_of
from contrastive_kernels.engine.matrix import Problem
from contrastive_kernels.operators.logsumexp import normalizers
from contrastive_kernels.operators.parts import bounded_ceilings

MARGINS = (0.3, -0.4, ("relative", 0.4), ("relative", -0.5))


def by_hand(loss, x, y, scale, *rest, margin):
    """The rows' losses [N] ([2N]), pair by pair, and how many pairs are left out."""
    n, left_out = len(x), 0
    first = list(range(n))
    if loss == "nt_xent":
        x = y = torch.cat([x, y])
        first = [*range(n, 2 * n), *range(n)]
    z = [[float(scale * (a @ b)) for b in y] for a in x]

    def one_way(z, normalizer=None):
        nonlocal left_out
        found = []
        for i, own in enumerate(first):
            bound = z[i][own] * (1 + margin[1]) if isinstance(margin, tuple) else z[i][own] + margin
            others = [j for j in range(len(z[i])) if j != own and (loss != "nt_xent" or j != i)]
            total = sum(math.exp(z[i][j] - z[i][own]) for j in others if z[i][j] <= bound)
            left_out += sum(z[i][j] > bound for j in others)
            if normalizer is None:
                found.append(math.log1p(total))
            else:
                log_u = -float(normalizer[i])
                found.append(math.exp(log_u) * (1 + total) - log_u - 1)
        return torch.tensor(found, dtype=torch.float64)

    turned = [list(column) for column in zip(*z)]
    if loss in ("info_nce", "nt_xent"):
        return one_way(z), left_out
    if loss == "decomposable":
        return one_way(z, rest[0]), left_out
    pair = rest[0] if rest else (None, None)
    return (one_way(z, pair[0]) + one_way(turned, pair[1])) / 2, left_out


@pytest.mark.parametrize("margin", MARGINS, ids=str)
@pytest.mark.parametrize("loss", RATIOS)
def test_sums_by_hand(loss, margin):
    """The reference, and the losses in float64."""
    leaves, rest = few(loss)
    want, left_out = by_hand(loss, *(leaf.detach() for leaf in leaves), *rest, margin=margin)
    assert left_out > 3
    for module in (reference, ck):
        function = getattr(module, loss.removesuffix("_pair"))
        rows = function(*leaves, *rest, margin=margin, reduction="none")
        torch.testing.assert_close(rows.detach(), want, rtol=1e-12, atol=1e-12)
    mean = call(loss, *leaves, *rest, margin=margin)
    torch.testing.assert_close(mean.detach(), want.mean(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", RATIOS)
def test_derivatives(loss, reduction):
    """First and second ones, by differences that never cross the margin."""
    leaves, rest = few(loss)
    weight = torch.tensor([0.5, 0.0, 2.0, 1.0, 1.5])
    options = {"margin": -0.4, "weight": weight, "reduction": reduction, "ids": torch.tensor([3, 1, 3, 4, 5])}
    if not loss.startswith("decomposable"):
        options["include_positive"] = False

    def function(*leaves):
        return call(loss, *leaves, *rest, **options)

    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


def test_derivatives_beside_others():
    """With biases, and with positives that are given."""
    leaves, (log_z,) = few("decomposable", n=3, m=5)
    bias = torch.tensor([0.3, -0.7, 1.1, 0.0, -2.0], dtype=torch.float64, requires_grad=True)
    logits = torch.tensor([0.1, 0.4, -0.2], dtype=torch.float64, requires_grad=True)
    index = torch.tensor([4, 0, 4])

    def block(x, y, scale, bias, logits):
        return ck.decomposable(x, y, scale, log_z, candidate_bias=bias, positive_logits=logits, margin=0.1)

    for check in (gradcheck, gradgradcheck):
        assert check(lambda *a: ck.info_nce(*a[:3], positives=index, candidate_bias=a[3], margin=-0.2), (*leaves, bias))
        assert check(block, (*leaves, bias, logits))
    square = few("clip_loss")[0]
    both = [
        (lambda *a, loss=loss: loss(*a[:3], candidate_bias=a[3], margin=-0.4)) for loss in (ck.clip_loss, ck.nt_xent)
    ]
    assert all(gradcheck(loss, (*square, bias)) for loss in both)


@pytest.mark.parametrize("loss", RATIOS)
def test_wide_margins_change_nothing(loss, backend):
    leaves, rest = few(loss, torch.float32, 70, d=16)
    for margin in (1e30, ("relative", 1e30)):
        if isinstance(margin, tuple):  # positives above 0
            leaves[1] = leaves[0].detach().clone().requires_grad_()
        plain = call(loss, *leaves, *rest, backend=backend)
        torch.testing.assert_close(call(loss, *leaves, *rest, margin=margin, backend=backend), plain)


@pytest.mark.parametrize("include_positive", [True, False])
@pytest.mark.parametrize("loss", ["info_nce", "clip_loss", "nt_xent"])
def test_nothing_is_left(loss, include_positive, backend):
    """Losses and gradients of 0, by one call, in bands and in panels."""
    for n in (40, 600):
        leaves, _ = few(loss, torch.float32, n, d=16)
        for reduction in ("mean", "none"):
            options = {"include_positive": include_positive, "reduction": reduction, "backend": backend}
            value = call(loss, *leaves, margin=-1e30, **options)
            assert torch.equal(value, torch.zeros_like(value))
            for gradient in torch.autograd.grad(value.sum(), leaves):
                assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("include_positive", [True, False])
@pytest.mark.parametrize("loss", ["info_nce", "clip_loss", "nt_xent"])
def test_ties(loss, include_positive, dtype, backend):
    """Copies of every positive, at a margin of 0: each counts or does not, and nothing worse happens."""
    for n, scale, reduction in ((64, 20.0, "none"), (64, 300.0, "mean"), (1040, 20.0, "none"), (1040, 20.0, "mean")):
        g = torch.Generator().manual_seed(n)
        x, y = (torch.nn.functional.normalize(torch.randn(n // 4, 40, generator=g), dim=1) for _ in range(2))
        y = torch.nn.functional.normalize(x + 0.3 * y, dim=1)
        x, y = (v.repeat(4, 1).to(dtype).requires_grad_() for v in (x, y))
        options = {"margin": 0.0, "include_positive": include_positive, "reduction": reduction, "backend": backend}
        value = call(loss, x, y, scale, **options)
        if include_positive:  # three copies and what lies below
            assert ((value >= 0) & (value < math.log(4) + 1)).all()
        assert value.isfinite().all()
        # the weights of a row (and of a column) are at most 1, or 2 with the positive's
        dx, dy = torch.autograd.grad(value.sum(), (x, y))
        most = 2.02 * scale * 2 * 4 / (1 if reduction == "none" else n)
        assert dx.isfinite().all() and dy.isfinite().all() and (dx.float().norm(dim=1) <= most).all()


def test_copies_are_told_by_ids():
    """As the documentation says: with ids, a margin of 0 is that of the batch without copies' losses."""
    g = torch.Generator().manual_seed(3)
    x, y = (torch.randn(20, 8, generator=g, dtype=torch.float64) for _ in range(2))
    ids = torch.arange(20).repeat(2)
    twice = ck.info_nce(x.repeat(2, 1), y.repeat(2, 1), 1.0, ids=ids, margin=0.0, include_positive=False)
    once = ck.info_nce(x, y, 1.0, margin=0.0, include_positive=False, reduction="none")
    counts = once != 0
    want = (once + math.log(2))[counts].sum() / 20  # every negative is there twice
    torch.testing.assert_close(twice, want)


def test_a_pass_that_rounds_otherwise_gives_bounded_weights():
    """Without the positive a pair that was left out of the sums might weigh e^100 where it counts after all."""
    x, y = torch.eye(2), torch.tensor([[1.0, 0.0], [0.99, -2.0]])
    pairs = pairs_of(None, None, x, y)._replace(row_ceiling=torch.tensor([98.0, 98.0]))
    problem = Problem(x, y, 100.0, offset=0, pairs=pairs)
    row, _ = normalizers(problem)
    assert row.sum(0)[0] == -torch.inf  # 99 lies above the ceiling
    found = bounded_ceilings(problem, row, None).pairs.row_ceiling
    assert found[0] == -torch.inf and found[1] < 2.0
    plain = Problem(x, y, 100.0, offset=0)
    assert bounded_ceilings(plain, row, None) is plain


@pytest.mark.parametrize("module", [ck.InfoNCELoss, ck.ClipLoss, ck.NTXentLoss, ck.DecomposableLoss])
def test_modules_take_it(module):
    names = {ck.InfoNCELoss: "info_nce", ck.ClipLoss: "clip_loss", ck.NTXentLoss: "nt_xent"}
    loss = names.get(module, "decomposable")
    leaves, rest = few(loss)
    made = module(margin=("relative", -0.5))
    assert torch.equal(made(*leaves, *rest), call(loss, *leaves, *rest, margin=("relative", -0.5)))
    assert "margin=('relative', -0.5)" in repr(made)
    with pytest.raises(ValueError, match="margin: expected a number or"):
        module(margin=("absolute", 0.5))


def test_what_does_not_go_together():
    (x, y, scale), _ = few("info_nce")
    several = torch.tensor([[0, 1]] * 5)
    refused = {
        "label_smoothing": {"label_smoothing": 0.1},
        "debiased": {"debiased": 0.1},
        "hardness_beta": {"hardness_beta": 1.0},
        "weight_fn": {"weight_fn": ck.von_mises_fisher_weights, "include_positive": False},
        r"positives of shape \[N, P\]": {"positives": several},
    }
    for name, options in refused.items():
        with pytest.raises(ValueError, match=f"margin: expected None with {name}; got 0.5"):
            ck.info_nce(x, y, scale, margin=0.5, **options)
    with pytest.raises(ValueError, match="margin: expected None with weight_fn"):
        ck.nt_xent(x, y, scale, margin=0.5, weight_fn=ck.von_mises_fisher_weights, include_positive=False)
    with pytest.raises(ValueError, match="margin: expected None with label_smoothing"):
        ck.ClipLoss(margin=0.5, label_smoothing=0.1)


@pytest.mark.parametrize("loss", RATIOS)
def test_torch_func_and_compile(loss):
    (x, *others), rest = few(loss)
    others = [leaf.detach() for leaf in others]

    def scalar(x):
        return call(loss, x, *others, *rest, margin=-0.4)

    x = x.detach()
    jacobian = torch.autograd.functional.jacobian
    torch.testing.assert_close(torch.func.grad(scalar)(x), jacobian(scalar, x))
    batch = torch.stack([x, 2 * x])
    want = torch.stack([jacobian(scalar, v) for v in batch])
    torch.testing.assert_close(torch.vmap(torch.func.grad(scalar))(batch), want)
    compiled = torch.compile(scalar, fullgraph=True, backend="aot_eager", dynamic=True)
    leaf = x.clone().requires_grad_()
    compiled(leaf).backward()
    torch.testing.assert_close(leaf.grad, jacobian(scalar, x))
