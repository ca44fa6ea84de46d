"""The queue of features: what is in it, in which dtype, its state, and the order of ranks."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from launch import run, succeeded
from torch import distributed as dist
from torch import nn

import contrastive_kernels as ck


def batch(start: int, n: int, d: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and ids that count up."""
    ids = torch.arange(start, start + n)
    return ids[:, None].float() * torch.ones(d), ids


def content(queue: ck.FeatureQueue) -> list[int]:
    """Its ids in rising order, and that the features are theirs."""
    features, ids = queue.filled()
    assert ids is not None and torch.equal(features.float(), ids[:, None].float() * torch.ones(features.shape[1]))
    return sorted(ids.tolist())


@pytest.mark.parametrize(
    "sizes", [[1] * 12, [3, 3, 3], [2, 4, 1, 5], [5], [7], [13], [0, 4, 0, 3], [3, 13, 2]], ids=str
)
def test_the_last_ones_are_in_it(sizes):
    queue, start = ck.FeatureQueue(5, 3, ids=True), 100
    for n in sizes:
        queue.enqueue(*batch(start, n))
        start += n
        assert content(queue) == list(range(max(100, start - 5), start))
        assert len(queue) == min(start - 100, 5)
    queue.clear()
    assert len(queue) == 0 and content(queue) == []


def test_the_ring_turns():
    queue = ck.FeatureQueue(4, 3, ids=True)
    queue.enqueue(*batch(0, 3))
    queue.enqueue(*batch(3, 3))
    assert queue.ids.tolist() == [4, 5, 2, 3]


@pytest.mark.parametrize("places", [slice(2, 4), slice(0, 2), slice(1, 4)])
def test_its_own_features_come_in_as_they_were(places):
    """A view of the ring, which is written while it is read."""
    queue, other = (ck.FeatureQueue(4, 3, ids=True) for _ in range(2))
    for each in (queue, other):
        each.enqueue(*batch(0, 4))
        each.enqueue(*batch(10, 3))
    queue.enqueue(queue.features[places], queue.ids[places])
    other.enqueue(other.features[places].clone(), other.ids[places].clone())
    assert torch.equal(queue.features, other.features) and torch.equal(queue.ids, other.ids)


@pytest.mark.parametrize("next_, count", [(0, 99), (0, -2), (99, 4), (-1, 4), (0.5, 1)])
def test_places_that_are_not_there_are_refused(next_, count):
    queue = ck.FeatureQueue(4, 3)
    with pytest.raises(ValueError, match="state: expected places in a queue of 4"):
        queue.set_extra_state({"next": next_, "count": count})


def test_no_gradient_and_no_reference():
    x, keys = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    queue = ck.FeatureQueue(8, 4)
    queue.enqueue(keys)
    before = queue.features.clone()
    assert not queue.features.requires_grad and list(queue.parameters()) == []
    with torch.no_grad():
        keys.zero_()
    assert torch.equal(queue.features, before)
    loss = ck.info_nce(x, keys, 2.0, queue=queue)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, (x, keys)))


def test_features_may_come_in_before_backward():
    """The gradients are those of the queue that the loss saw."""
    x, queue = torch.randn(3, 4, requires_grad=True), ck.FeatureQueue(4, 4, ids=True)
    queue.enqueue(torch.randn(3, 4), torch.arange(3))
    loss = ck.info_nce(x, torch.randn(3, 4), 2.0, queue=queue, ids=torch.arange(3))
    want = torch.autograd.grad(loss, x, retain_graph=True)[0]
    queue.enqueue(torch.randn(4, 4), torch.arange(4))
    assert torch.equal(torch.autograd.grad(loss, x, retain_graph=True)[0], want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_stay(dtype):
    model = nn.Sequential(nn.Linear(3, 3), ck.FeatureQueue(4, 3, dtype=dtype, ids=True))
    queue = model[1]
    queue.enqueue(*batch(1, 3))
    for cast in (model.half, model.bfloat16, model.float, model.double, lambda: model.to(torch.float16)):
        cast()
        assert queue.features.dtype == dtype and queue.ids.dtype == torch.int64
    assert content(queue) == [1, 2, 3]
    assert model.to("meta")[1].features.device.type == "meta"


def test_features_take_the_losses_dtype():
    x, keys, queue = torch.randn(4, 3).bfloat16(), torch.randn(4, 3).bfloat16(), ck.FeatureQueue(4, 3)
    queue.enqueue(keys)
    same = ck.FeatureQueue(4, 3, dtype=torch.bfloat16)
    same.enqueue(keys)
    assert torch.equal(*(ck.info_nce(x, keys, 2.0, queue=each) for each in (queue, same)))


def test_an_empty_queue_adds_nothing(backend):
    x, keys = torch.randn(5, 3), torch.randn(5, 3)
    found = ck.info_nce(x, keys, 2.0, queue=ck.FeatureQueue(4, 3), backend=backend, reduction="none")
    assert torch.equal(found, ck.info_nce(x, keys, 2.0, backend=backend, reduction="none"))


def test_state():
    queue = ck.FeatureQueue(5, 3, ids=True)
    queue.enqueue(*batch(0, 7))
    file = io.BytesIO()
    torch.save(queue.state_dict(), file)
    file.seek(0)
    other = ck.FeatureQueue(5, 3, ids=True)
    other.load_state_dict(torch.load(file, weights_only=True))
    for each in (other, copy.deepcopy(queue)):
        each.enqueue(*batch(7, 2))
        assert content(each) == [4, 5, 6, 7, 8]
        assert each.ids.tolist() == [7, 8, 4, 5, 6]


@pytest.mark.parametrize(
    "other, words",
    [
        (ck.FeatureQueue(6, 3, ids=True), r"q\.features: expected the state of a queue of \[5, 3\].*got \[6, 3\]"),
        (ck.FeatureQueue(5, 4, ids=True), r"got \[5, 4\]"),
        (ck.FeatureQueue(5, 3, ids=True, dtype=torch.float64), "got .* of torch.float64"),
        (ck.FeatureQueue(5, 3), r"q\.ids: expected the state of a queue like this, one with ids"),
    ],
)
def test_the_state_of_another_queue_is_refused(other, words):
    model = nn.ModuleDict({"q": ck.FeatureQueue(5, 3, ids=True)})
    model["q"].enqueue(*batch(0, 3))
    other.enqueue(torch.ones(2, other.features.shape[1]), None if other.ids is None else torch.ones(2).long())
    with pytest.raises(RuntimeError, match=words):
        model.load_state_dict({f"q.{name}": value for name, value in other.state_dict().items()})
    assert content(model["q"]) == [0, 1, 2], "nothing of it came in"


@pytest.mark.parametrize(
    "words, features, ids",
    [
        ("ids: expected a tensor, for the queue has ids", torch.ones(2, 3), None),
        ("features: expected 3 of every row; got 4", torch.ones(2, 4), torch.ones(2).long()),
        ("ids: expected ids of shape", torch.ones(2, 3), torch.ones(3).long()),
    ],
)
def test_refusals(words, features, ids):
    with pytest.raises(ValueError, match=words):
        ck.FeatureQueue(5, 3, ids=True).enqueue(features, ids)
    with pytest.raises(ValueError, match="ids: expected None of a queue without ids"):
        ck.FeatureQueue(5, 3).enqueue(*batch(0, 2))


def on_ranks(sizes: list[list[int]]) -> dict[str, Any]:
    """Every rank enqueues what follows the lower ranks' ones."""
    queue, start, rank = ck.FeatureQueue(6, 3, ids=True, group="world", uneven=True), 0, dist.get_rank()
    for step in sizes:
        queue.enqueue(*batch(start + sum(step[:rank]), step[rank]))
        start += sum(step)
    try:
        wrong = ""
        queue.enqueue(torch.ones(1, 3 + rank), torch.ones(1).long())
    except ValueError as error:
        wrong = str(error)
    return {"ids": queue.ids.tolist(), "features": queue.features, "wrong": wrong}


def test_ranks_enqueue_in_their_order(tmp_path):
    found = succeeded(run(2, on_ranks, tmp_path, [[2, 2], [1, 0], [3, 1]]))
    one = ck.FeatureQueue(6, 3, ids=True)
    for start, n in ((0, 4), (4, 1), (5, 4)):
        one.enqueue(*batch(start, n))
    for each in found:
        assert each["ids"] == one.ids.tolist()
        assert torch.equal(each["features"], one.features)
        assert "expected 3 of every row" in each["wrong"]
