"""A large batch in micro-batches that are encoded once: what is exact, and what is right in the mean."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import nn

import contrastive_kernels as ck

F64 = torch.float64


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def micro_batches(n, d=4, seed=0):
    """A linear two-tower model, its data, and a loss whose memory is neither right nor constant."""
    g = torch.Generator().manual_seed(seed)
    weights = [torch.randn(d, 3, generator=g, dtype=F64).requires_grad_() for _ in range(2)]
    log_scale = torch.tensor(1.0, dtype=F64, requires_grad=True)
    data = torch.randn(2, n, d, generator=g, dtype=F64)
    loss = ck.DatasetContrastiveLoss(20, shape=1.5)
    loss.memory.update(torch.arange(20), torch.randn(20, 2, generator=g))

    def encode(rows):
        return [nn.functional.normalize(data[k, rows] @ weights[k], dim=1) for k in (0, 1)]

    return (*weights, log_scale), encode, loss


def test_micro_batches_in_all_orders_are_the_large_batch():
    leaves, encode, loss = micro_batches(7)
    everything, parts = torch.arange(7), [torch.tensor(p) for p in ([0, 3], [1, 4, 6], [2, 5])]
    state = {k: v.clone() for k, v in loss.state_dict().items()}
    # one draw of u for all: by sample, whatever the order
    draws = torch.randn(20, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    real = loss.e_step
    loss.e_step = lambda index, **kw: dataclasses.replace(real(index, **kw), log_weight=draws[index])
    expectation = loss.e_step(everything)
    want, found = loss.m_step(*encode(everything), leaves[2].exp(), expectation)
    want_gradients = torch.autograd.grad(want, leaves)
    loss.update(expectation, found)
    want_memory = loss.memory.log_mean.clone()
    sums = [torch.zeros_like(g) for g in want_gradients]
    orders = list(itertools.permutations(parts))
    for order in orders:
        loss.load_state_dict(state)
        for leaf in leaves:
            leaf.grad = None
        value = loss.accumulate(encode, order, order, leaves[2].exp())
        close(value, want.detach())
        close(leaves[2].grad, want_gradients[2])
        torch.testing.assert_close(loss.memory.log_mean, want_memory)
        assert (leaves[0].grad - want_gradients[0]).norm() > 1e-3, "one order alone is not exact"
        for total, leaf in zip(sums, leaves):
            total += leaf.grad / len(orders)
    for total, gradient in zip(sums, want_gradients):
        close(total, gradient)


def test_micro_batches_by_themselves():
    """across=False: a micro-batch's own negatives alone, scaled to stand for all: the mean over partitions is right."""
    leaves, encode, loss = micro_batches(4)
    loss.shape = None
    loss.eval()
    state = {k: v.clone() for k, v in loss.state_dict().items()}
    partitions = [([0, 1], [2, 3]), ([0, 2], [1, 3]), ([0, 3], [1, 2])]
    sums = [torch.zeros_like(leaf) for leaf in leaves]
    everything = torch.arange(4)
    whole = loss.m_step(*encode(everything), leaves[2].exp(), loss.e_step(everything))[0]
    want = torch.autograd.grad(whole, leaves)
    for partition in partitions:
        loss.load_state_dict(state)
        for leaf in leaves:
            leaf.grad = None
        parts = [torch.tensor(p) for p in partition]
        loss.accumulate(encode, parts, parts, leaves[2].exp(), across=False)
        for total, leaf in zip(sums, leaves):
            total += leaf.grad / 3
    for total, gradient in zip(sums, want):
        close(total, gradient)


def test_accumulation_refuses_weights_that_need_the_batch():
    for options in ({"weights": "updated"}, {"weights": "batch"}, {"max_ratio": 5.0}):
        loss = ck.DatasetContrastiveLoss(20, **options)
        with pytest.raises(ValueError, match="accumulate"):
            loss.accumulate(lambda b: b, [0], [torch.arange(2)], 1.0)
    loss = ck.DatasetContrastiveLoss(20)
    with pytest.raises(ValueError, match="index"):
        loss.accumulate(lambda b: b, [0, 1], [torch.arange(2)], 1.0)
    with pytest.raises(ValueError, match="encode"):
        loss.accumulate(lambda b: (torch.eye(3), torch.eye(3)), [0], [torch.arange(2)], 1.0)
