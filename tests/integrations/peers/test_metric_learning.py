"""pytorch-metric-learning's losses and these: values and gradients with labels, references, distances, reducers."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import pytest
import torch
from against import assert_no_worse, assert_same, features, value_and_gradients
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers
from torch import Tensor

from contrastive_kernels.integrations import common
from contrastive_kernels.integrations import metric_learning as ours

LABELS = {
    "pairs": torch.arange(6).repeat(2),
    "classes": torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 0, 2]),
    "one has no positive": torch.tensor([0, 0, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2]),
    "all alike": torch.zeros(12, dtype=torch.int64),
    "all different": torch.arange(12),
    "int32": torch.arange(6, dtype=torch.int32).repeat(2),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dot": {"distance": distances.DotProductSimilarity(normalize_embeddings=False), "temperature": 2.0},
    "dot of unit length": {"distance": distances.DotProductSimilarity(), "temperature": 0.05},
    "another norm": {"distance": distances.CosineSimilarity(p=1)},
    "sum": {"reducer": reducers.SumReducer()},
    "class weights": {"reducer": reducers.ClassWeightedReducer(torch.arange(1.0, 13.0))},
    "per anchor": {"reducer": reducers.PerAnchorReducer()},
    "threshold": {"reducer": reducers.ThresholdReducer(low=0.1)},
    "regularizer": {"embedding_regularizer": regularizers.LpRegularizer()},
}


KINDS = ("NTXentLoss", "SupConLoss")


def both(labels: Any, options: dict[str, Any], *more: Any, wrap: Any = None, kind: str = "NTXentLoss") -> list[Any]:
    made = [getattr(module, kind)(**options) for module in (ours, losses)]
    if wrap is not None:
        return [wrap(each) for each in made]
    if more:  # references
        return [lambda x, y, loss=each: loss(x, labels, None, y, more[0]) for each in made]
    return [lambda x, loss=each: loss(x, labels) for each in made]


def differentiable(x: Tensor, loss: Any) -> Any:
    """The losses that have no pair are numbers without a graph."""
    return loss(x) + 0 * x.sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("options", ["plain", "dot", "sum"])
def test_labels(labels, options, kind):
    mine, theirs = both(LABELS[labels], OPTIONS[options], kind=kind)
    (x,) = features(12, count=1, unit=False)
    assert_same(lambda x: differentiable(x, mine), lambda x: differentiable(x, theirs), [x])


@pytest.mark.parametrize(
    "options, kind",
    [(name, kind) for kind in KINDS for name in OPTIONS if (name, kind) != ("per anchor", "SupConLoss")],
)
def test_options(options, kind):
    mine, theirs = both(LABELS["classes"], OPTIONS[options], kind=kind)
    assert_same(mine, theirs, features(12, count=1, unit=False))


def test_no_reduction_keeps_the_order():
    mine, theirs = both(LABELS["classes"], {"reducer": reducers.DoNothingReducer()})
    (x,) = features(12, count=1)
    found, wanted = mine(x)["loss"], theirs(x)["loss"]
    torch.testing.assert_close(found["losses"], wanted["losses"], rtol=1e-9, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(found["indices"], wanted["indices"]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reference", ["pairs", "all alike", "all different"])
def test_references(reference, kind):
    mine, theirs = both(LABELS["classes"], {}, LABELS[reference], kind=kind)
    assert_same(mine, theirs, features(12, unit=False))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_self_supervised(symmetric, kind):
    mine, theirs = both(None, {}, wrap=lambda loss: losses.SelfSupervisedLoss(loss, symmetric=symmetric), kind=kind)
    assert_same(mine, theirs, features(7, unit=False))


def test_blocks_of_labels(monkeypatch):
    monkeypatch.setattr(ours, "_BLOCK", 30)
    mine, theirs = both(LABELS["classes"], {})
    assert_same(mine, theirs, features(12, count=1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_no_worse(dtype, kind):
    mine, theirs = both(LABELS["classes"], {}, kind=kind)
    assert_no_worse(mine, theirs, [features(12, count=1, unit=False, seed=k) for k in range(8)], dtype)


def test_statistics_of_the_distance():
    found = []
    for kind in (ours.NTXentLoss, losses.NTXentLoss):
        loss = kind(distance=distances.CosineSimilarity(collect_stats=True))
        loss(features(12, count=1, unit=False)[0], LABELS["pairs"])
        found.append((loss.distance.initial_avg_query_norm, loss.distance.final_avg_ref_norm))
    assert found[0] == pytest.approx(found[1])


@pytest.mark.parametrize(
    "options, indices, said",
    [
        ({"distance": distances.LpDistance()}, None, "distance=LpDistance"),
        ({"distance": distances.CosineSimilarity(power=2)}, None, "a distance with power=2"),
        ({}, miners.MultiSimilarityMiner(), "a loss of mined pairs"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_others_are_left_and_said_once(options, indices, said, kind, monkeypatch):
    monkeypatch.setattr(common, "_said", set())
    (x,) = features(12, count=1)
    labels = LABELS["classes"]
    mined = None if indices is None else indices(x, labels)
    mine, theirs = both(labels, options, wrap=lambda loss: loss, kind=kind)
    with pytest.warns(UserWarning, match=f"{kind}: {said} is computed by the library's own code"):
        found = value_and_gradients(lambda x: mine(x, labels, mined), [x])
    torch.testing.assert_close(found, value_and_gradients(lambda x: theirs(x, labels, mined), [x]), rtol=0, atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine(x, labels, mined)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["plain", "enqueued alone", "miner", "another distance"])
def test_memory_of_other_batches(how, kind, monkeypatch):
    """Until it has wrapped; a row's own copy in it is no positive. No list of pairs unless somebody mines them."""
    monkeypatch.setattr(common, "_said", set())
    listed = []
    of_pairs = losses.CrossBatchMemory.create_indices_tuple

    def listing(self, *given):
        listed.append(type(self))
        return of_pairs(self, *given)

    monkeypatch.setattr(losses.CrossBatchMemory, "create_indices_tuple", listing)
    options = {"distance": distances.CosineSimilarity(power=2)} if how == "another distance" else {}
    miner = miners.MultiSimilarityMiner() if how == "miner" else None
    half = {"enqueue_mask": torch.arange(12) % 2 == 0} if how == "enqueued alone" else {}
    found = []
    for module in (ours, losses):
        memory = module.CrossBatchMemory(getattr(module, kind)(**options), 16, memory_size=20, miner=miner)
        for step in range(4):
            (x,) = features(12, count=1, seed=step, unit=False)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                parts = value_and_gradients(lambda x, memory=memory: memory(x, LABELS["classes"], **half), [x])
            found.append(parts)
    for mine, theirs in zip(found[:4], found[4:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    assert (ours.CrossBatchMemory in listed) == (kind == "SupConLoss" or how in ("miner", "another distance"))


def test_patched_and_install():
    module = sys.modules["pytorch_metric_learning.losses"]
    original = module.NTXentLoss
    with ours.patched():
        assert module.NTXentLoss is ours.NTXentLoss
    assert module.NTXentLoss is original
    try:
        ours.install()
        assert module.NTXentLoss is ours.NTXentLoss
    finally:
        common.replace("pytorch_metric_learning", {v: k for k, v in ours._CLASSES.items()})
    assert module.NTXentLoss is original
