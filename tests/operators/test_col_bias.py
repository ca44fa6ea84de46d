"""A bias of columns, which goes into their logits: the example of a vector that every primitive and backend takes."""

from __future__ import annotations

import pytest
import torch
from problems import CPU_BACKENDS

import contrastive_kernels as ck
from contrastive_kernels.arguments.options import Engine
from contrastive_kernels.engine.matrix import Problem
from contrastive_kernels.operators.logsumexp import logsumexp
from contrastive_kernels.operators.sigmoid_loss import sigmoid_loss
from contrastive_kernels.operators.softmax_loss import softmax_loss
from contrastive_kernels.operators.weighted_sum import exponential_sums
from contrastive_kernels.panels.pairs import Pairs

#: One call of the backend, a band, and small panels.
WORKSPACES = {"one call": 2**26, "band": 16 * 130 * 150 - 1, "panels": 300_000}


def parts(dtype, n=130, m=150, d=16):
    """x, y, scale: leaves; a bias that leaves two columns out, none of them a positive."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.nn.functional.normalize(torch.randn(k, d, generator=g, dtype=torch.float64), dim=1) for k in (n, m))
    bias = torch.randn(m, generator=g, dtype=torch.float64)
    bias[[140, 149]] = -torch.inf
    scale = torch.tensor(7.0, dtype=dtype)
    return [v.to(dtype).requires_grad_() for v in (x, y)] + [scale.requires_grad_()], bias.to(dtype)


def dense(loss, x, y, scale, bias, rest):
    """The same with all logits, the positive's bias included."""
    z = scale * (x @ y.T) + bias
    z_pos, own = z.diagonal(), torch.eye(*z.shape, dtype=torch.bool)
    negatives = z.masked_fill(own, -torch.inf)
    if loss == "softmax":
        return torch.nn.functional.softplus(negatives.logsumexp(1) - z_pos).mean()
    if loss == "sigmoid":
        return (torch.nn.functional.softplus(negatives).sum(1) + torch.nn.functional.softplus(-z_pos)).mean()
    if loss == "weighted":
        return (torch.exp(negatives - z_pos[:, None] - rest[:, None]).sum(1) + rest).mean()  # less log u
    return negatives.logsumexp(1).mean()


def streamed(loss, problem, rest):
    if loss == "softmax":
        return softmax_loss(problem, None, "mean")
    if loss == "sigmoid":
        return sigmoid_loss(problem, None, "mean")
    if loss == "weighted":
        return exponential_sums(problem, [rest], None, None, "mean", (0.0, 0.0, 0.0)).values
    return logsumexp(problem).mean()


@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("loss", ["softmax", "sigmoid", "weighted", "logsumexp"])
def test_value_and_gradients(loss, backend, workspace):
    if ck.why_not(backend, torch.zeros(1, 1)) is not None:
        pytest.skip(f"{backend} is not installed")
    engine = Engine(backend, WORKSPACES[workspace] * (4 if backend == "torch" and workspace == "panels" else 1))
    (x, y, scale), bias = parts(torch.float32)
    rest = torch.linspace(3.0, 4.0, len(x))
    value = streamed(loss, Problem(x, y, scale, offset=0, pairs=Pairs(col_bias=bias), engine=engine), rest)
    exact = [leaf.detach().double().requires_grad_() for leaf in (x, y, scale)]
    want = dense(loss, *exact, bias.double(), rest.double())
    torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=1e-6)
    for a, b in zip(torch.autograd.grad(value, (x, y, scale)), torch.autograd.grad(want, exact)):
        assert (a.double() - b).abs().max() <= 1e-5 * b.abs().max() + 1e-9
