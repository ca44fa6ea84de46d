"""Weights of rows as large and as small as floating-point numbers are: a mean depends on their ratios alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import contrastive_kernels as ck

N = 6
SHARES = torch.tensor([1.0, 2.0, 0.0, 1.0, 3.0, 0.0])


def dataset_loss(x: Tensor, y: Tensor, *, weight: Tensor, reduction: str) -> Tensor:
    loss = ck.DatasetContrastiveLoss(N, reduction=reduction)
    loss.warm_up(x, y, torch.arange(N), 3.0)
    return loss(x, y, torch.arange(N), 3.0, weight=weight)


LABELS = torch.tensor([0, 1, 0, 2, 1, 2])
LOSSES: dict[str, Callable[..., Tensor]] = {
    "info_nce": lambda x, y, **options: ck.info_nce(x, y, 3.0, **options),
    "clip_loss": lambda x, y, **options: ck.clip_loss(x, y, 3.0, **options),
    "nt_xent": lambda x, y, **options: ck.nt_xent(x, y, 3.0, **options),
    "sigmoid": lambda x, y, **options: ck.sigmoid(x, y, 3.0, -1.0, **options),
    "decomposable": lambda x, y, **options: ck.decomposable(x, y, 3.0, torch.ones(N), **options),
    "pair": lambda x, y, **options: ck.decomposable(x, y, 3.0, (torch.ones(N), torch.ones(N)), **options),
    "dataset": dataset_loss,
    "ranking": lambda x, y, **options: ck.multiple_negatives_ranking(x, y, 3.0, directions=WAYS, **options),
    "labels": lambda x, y, **options: ck.sup_con(x, LABELS, 3.0, y=y, y_labels=LABELS, **options),
    "pairs": lambda x, y, **options: ck.multi_positive_nce(x, LABELS, 3.0, y=y, y_labels=LABELS, **options),
}
WAYS = ("query_to_doc", "query_to_query")
#: As one call, and as panels.
BACKENDS = [{"backend": "cpu"}, {"backend": "cpu", "workspace_bytes": 40_000}, {"backend": "torch"}]


def outcome(loss: str, weight: Tensor, reduction: str, **options: object) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x, y = (torch.nn.functional.normalize(torch.randn(N, 5, generator=g), dim=1) for _ in range(2))
    x.requires_grad_()
    value = LOSSES[loss](x, y, weight=weight, reduction=reduction, **options)
    value.backward(torch.linspace(1, 2, value.numel()).reshape(value.shape))
    return value.detach(), x.grad


def ways(loss: str) -> list[dict[str, object]]:
    return [{}] if loss == "dataset" else BACKENDS


@pytest.mark.parametrize("size, dtype", [
    (2.0**126, torch.float32),  # their sum overflows
    (2.0**-140, torch.float32),  # subnormal
    (2.0**-170, torch.float64),  # 0 in float32
    (2.0**1000, torch.float64),  # infinite in float32
    (2.0**-14, torch.float16),
    (2.0**126, torch.bfloat16),
])  # fmt: skip
@pytest.mark.parametrize("loss", LOSSES)
def test_a_mean_knows_ratios_alone(loss, size, dtype):
    weight = SHARES.to(torch.float64).mul(size).to(dtype)
    for options in ways(loss):
        value, dx = outcome(loss, SHARES, "mean", **options)
        assert value.item() > 0 or loss in ("decomposable", "pair", "dataset")
        found, found_dx = outcome(loss, weight, "mean", **options)
        assert torch.allclose(found, value, rtol=1e-5, atol=1e-6), options
        assert torch.allclose(found_dx, dx, rtol=1e-4, atol=1e-7), options
        assert found_dx.abs().max() > 1e-3


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_sum_is_proportional(loss, reduction):
    """... to weights of any dtype; what float32 cannot hold is 0 there, and takes nothing else with it."""
    for options in ways(loss):
        value, dx = outcome(loss, SHARES, reduction, **options)
        for size in (2.0**80, 2.0**-80):
            found, found_dx = outcome(loss, SHARES.double() * size, reduction, **options)
            assert torch.allclose(found / size, value, rtol=1e-5, atol=1e-6), options
            assert torch.allclose(found_dx / size, dx, rtol=1e-4, atol=1e-6), options
        nothing, no_dx = outcome(loss, SHARES.double() * 2.0**-200, reduction, **options)
        assert not nothing.any() and not no_dx.any(), options


@pytest.mark.parametrize("loss", ["decomposable", "pair"])
def test_a_row_that_does_not_count_may_overflow(loss):
    """u Z of the second row is beyond float32, its share of the mean below."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, 5, generator=g) for _ in range(2))
    log_z = torch.tensor([1.0, -200.0, 1.0])
    normalizers = log_z if loss == "decomposable" else (log_z, log_z)
    for reduction in ("mean", "sum"):
        for weight in (torch.tensor([1.0, 0.0, 1.0]), torch.tensor([1.0, 1e-60, 1.0], dtype=torch.float64)):
            assert ck.decomposable(x, y, 1.0, normalizers, weight=weight, reduction=reduction).isfinite()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss", LOSSES)
def test_weights_of_either_sign(loss, reduction):
    """The loss is linear in them: that of the positive ones less that of the others."""
    weight = torch.tensor([1.0, -2.0, 3.0, 0.5, -0.25, 0.0])
    views = 2 if loss == "nt_xent" else 1
    total = views * weight.sum() if reduction == "mean" else 1.0
    if loss == "pairs" and reduction == "mean":  # two of every row
        total = 2 * total
    for options in ways(loss):
        found, dx = outcome(loss, weight, reduction, **options)
        kind = "none" if reduction == "none" else "sum"
        parts = [outcome(loss, part, kind, **options) for part in (weight.clamp(min=0), weight.neg().clamp(min=0))]
        for ours, more, less in zip((found, dx), *parts):
            torch.testing.assert_close(ours, (more - less) / total, rtol=1e-4, atol=1e-5)


def test_float64_features_keep_float64_weights():
    x = torch.eye(4, dtype=torch.float64)
    weight = torch.tensor([1e-300, 0.0, 0.0, 3e-300], dtype=torch.float64)
    rows = ck.info_nce(x, x, 2.0, reduction="none")
    mean = ck.info_nce(x, x, 2.0, weight=weight)
    assert torch.allclose(mean, (rows[0] + 3 * rows[3]) / 4, rtol=1e-14)
    assert torch.equal(ck.info_nce(x, x, 2.0, weight=weight, reduction="none"), rows * weight)
