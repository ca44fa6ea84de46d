"""sentence-transformers' ranking losses and these: the same values and gradients, with every option."""

from __future__ import annotations

import itertools
import sys
import warnings
from typing import Any

import pytest
import torch
from against import assert_no_worse, assert_same, features, value_and_gradients
from launch import run, succeeded
from sentence_transformers.sentence_transformer import losses as theirs
from sentence_transformers.util import cos_sim, dot_score, manhattan_sim
from torch import Tensor, nn
from torch import distributed as dist

from contrastive_kernels.integrations import common
from contrastive_kernels.integrations import sentence_transformers as ours

WAYS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
JOINT = [("query_to_doc", *more) for size in range(4) for more in itertools.combinations(WAYS[1:], size)]
OPTIONS: list[dict[str, Any]] = [{"directions": ways, "partition_mode": "joint"} for ways in JOINT]
OPTIONS += [{"directions": ways, "partition_mode": "per_direction"} for ways in (WAYS[:1], (WAYS[0], WAYS[2]))]
HARD = [
    {**OPTIONS[k], "hardness_mode": mode, "hardness_strength": 5.0}
    for k in (0, 7, 9)
    for mode in ("in_batch_negatives", "hard_negatives", "all_negatives")
]
pytestmark = pytest.mark.filterwarnings("ignore:The .*MultipleNegatives.* is deprecated:DeprecationWarning")


class Model(nn.Sequential):
    """What the losses ask of a model: token ids [n, length] to embeddings."""

    def __init__(self, dropout: float = 0.0) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Embedding(50, 8), nn.Linear(8, 6), nn.Dropout(dropout))

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": super().forward(inputs["input_ids"]).mean(1)}

    def get_embedding_dimension(self) -> int:
        return 6


MODEL = Model()


def of_embeddings(kind: str, module: Any, **options: Any) -> Any:
    loss = getattr(module, kind)(MODEL, **options)
    if kind.startswith("Cached"):
        return lambda *columns: loss.calculate_loss([list(column.split(3)) for column in columns])
    return lambda *columns: loss.compute_loss_from_embeddings(list(columns), None)


@pytest.mark.parametrize("columns", [2, 3, 4])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"])
def test_ranking(kind, options, columns):
    for similarity_fct, scale in ((cos_sim, 20.0), (dot_score, 0.7)):
        over = {**options, "similarity_fct": similarity_fct, "scale": scale}
        tensors = features(9, count=columns, unit=False)
        assert_same(of_embeddings(kind, ours, **over), of_embeddings(kind, theirs, **over), tensors)


@pytest.mark.parametrize("columns", [2, 3, 4])
@pytest.mark.parametrize("options", HARD, ids=str)
@pytest.mark.parametrize("kind", ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"])
def test_hardness(kind, options, columns):
    for similarity_fct, scale in ((cos_sim, 20.0), (dot_score, 0.7)):
        over = {**options, "similarity_fct": similarity_fct, "scale": scale}
        pair = of_embeddings(kind, ours, **over), of_embeddings(kind, theirs, **over)
        batches = [features(9, count=columns, unit=False, seed=seed) for seed in range(8)]
        wide = [v.double() for v in batches[0]]
        found, wanted = (value_and_gradients(loss, wide) for loss in pair)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
        # logits of up to 200 in float32: one batch is a throw of dice
        assert_no_worse(*pair, batches, torch.float32, factor=2.0)


@pytest.mark.parametrize("columns", [2, 3])
@pytest.mark.parametrize(
    "kind", ["MultipleNegativesSymmetricRankingLoss", "CachedMultipleNegativesSymmetricRankingLoss"]
)
def test_symmetric(kind, columns):
    with pytest.warns(DeprecationWarning):
        getattr(theirs, kind)(MODEL)
    assert_same(of_embeddings(kind, ours), of_embeddings(kind, theirs), features(9, count=columns, unit=False))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[7], OPTIONS[9]], ids=str)
def test_sixteen_bits_are_no_worse(options, dtype):
    batches = [features(33, count=3, unit=False, seed=k) for k in range(8)]
    kind = "MultipleNegativesRankingLoss"
    assert_no_worse(of_embeddings(kind, ours, **options), of_embeddings(kind, theirs, **options), batches, dtype)


def columns_of(n: int, count: int) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(n)
    return [{"input_ids": torch.randint(50, (n, 4), generator=g)} for _ in range(count)]


def step(module: Any, kind: str, around: bool, dropout: float) -> list[Tensor]:
    """One step of a model, through ``MatryoshkaLoss`` or not."""
    model = Model(dropout).double()
    options = {"mini_batch_size": 4} if kind.startswith("Cached") else {}
    loss = getattr(module, kind)(model, **options)
    if around:
        loss = theirs.MatryoshkaLoss(model, loss, [6, 3], n_dims_per_step=-1)
    torch.manual_seed(1)
    value = loss(columns_of(10, 3), None)
    value.backward()
    return [value.detach(), *[p.grad for p in model.parameters()]]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("kind", ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"])
def test_a_step_of_a_model(kind, around, dropout):
    torch.testing.assert_close(
        step(ours, kind, around, dropout), step(theirs, kind, around, dropout), rtol=1e-9, atol=1e-12
    )


# ---- several ranks ----


def by_rank(kind: str, options: dict[str, Any], columns: int) -> list[list[Tensor]]:
    rank, size, n = dist.get_rank(), dist.get_world_size(), 5
    tensors = [v[rank * n : (rank + 1) * n] for v in features(size * n, count=columns, unit=False)]
    return [
        value_and_gradients(of_embeddings(kind, module, gather_across_devices=True, **options), tensors)
        for module in (ours, theirs)
    ]


@pytest.mark.parametrize("columns", [2, 3])
@pytest.mark.parametrize("options", [OPTIONS[k] for k in (0, 2, 7, 9)], ids=str)
@pytest.mark.parametrize("kind", ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"])
def test_over_ranks(kind, options, columns, tmp_path):
    for found, wanted in succeeded(run(2, by_rank, tmp_path, kind, options, columns)):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_gather_in_one_process():
    over = {"gather_across_devices": True}
    kind = "MultipleNegativesRankingLoss"
    assert_same(of_embeddings(kind, ours, **over), of_embeddings(kind, theirs, **over), features(5))


# ---- what is left to sentence-transformers ----


@pytest.mark.parametrize("kind", ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"])
@pytest.mark.parametrize(
    "options, said",
    [
        ({"similarity_fct": manhattan_sim}, "similarity_fct=manhattan_sim"),
    ],
)
def test_others_are_left_and_said_once(kind, options, said, monkeypatch):
    monkeypatch.setattr(common, "_said", set())
    tensors = features(6, count=3)
    with pytest.warns(UserWarning, match=f"{kind}: {said} is computed by the library's own code"):
        found = value_and_gradients(of_embeddings(kind, ours, **options), tensors)
    wanted = value_and_gradients(of_embeddings(kind, theirs, **options), tensors)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        of_embeddings(kind, ours, **options)(*tensors)


def test_one_column_is_an_error_as_ever(monkeypatch):
    monkeypatch.setattr(common, "_said", set())
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="at least 2 embeddings"):
        of_embeddings("MultipleNegativesRankingLoss", ours)(*features(3, count=1))


def test_patched_and_install():
    module = sys.modules["sentence_transformers.sentence_transformer.losses"]
    name = "MultipleNegativesRankingLoss"
    original = getattr(theirs, name)
    with ours.patched():
        assert getattr(module, name) is getattr(ours, name)
        # what the cached loss makes for itself is the library's class by another name
        assert isinstance(module.CachedMultipleNegativesRankingLoss(MODEL).loss, original)
    assert getattr(module, name) is original
    try:
        ours.install()
        assert getattr(module, name) is getattr(ours, name)
    finally:
        common.replace("sentence_transformers", {v: k for k, v in ours._CLASSES.items()})
    assert getattr(module, name) is original
