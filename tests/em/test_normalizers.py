"""Weights of rows: where u overflows and its value does not, first visits, and digits of large logits."""

from __future__ import annotations

import math

import pytest
import torch

import contrastive_kernels as ck
from contrastive_kernels.em.normalizers import positive_term

F64 = torch.float64


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# log Z = log 7 - 100 < -88.7: u = 1 / Z is no float32


def test_the_positive_adds_nothing_where_it_does_not_count():
    log_u = torch.tensor([[1.0, 100.0], [-3.0, 1000.0]])
    assert (positive_term(False, log_u) == 0).all()
    close(positive_term(True, log_u), log_u.exp())


@pytest.mark.parametrize("shape", [None, 2.0])
def test_the_reference_without_the_positive_is_finite(shape):
    x, log_z = torch.eye(8), torch.full((8,), math.log(7) - 100)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    value, exact = (
        ck.reference.decomposable(x.to(d), x.to(d), 100.0, log_z.to(d), shape=shape, positive_constant=0.0, generator=g)
        for d, g in zip((torch.float32, F64), generators)
    )
    close(value, exact.float())
    if shape is None:
        close(exact, torch.tensor(math.log(7) - 100, dtype=F64))


@pytest.mark.parametrize("weights", ["stored", "updated", "batch", math.log(7) - 100])
@pytest.mark.parametrize("shape", [None, 2.0])
def test_the_value_without_the_positive_is_finite(weights, shape):
    x = torch.eye(8).requires_grad_()
    loss = ck.DatasetContrastiveLoss(8, include_positive=False, weights=weights, shape=shape)
    for _ in range(2):
        value = loss(x, torch.eye(8), torch.arange(8), 100.0, generator=torch.Generator().manual_seed(0))
        if shape is None:
            close(value.detach(), torch.tensor(math.log(7) - 100))
        assert value.isfinite() and torch.autograd.grad(value, x)[0].isfinite().all()


def test_micro_batches_without_the_positive_are_finite():
    parts = [torch.arange(4), torch.arange(4, 8)]
    loss = ck.DatasetContrastiveLoss(8, include_positive=False)
    loss.memory.update(torch.arange(8), torch.zeros(8, 2))  # the other seven, at scores of 0
    value = loss.accumulate(lambda i: (torch.eye(8)[i], torch.eye(8)[i]), parts, parts, 100.0)
    close(value, torch.tensor(math.log(7) - 100))


def test_a_batch_of_one_is_0_where_the_features_sum_overflows():
    x = torch.full((1, 700), 100.0, dtype=torch.float16, requires_grad=True)
    value = ck.DatasetContrastiveLoss(8)(x, x.detach(), torch.tensor([3]), 1.0)
    value.backward()
    assert value == 0 and (x.grad == 0).all()


# First visits


@pytest.mark.parametrize("options", [{}, {"max_ratio": 5.0}, {"max_ratio": "partial sum"}, {"weights": "updated"}])
@pytest.mark.parametrize("include_positive", [True, False])
def test_skipped_first_visits_have_no_weight(options, include_positive):
    x, y = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0), dtype=F64)
    x.requires_grad_()
    index = torch.arange(6)
    make = {"include_positive": include_positive, **options}
    loss = ck.DatasetContrastiveLoss(20, first_visit="skip", **make)
    first = loss(x, y, index, 3.0)
    assert first == 0 and not torch.autograd.grad(first, x)[0].any()
    assert (loss.memory.visits[:6] == 1).all()
    assert loss(x, y, index, 3.0).abs() > 0.1
    # two of six are new: the others have all the weight
    skipping, reducing = (ck.DatasetContrastiveLoss(20, first_visit=f, **make).eval() for f in ("skip", "reduce"))
    for one in (skipping, reducing):
        one.memory.update(index[:4], torch.zeros(4, 2))
    weight = torch.tensor([1.0, 1, 1, 1, 0, 0])
    want = reducing(x, y, index, 3.0, weight=weight)
    close(skipping(x, y, index, 3.0), want, 1e-12)
    close(skipping(x, y, index, 3.0, weight=torch.ones(6)), want, 1e-12)


@pytest.mark.parametrize("weights", ["batch", 2.0])
def test_weights_that_ask_nothing_of_the_memory_know_no_first_visits(weights):
    x, y = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    values = [
        ck.DatasetContrastiveLoss(20, first_visit=first_visit, weights=weights)(x, y, torch.arange(6), 1.0)
        for first_visit in ("skip", "reduce")
    ]
    assert values[0] == values[1] != 0


# Digits


def test_what_is_stored_weighs_rows_to_the_last_digit_at_large_logits():
    """log mean exp(z) = 1e4 + a: in float32 it would be off by 1e-3, and so would every weight."""
    x, y = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    common = torch.full((6, 1), 100.0, dtype=F64)
    x, y = torch.cat([x, common], 1), torch.cat([y, common], 1)  # all scores move by 1e4
    loss = ck.DatasetContrastiveLoss(6)
    value = loss(x, y, torch.arange(6), 1.0)
    again = loss.eval()(x, y, torch.arange(6), 1.0)
    want = ck.reference.clip_loss(x, y, 1.0)
    close(value, want, 1e-9)
    close(again, want, 1e-9)
