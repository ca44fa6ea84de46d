"""torch's default dtype and device are the user's: nothing here depends on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from defaults import DEFAULTS, depending, torch_default
from torch import Tensor

import contrastive_kernels as ck

N, D = 9, 5


def features(count: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [
        torch.nn.functional.normalize(torch.randn(N, D, generator=g, dtype=torch.float32, device="cpu"), dim=1)
        for _ in range(count)
    ]


V, T, VA, TA, VI, TI, VIA, TIA = features(8)
LOG_Z = torch.full((N,), 2.0, dtype=torch.float32, device="cpu")
INDEX = torch.arange(N, device="cpu")
WEIGHT = torch.linspace(0, 2, N, dtype=torch.float32, device="cpu")


SEVERAL = torch.stack([(INDEX + 1) % N, (INDEX + 3) % N, -torch.ones_like(INDEX)], 1)


def filled(features: Tensor) -> ck.FeatureQueue:
    queue = ck.FeatureQueue(N - 2, D)
    queue.enqueue(features)
    return queue


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def dataset(x: Tensor) -> Tensor:
    loss = ck.DatasetContrastiveLoss(N, device="cpu", shape=1.0, include_positive=True)
    loss.warm_up(x.detach(), T, INDEX, 5.0)
    return loss(x, T, INDEX, 5.0, generator=generator())


CALLS: dict[str, Callable[[Tensor], Any]] = {
    "info_nce": lambda x: ck.info_nce(x, T, 5.0, weight=WEIGHT),
    "clip_loss": lambda x: ck.clip_loss(x, T, 5.0, normalize=True),
    "nt_xent": lambda x: ck.nt_xent(x, T, 5.0, weight=WEIGHT),
    "sigmoid": lambda x: ck.sigmoid(x, T, 5.0, -2.0),
    "decomposable": lambda x: ck.decomposable(x, T, 5.0, (LOG_Z, LOG_Z), shape=0.7, generator=generator()),
    "panels": lambda x: ck.clip_loss(x, T, 5.0, reduction="none", backend="torch"),
    "sample_negatives": lambda x: ck.sample_negatives(x, T, 5.0, generator=generator()),
    "torch sample_negatives": lambda x: ck.sample_negatives(x, T, 5.0, generator=generator(), backend="torch"),
    "hardest_negatives": lambda x: ck.hardest_negatives(x, T, exclude=INDEX // 2),
    "hardest by rank": lambda x: ck.hardest_negatives(x, T, k=3, skip=1, margin=0.5, exclude=INDEX // 2),
    "retrieval_metrics": lambda x: ck.retrieval_metrics(x, T).ranks,
    "several positives' ranks": lambda x: (
        ck.retrieval_metrics(x, T, positives=SEVERAL, exclude_self=True).positive_ranks
    ),
    "several positives": lambda x: ck.info_nce(x, T, 5.0, positives=SEVERAL, queue=filled(VA)),
    "positive features": lambda x: ck.info_nce(x, T, 5.0, positive_features=TA, debiased=0.1, hardness_beta=0.5),
    "weighted": lambda x: ck.nt_xent(
        x, T, 5.0, include_positive=False, weight_fn=ck.von_mises_fisher_weights, weight=WEIGHT
    ),
    "matryoshka": lambda x: ck.matryoshka(ck.clip_loss, (2, 5), normalize=True)(x, T, 5.0),
    "multimodal_contrastive": lambda x: ck.multimodal_contrastive(x, T, VA, TA, 5.0),
    "feature_separation": lambda x: ck.feature_separation(V, T, x, TI, VIA, TIA, 5.0),
    "brownian_bridge": lambda x: ck.brownian_bridge(x, T, VA, t="sampled", generator=generator()),
    "geometric_consistency": lambda x: ck.geometric_consistency(x, T, VA, TA, cross=0.5),
    "dataset": dataset,
}


def outcome(name: str) -> tuple[Tensor, Tensor | None]:
    x = (VI if name == "feature_separation" else V).clone().requires_grad_()
    value = CALLS[name](x)
    if value.is_floating_point():
        value.sum().backward()
    return value.detach(), x.grad


@pytest.fixture(params=DEFAULTS)
def other_default(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch_default(request.param):
        yield


@pytest.fixture(scope="module")
def expected() -> dict[str, tuple[Tensor, Tensor | None]]:
    return {name: outcome(name) for name in CALLS}


@pytest.mark.parametrize("name", CALLS)
def test_nothing_depends_on_defaults(name, expected, other_default):
    (value, dx), (found, found_dx) = expected[name], outcome(name)
    assert found.device == value.device and found.dtype == value.dtype
    assert torch.equal(found, value)
    assert (dx is None) == (found_dx is None)
    if dx is not None:
        assert torch.equal(found_dx, dx)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_no_loss_depends_on_defaults(backend):
    """The GPU's backends: tests/backends/test_cuda_pass.py, tests/interpreted.py."""
    assert depending(backend) == []


def test_plans_and_words(other_default):
    assert ck.plan(100).device == "cpu"
    assert ck.why_not("torch", V) is None
