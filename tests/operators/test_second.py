"""Gradients that are differentiated again, and gradients under torch.func, torch.vmap and torch.export."""

from __future__ import annotations

import pytest
import torch
from derivatives import gradgradcheck
from problems import ALL, call
from within import WAYS, Named, around, through

import contrastive_kernels as ck
from contrastive_kernels.operators import second

REDUCTIONS = ("mean", "none")


def make(loss, n=4, d=3, seed=0, dtype=torch.float64):
    """x, y, scale (and bias): leaves; and the normaliser of a decomposable loss."""
    g = torch.Generator().manual_seed(seed)
    leaves = [torch.randn(n, d, generator=g, dtype=torch.float64).mul(0.5).to(dtype) for _ in range(2)]
    leaves += [torch.tensor(v, dtype=dtype) for v in ((1.3, -0.5) if loss == "sigmoid" else (1.3,))]
    rows, cols = (6 + torch.randn(n, generator=g) for _ in range(2))
    rest = {"decomposable": (rows,), "decomposable_pair": ((rows, cols),)}.get(loss, ())
    return [leaf.requires_grad_() for leaf in leaves], rest


@pytest.fixture(params=[24, 2**40], ids=["one block", "a row a block"])
def blocks(request, monkeypatch):
    """How many rows are differentiated at a time."""
    monkeypatch.setattr(second, "_TEMPORARIES", request.param)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", ALL)
def test_gradgradcheck(loss, reduction, blocks):
    leaves, rest = make(loss)
    weight = torch.tensor([0.5, 0.0, 2.0, 1.0])
    assert gradgradcheck(lambda *a: call(loss, *a, *rest, weight=weight, reduction=reduction), leaves)


@pytest.mark.parametrize("positives", [2, torch.tensor([5, 0, 5, 3])], ids=["offset", "index"])
@pytest.mark.parametrize("loss", ["info_nce", "decomposable"])
def test_gradgradcheck_of_a_rectangle(loss, positives, blocks):
    (x, _, scale), rest = make(loss)
    y = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).mul(0.5).requires_grad_()
    for reduction in REDUCTIONS:
        assert gradgradcheck(
            lambda *a, r=reduction: call(loss, *a, *rest, positives=positives, reduction=r), (x, y, scale)
        )


def test_gradgradcheck_of_given_positive_logits(blocks):
    (x, y, scale), (normalizers,) = make("decomposable_pair")
    logits = [torch.randn(4, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(2)]

    def loss(x, y, scale, *logits):
        return ck.decomposable(x, y, scale, normalizers, positive_logits=logits)

    assert gradgradcheck(loss, (x, y, scale, *[v.requires_grad_() for v in logits]))


@pytest.mark.parametrize("loss", ALL)
def test_a_frozen_tower_has_second_derivatives(loss):
    leaves, rest = make(loss)
    leaves[1].requires_grad_(False)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    value = call(loss, *leaves, *rest)
    (dx,) = torch.autograd.grad(value, leaves[:1], create_graph=True)
    found = torch.autograd.grad(dx.square().sum(), wanted)
    # against differences of the gradient along dx
    step, moved = 1e-5, []
    for sign in (1, -1):
        x = (leaves[0] + sign * step * dx).detach().requires_grad_()
        moved.append(torch.autograd.grad(call(loss, x, *leaves[1:], *rest), x)[0])
    torch.testing.assert_close(found[0], 2 * (moved[0] - moved[1]) / (2 * step), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("way", [way for way in WAYS if way != "vmap"])
def test_second_derivatives_in_every_way(loss, way):
    """Where the operators of torch.library stand for the engine, too: none may be lost in silence."""

    def found(way):
        (x, y, *others), rest = make(loss)
        with around(way):
            value = through(way, lambda *a: call(loss, *a, reduction="none"))(x, y, *others, *rest)
            upstream = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).view(value.shape)
            gradients = torch.autograd.grad(value, (x, y, *others), upstream, create_graph=True)
            return torch.autograd.grad(sum(g.square().sum() for g in gradients), (x, y, *others))

    for a, b in zip(found(way), found(None)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("loss", ALL)
def test_operators_unpack_once_what_a_checkpoint_keeps(loss):
    """Under a mode the operators run, with a checkpoint's hooks about their saved tensors."""
    leaves, rest = make(loss)
    want = torch.autograd.grad(call(loss, *leaves, *rest), leaves)
    with around("mode"):
        value = through("checkpoint", lambda *a: call(loss, *a))(*leaves, *rest)
        for a, b in zip(torch.autograd.grad(value, leaves), want):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("loss", ALL)
def test_a_subclass_that_changes_nothing_has_torch_func(loss):
    (x, *others), rest = make(loss)
    others = [leaf.detach() for leaf in others]
    scalar = torch.func.grad(lambda x: call(loss, x, *others, *rest))
    named = torch.func.grad(lambda x: call(loss, x.as_subclass(Named), *others, *rest))
    torch.testing.assert_close(named(x.detach()), scalar(x.detach()))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", ALL)
def test_first_derivatives_are_the_same_with_a_graph(loss, reduction):
    leaves, rest = make(loss, 70, 16, dtype=torch.float32)
    value = call(loss, *leaves, *rest, reduction=reduction)
    upstream = torch.linspace(-1, 2, value.numel()).view(value.shape)
    want = torch.autograd.grad(value, leaves, upstream, retain_graph=True)
    for a, b in zip(torch.autograd.grad(value, leaves, upstream, create_graph=True), want):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("loss", ALL)
def test_a_hessian_vector_product_in_fewer_digits(loss, dtype):
    leaves, rest = make(loss, 70, 16, dtype=dtype)
    leaves[2:] = [leaf.detach().float().requires_grad_() for leaf in leaves[2:]]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    found = []
    for each in (leaves, exact):
        (dx,) = torch.autograd.grad(call(loss, *each, *rest), each[:1], create_graph=True)
        v = torch.ones_like(dx)
        found.append(torch.autograd.grad((dx * v).sum(), each))
    for a, b in zip(*found):
        tolerance = 3e-4 if dtype == torch.float32 else 3e-2
        assert (a.double() - b).norm() <= tolerance * b.norm() + 1e-7


@pytest.mark.parametrize("loss", ALL)
def test_third_derivatives_are_refused_where_they_are_asked_for(loss):
    leaves, rest = make(loss)
    (dx,) = torch.autograd.grad(call(loss, *leaves, *rest), leaves[:1], create_graph=True)
    (ddx,) = torch.autograd.grad(dx.sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="third derivatives"):
        torch.autograd.grad(ddx.sum(), leaves[:1])


@pytest.mark.parametrize("loss", ALL)
def test_torch_func(loss):
    """grad, jacrev, jacrev of jacrev, vmap and vmap of grad: what plain autograd gives."""
    (x, *others), rest = make(loss)
    others = [leaf.detach() for leaf in others]

    def scalar(x):
        return call(loss, x, *others, *rest)

    def rows(x):
        return call(loss, x, *others, *rest, reduction="none")

    plain = torch.autograd.functional
    x = x.detach()
    torch.testing.assert_close(torch.func.grad(scalar)(x), plain.jacobian(scalar, x))
    torch.testing.assert_close(torch.func.jacrev(rows)(x), plain.jacobian(rows, x))
    torch.testing.assert_close(torch.func.jacrev(torch.func.jacrev(scalar))(x), plain.hessian(scalar, x))
    batch = torch.stack([x, 2 * x, -x])
    torch.testing.assert_close(torch.vmap(scalar)(batch), torch.stack([scalar(v) for v in batch]))
    want = torch.stack([plain.jacobian(scalar, v) for v in batch])
    torch.testing.assert_close(torch.vmap(torch.func.grad(scalar))(batch), want)


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("loss", ALL)
def test_vmap_within_autograd_keeps_the_gradients(loss, needs):
    """Inside, a batch's tensors do not tell that they require gradients; those of no batch do."""
    (x, y, *others), rest = make(loss)
    batches = [torch.stack([v, 2 * v, -v]).detach().requires_grad_(need) for v, need in zip((x, y), needs)]

    def rows(x, y):
        return call(loss, x, y, *others, *rest, reduction="none")

    leaves = [*(v for v in batches if v.requires_grad), *others]
    want = torch.stack([rows(*pair) for pair in zip(*batches)])
    found = torch.vmap(rows)(*batches)
    upstream = torch.linspace(-1, 2, want.numel(), dtype=want.dtype).view(want.shape)
    for a, b in zip(torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(want, leaves, upstream)):
        torch.testing.assert_close(a, b)
    samples = torch.vmap(torch.func.grad(lambda x, y: rows(x, y).sum()))(*batches)
    one_by_one = torch.stack([torch.func.grad(lambda x, y=y: rows(x, y).sum())(x) for x, y in zip(*batches)])
    for a, b in zip(*(torch.autograd.grad(v.square().sum(), leaves) for v in (samples, one_by_one))):
        torch.testing.assert_close(a, b)


def test_functional_call():
    tower = torch.nn.Linear(3, 3, dtype=torch.float64)
    (x, y, scale), _ = make("clip_loss")

    def loss(parameters):
        return ck.clip_loss(torch.func.functional_call(tower, parameters, (x,)), y, scale)

    parameters = dict(tower.named_parameters())
    found = torch.func.grad(loss)(parameters)
    want = torch.autograd.grad(loss(parameters), list(parameters.values()))
    for a, b in zip(found.values(), want):
        torch.testing.assert_close(a, b)


class Model(torch.nn.Module):
    """Two terms, of which an export must not lose one."""

    def __init__(self):
        super().__init__()
        self.tower = torch.nn.Linear(8, 8)

    def forward(self, x, y):
        features = self.tower(x)
        return (features - y).square().mean() + ck.clip_loss(features, y, 4.0)


def test_an_exported_model_keeps_the_losss_gradient():
    torch.manual_seed(0)
    model, x, y = Model(), torch.randn(6, 8), torch.randn(6, 8)
    want = torch.autograd.grad(model(x, y), list(model.parameters()))
    exported = torch.export.export(model, (x, y)).module()
    found = torch.autograd.grad(exported(x, y), [p for p in exported.parameters() if p.requires_grad])
    for a, b in zip(found, want):
        torch.testing.assert_close(a, b)
