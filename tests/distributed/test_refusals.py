"""What one rank does differently, or refuses alone, is an error on all of them, and nobody waits for the time-out."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from launch import Failure, run, succeeded
from torch import Tensor
from torch import distributed as dist

import contrastive_kernels as ck

N, D, SAMPLES = 6, 8, 20


def features() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(dist.get_rank())
    x, y = (torch.randn(N, D, generator=g, dtype=torch.float32) for _ in range(2))
    return x.requires_grad_(), y.requires_grad_()


def log_normalizers() -> Tensor:
    return torch.ones(N, dtype=torch.float32)


def structure(x: Tensor, y: Tensor, last: bool) -> Any:
    given = {"image_independent": x, "text_independent": None if last else y}
    return ck.LatentStructureLoss(separation=1.0)(x, y, 2.0, **given)["loss"]


def of_data_set(x: Tensor, y: Tensor, *, index: int = 0, positives: Any = None, train: bool = True, **more: Any) -> Any:
    loss = ck.DatasetContrastiveLoss(**{"num_samples": SAMPLES, "directions": 1, **more}).train(train)
    return loss(x, y, torch.arange(N) + index, 2.0, positives=positives)


def of_memory(last: bool) -> Any:
    memory = ck.NormalizerMemory(SAMPLES, 1, floor=0.5 if last else 0.1)
    memory.update(torch.arange(N), torch.ones(N, 1, dtype=torch.float64))


def of_all_rows(x: Tensor, y: Tensor, last: bool, **over: Any) -> Any:
    """A loss of which every rank computes all rows; the last one says it otherwise."""
    return ck.info_nce(x, y, 2.0, label_smoothing=0.1, group="world", **(over if last else {}))


def queue(width: int, ids: bool = False) -> ck.FeatureQueue:
    return ck.FeatureQueue(8, width, ids=ids)


#: By name: what the last of two ranks does differently, and the words of the error.
CASES: dict[str, tuple[Callable[[Tensor, Tensor, bool], Any], list[str]]] = {
    "weights": (
        lambda x, y, last: ck.info_nce(
            x, y, 2.0, weight=torch.ones(N, dtype=torch.float64 if last else torch.float32), group="world"
        ),
        ["weights=torch.float32", "weights=torch.float64"],
    ),
    "normalize": (lambda x, y, last: ck.clip_loss(x, y, 2.0, normalize=last, group="world"), ["normalize=True"]),
    "normalize views": (lambda x, y, last: ck.nt_xent(x, y, 2.0, normalize=last, group="world"), ["normalize=True"]),
    "normalize sigmoid": (
        lambda x, y, last: ck.sigmoid(x, y, 2.0, -1.0, normalize=last, group="world"),
        ["normalize=True"],
    ),
    "normalize search": (lambda x, y, last: ck.hardest_negatives(x, y, normalize=last, group="world"), ["normalize="]),
    "normalize corpus": (lambda x, y, last: ck.retrieval_metrics(x, y, normalize=last, group="world"), ["normalize="]),
    "normalize geometry": (
        lambda x, y, last: ck.geometric_consistency(x, y, normalize=last, group="world"),
        ["normalize="],
    ),
    "gradient of a view": (
        lambda x, y, last: ck.geometric_consistency(
            x.detach(), y.detach(), x if last else x.detach(), group="world"
        ).requires_grad_().backward(),
        ["gradients of=[False, False, False, False]", "gradients of=[False, False, True, False]"],
    ),
    "shape": (
        lambda x, y, last: ck.decomposable(x, y, 2.0, log_normalizers(), shape=1.0 if last else None, group="world"),
        ["shape=None", "shape=1.0"],
    ),
    "negative_scale": (
        lambda x, y, last: ck.decomposable(x, y, 2.0, log_normalizers(), negative_scale=1.0 + last, group="world"),
        ["negative_scale=2.0"],
    ),
    "positive_logits": (
        lambda x, y, last: ck.decomposable(
            x.detach(), y.detach(), 2.0, log_normalizers(), group="world",
            positive_logits=log_normalizers().requires_grad_(last),
        ),
        ["gradients of=positive_logits"],
    ),
    "backend": (
        lambda x, y, last: ck.info_nce(x, y, 2.0, backend="cuda" if last else None, group="world"),
        ["rank 1 raised ValueError: backend"],
    ),
    "gradients": (
        lambda x, y, last: ck.clip_loss(x, y, 2.0, gradients="avg" if last else "sum", group="world"),
        ["rank 1 raised ValueError: gradients: expected"],
    ),
    "strategy": (
        lambda x, y, last: ck.nt_xent(x, y, 2.0, strategy="rings" if last else "ring", group="world"),
        ["rank 1 raised ValueError: strategy: expected"],
    ),
    "meta": (
        lambda x, y, last: ck.clip_loss(x.to("meta") if last else x, y.to("meta") if last else y, 2.0, group="world"),
        ["rank 1 raised "],
    ),
    "workspace": (
        lambda x, y, last: ck.info_nce(x, y, 2.0, workspace_bytes=1 if last else None, group="world"),
        ["rank 1 raised ValueError: workspace_bytes"],
    ),
    "workspace search": (
        lambda x, y, last: ck.hardest_negatives(x, y, workspace_bytes=1 if last else None, group="world"),
        ["rank 1 raised ValueError: workspace_bytes"],
    ),
    "workspace corpus": (
        lambda x, y, last: ck.retrieval_metrics(x, y, workspace_bytes=1 if last else None, group="world"),
        ["rank 1 raised ValueError: workspace_bytes"],
    ),
    "logit_bias": (
        lambda x, y, last: ck.ClipLoss()(x, y, 2.0, torch.zeros(2) if last else 0.0).backward(),
        ["rank 1 raised ValueError: logit_bias"],
    ),
    "views": (
        lambda x, y, last: ck.MultimodalContrastiveLoss()(x, y, 2.0, x if last else None).backward(),
        ["views=[]", "views=['image']"],
    ),
    "structure": (lambda x, y, last: structure(x, y, last).backward(), ["rank 1 raised ValueError: image_independent"]),
    "index": (lambda x, y, last: of_data_set(x, y, index=99 * last).backward(), ["rank 1 raised ValueError: index"]),
    "positives": (
        lambda x, y, last: of_data_set(x, y, positives=99 if last else 0).backward(),
        ["rank 1 raised ValueError: positives"],
    ),
    "training": (lambda x, y, last: of_data_set(x, y, train=last).backward(), ["training=False", "training=True"]),
    "samples": (lambda x, y, last: of_data_set(x, y, num_samples=SAMPLES + last, negatives="batch"), ["(21, 1.0"]),
    # of what every rank computes whole, nobody is told once rows are on their way
    **{
        f"whole, {name}": (
            lambda x, y, last, name=name, value=value: of_all_rows(x, y, last, **{name: value}).backward(),
            [f"rank 1 raised {kind}: {name}"],
        )
        for name, value, kind in (
            ("backend", "cuda", "ValueError"),
            ("workspace_bytes", 8, "ValueError"),
            ("reduction", "none at all", "ValueError"),
        )
    },
    "whole, labels": (
        lambda x, y, last: ck.sup_con(
            x, torch.arange(N), 2.0, workspace_bytes=8 if last else None, group="world"
        ).backward(),
        ["rank 1 raised ValueError: workspace_bytes"],
    ),
    "whole, queue's width": (
        lambda x, y, last: ck.info_nce(x, y, 2.0, queue=queue(x.shape[1] + last), group="world").backward(),
        ["rank 1 raised ValueError: queue"],
    ),
    "whole, queue's ids": (
        lambda x, y, last: ck.info_nce(x, y, 2.0, queue=queue(x.shape[1], last), group="world").backward(),
        ["with ids"],
    ),
    "uneven": (
        lambda x, y, last: ck.clip_loss(x[: N - last], y[: N - last], 2.0, uneven=not last, group="world").backward(),
        ["uneven=True on rank 0 and uneven=False on rank 1"],
    ),
    "uneven, whole": (
        lambda x, y, last: ck.clip_loss(x, y, 2.0, margin=0.1, uneven=not last, group="world").backward(),
        ["uneven=True on rank 0 and uneven=False on rank 1"],
    ),
    "beyond what is said": (
        lambda x, y, last: ck.retrieval_metrics(x, y, k=(*range(1, 900 + last),), group="world"),
        ["same loss of all ranks"],
    ),
    "floor": (lambda x, y, last: of_memory(last), ["0.1)", "0.5)"]),
}  # fmt: skip


def apart(names: list[str]) -> dict[str, str]:
    """What every case says."""
    said = {}
    for name in names:
        x, y = features()
        try:
            CASES[name][0](x, y, dist.get_rank() == 1)
            said[name] = "nothing"
        except (TypeError, ValueError) as error:
            said[name] = str(error)
        ck.clip_loss(x, y, 2.0, group="world").backward()  # the next call meets the others' next
    return said


def pairs_of_views() -> list[str]:
    x, said = torch.eye(4), []
    ids, bias = torch.arange(4), torch.zeros(4)
    for what in ({"ids": (ids, ids.flip(0))}, {"candidate_bias": (bias, bias + 1)}, {"queue": 5}):
        loss = ck.info_nce if "queue" in what else ck.nt_xent
        more = {} if "queue" in what else {"margin": 0.1}
        with pytest.raises(TypeError, match=next(iter(what))) as caught:
            loss(x, x, 2.0, group="world", **more, **what)
        said.append(str(caught.value))
    assert ck.clip_loss(x, x, 2.0, label_smoothing=0, strategy="grid", group="world") > 0
    return said


def test_a_wrong_kind_is_named_over_ranks(tmp_path):
    assert all(len(said) == 3 for said in succeeded(run(2, pairs_of_views, tmp_path)))


@pytest.mark.parametrize("name", CASES)
def test_what_one_rank_does_alone_is_an_error_on_all(name, tmp_path):
    start = time.monotonic()
    one, other = succeeded(run(2, apart, tmp_path, [name]))
    assert time.monotonic() - start < 30
    assert one == other and one[name].startswith("group: expected")
    assert all(word in one[name] for word in CASES[name][1]), one[name]


def warm_up() -> None:
    x, y = features()
    ck.DatasetContrastiveLoss(SAMPLES).warm_up(x, y, torch.arange(N) + 99 * dist.get_rank(), 2.0)


def write_what_is_read(folder: str) -> None:
    ck.NormalizerMemory(SAMPLES, storage=folder, read_only=True).update(torch.arange(N), torch.ones(N, 2))


def test_a_sample_outside_is_an_error_on_all_in_warm_up(tmp_path):
    for one in run(2, warm_up, tmp_path):
        assert isinstance(one, Failure) and "rank 1 raised ValueError: index" in one.text


def test_a_memory_that_may_not_be_written_says_so_over_ranks(tmp_path):
    ck.NormalizerMemory(SAMPLES, storage=tmp_path / "memory").close()
    for one in run(2, write_what_is_read, tmp_path, str(tmp_path / "memory")):
        assert isinstance(one, Failure) and one.kind == "RuntimeError" and "read_only=True" in one.text


def positives_as_each_likes(strategy: str) -> float:
    """An index on one rank, the default on the other: the same pairs."""
    x, y = features()
    positives = torch.arange(N) if dist.get_rank() else None
    return ck.info_nce(x, y, 2.0, positives=positives, group="world", strategy=strategy).item()


@pytest.mark.parametrize("strategy", ["replicated", "strips", "grid", "ring"])
def test_ranks_say_where_positives_are_as_each_likes(strategy, tmp_path):
    one, other = succeeded(run(2, positives_as_each_likes, tmp_path, strategy))
    assert one == other


def not_there() -> list[str]:
    x, y = features()
    with pytest.raises(NotImplementedError) as caught:
        ck.info_nce(x, y, 2.0, label_smoothing=0.1, strategy="ring", group="world")
    return [str(caught.value)]


def test_what_is_not_there_over_ranks_is_an_error_of_that_kind(tmp_path):
    assert all("label_smoothing" in text for (text,) in succeeded(run(2, not_there, tmp_path)))


def overwritten(strategy: str) -> list[str]:
    """Features that change between the loss and its backward pass, which computes again from them."""
    x, y = features()
    losses = ck.info_nce(x, y, 2.0, reduction="none", group="world", strategy=strategy)
    with torch.no_grad():
        x.mul_(3)
    with pytest.raises(RuntimeError) as caught:
        losses.sum().backward()
    return [str(caught.value)]


@pytest.mark.parametrize("strategy", ["replicated", "strips", "grid", "ring"])
def test_features_that_were_overwritten_are_refused(strategy, tmp_path):
    assert all("modified by an inplace" in text for (text,) in succeeded(run(2, overwritten, tmp_path, strategy)))
