"""The memory as a part of a model: casts, moves, copies, loading and growth happen whole or not at all."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import contrastive_kernels as ck
from contrastive_kernels.em import memory as memory_module

KEYS = ["log_mean", "visits", "unvisited", "running"]


@pytest.fixture(params=["in memory", "mapped"])
def memory(request, tmp_path):
    """Three of four samples were met, the first one twice."""
    memory = ck.NormalizerMemory(4, storage=tmp_path / "folder" if request.param == "mapped" else None)
    visit(memory)
    return memory


def visit(memory):
    memory.update(torch.arange(3), torch.arange(6.0).view(3, 2) + 1e4)
    memory.update(torch.tensor([0]), torch.zeros(1, 2))


def state(memory):
    return {name: value.clone() for name, value in memory.state_dict().items()}


def same(memory, other):
    found = memory.state_dict()
    return all(torch.equal(found[name], other[name]) and found[name].dtype == other[name].dtype for name in KEYS)


def in_its_folder(memory):
    """What is stored, as another mapping sees it."""
    if memory.storage is None:
        return True
    view = ck.NormalizerMemory.open(memory.storage, read_only=True)
    return torch.equal(view.log_mean, memory.log_mean) and torch.equal(view.visits, memory.visits)


def still_works(memory, before):
    """Nothing changed, and updates still reach what is stored."""
    assert same(memory, before) and in_its_folder(memory)
    memory.update(torch.tensor([3]), torch.full((1, 2), 2e4))
    assert (memory.log_mean[3] > 1e4).all() and torch.equal(memory.visits[3], before["visits"][3] + 1)
    assert in_its_folder(memory)


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.double(),
        lambda m: m.float(),
        lambda m: m.to(torch.float16),
        lambda m: m.to("cpu", torch.bfloat16),
        lambda m: m.type(torch.float16),
        lambda m: m.to(torch.empty(0, dtype=torch.float16)),
        lambda m: m.cpu(),
        lambda m: m.share_memory(),
        lambda m: m.to_empty(device="cpu"),
        lambda m: m.requires_grad_(False).eval(),
    ],
)
def test_a_model_s_casts_leave_the_memory_alone(memory, cast):
    model = nn.Sequential(nn.Linear(2, 2), memory)
    before = state(memory)
    cast(model)
    still_works(memory, before)
    if memory.storage is None:
        memory.grow(6)
    assert memory.log_mean.dtype == torch.float64 and memory.visits.dtype == torch.int32


def test_shared_memory_is_shared():
    memory = ck.NormalizerMemory(4)
    visit(memory)
    assert not memory.log_mean.is_shared()
    before = state(memory)
    memory.share_memory()
    assert memory.log_mean.is_shared() and memory.visits.is_shared()
    still_works(memory, before)


def test_a_mapped_memory_does_not_leave_its_folder(tmp_path):
    memory = ck.NormalizerMemory(4, storage=tmp_path)
    visit(memory)
    before = state(memory)
    with pytest.raises(RuntimeError, match="deepcopy"):
        nn.Sequential(memory).to("meta")
    still_works(memory, before)
    copy.deepcopy(memory).to("meta")


def test_the_meta_device():
    memory = ck.NormalizerMemory(4, device="meta")
    with pytest.raises(NotImplementedError, match="to_empty"):
        memory.to("cpu")
    memory.to_empty(device="cpu")  # a new memory, not what happens to lie there
    assert same(memory, ck.NormalizerMemory(4).state_dict()) and memory.cold
    source = ck.NormalizerMemory(4)
    visit(source)
    other = ck.NormalizerMemory(4, device="meta")
    with pytest.raises(RuntimeError, match="assign=True"):
        other.load_state_dict(source.state_dict())
    other.load_state_dict(source.state_dict(), assign=True)
    before = state(source)
    still_works(other, before)
    assert same(source, before)
    with pytest.raises(RuntimeError, match="meta tensor; no data"):
        source.load_state_dict(ck.NormalizerMemory(4, device="meta").state_dict())
    still_works(source, before)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), copy.copy])
def test_a_copy_of_a_mapped_memory_lies_in_memory(tmp_path, how):
    memory = ck.NormalizerMemory(4, storage=tmp_path)
    visit(memory)
    before = state(memory)
    other = how(nn.ModuleList([memory]))[0] if how is not copy.copy else how(memory)
    assert other.storage is None and same(other, before)
    other.update(torch.arange(4), torch.zeros(4, 2))
    other.grow(6)
    other.half().to("meta")
    still_works(memory, before)
    memory.grow(6)
    assert memory.storage == tmp_path and in_its_folder(memory)


def test_copies_know_whether_they_are_cold():
    memory = ck.NormalizerMemory(3)
    memory.update(torch.arange(3), torch.zeros(3, 2))
    for other in (copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
        assert not other.cold
        other.grow(5)
        assert other.cold and not memory.cold


@pytest.mark.parametrize("assign", [False, True])
def test_loading_copies_into_what_is_there(memory, assign):
    source = ck.NormalizerMemory(4)
    source.update(torch.arange(4), torch.randn(4, 2))
    table = memory.log_mean
    memory.load_state_dict(source.state_dict(), assign=assign)
    assert memory.log_mean is table and not memory.cold
    still_works(memory, state(source))
    assert (source.visits == 1).all()
    own = state(memory)
    memory.load_state_dict(memory.state_dict(), assign=assign)
    assert same(memory, own)
    if memory.storage is not None:  # the same file, mapped twice
        view = ck.NormalizerMemory.open(memory.storage, read_only=True)
        loaded = {**memory.state_dict(), **{name: view.state_dict()[name] for name in ("log_mean", "visits")}}
        memory.load_state_dict(loaded)
        assert same(memory, own)


def test_states_of_float32_still_load(memory):
    """As 0.1.0 wrote them; what never was met is counted anew."""
    old = {
        "log_mean": torch.tensor([[1.5, 0.0], [2.5, 3.5], [0.0, 0.0], [0.1, 7.0]]),
        "visits": torch.tensor([[1, 0], [2, 3], [0, 0], [1, 4]], dtype=torch.int32),
        "unvisited": torch.tensor([9, 9]),
        "running": torch.zeros(2, 6),
    }
    nn.ModuleDict({"memory": memory}).load_state_dict({f"memory.{name}": value for name, value in old.items()})
    assert torch.equal(memory.log_mean, old["log_mean"].double()) and memory.log_mean.dtype == torch.float64
    assert torch.equal(memory.visits, old["visits"]) and memory.unvisited.tolist() == [1, 2]
    assert in_its_folder(memory)


def test_pickles_of_buffers_still_load():
    """A module of 0.1.0, whose tensors were buffers."""
    memory = ck.NormalizerMemory(4)
    visit(memory)
    before = state(memory)
    old = memory.__getstate__()
    old["_buffers"] = {name: old.pop(name) for name in KEYS}
    old["_buffers"]["log_mean"] = old["_buffers"]["log_mean"].float()
    del old["_folder"]
    old["storage"] = None
    other = ck.NormalizerMemory.__new__(ck.NormalizerMemory)
    other.__setstate__(old)
    assert not list(other.buffers())
    still_works(other, {**before, "log_mean": before["log_mean"].float().double()})


def spoilt(**changes):
    def change(loaded):
        return {**loaded, **changes}

    return change


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda _: ck.NormalizerMemory(5).state_dict(), "size mismatch"),
        (lambda _: ck.NormalizerMemory(4, 1).state_dict(), "size mismatch"),
        (spoilt(running=torch.zeros(2, 5)), "size mismatch for running"),
        (spoilt(visits=torch.ones(4, 1, dtype=torch.int32)), "size mismatch for visits"),
        (spoilt(visits=torch.ones(4, 2)), "visits: expected torch.int32"),
        (spoilt(log_mean=torch.ones(4, 2, dtype=torch.int64)), "log_mean: expected torch.float64"),
        (spoilt(log_mean=torch.ones(4, 2, dtype=torch.complex64)), "log_mean: expected torch.float64"),
        (spoilt(log_mean=None), "log_mean: expected a tensor"),
        (spoilt(log_mean=torch.tensor([[0.0, 0], [0, torch.nan], [0, 0], [0, 0]])), "finite log means.*of sample 1"),
        (spoilt(visits=torch.tensor([[0, 0], [0, 0], [0, -1], [0, 0]])), "negative visits.*of sample 2"),
        (spoilt(running=torch.full((2, 6), torch.nan)), "running: expected finite"),
        (lambda loaded: {"log_mean": loaded["log_mean"]}, "expected all of"),
        (lambda loaded: {**loaded, "more": torch.zeros(1)}, "Unexpected key"),
        (lambda loaded: {}, "Missing key"),
    ],
)
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_that_does_not_fit_changes_nothing(memory, change, match, assign):
    before = state(memory)
    source = ck.NormalizerMemory(4)
    source.update(torch.arange(4), torch.randn(4, 2))
    with pytest.raises(RuntimeError, match=match):
        memory.load_state_dict(change(source.state_dict()), assign=assign)
    if match != "Unexpected key":
        still_works(memory, before)
    else:  # as of any module: what is known was loaded
        assert same(memory, source.state_dict())


def test_a_part_of_a_state_is_not_loaded_either_where_keys_may_be_missing(memory):
    before = state(memory)
    with pytest.raises(RuntimeError, match="expected all of"):
        memory.load_state_dict({"visits": torch.ones(4, 2, dtype=torch.int32)}, strict=False)
    assert memory.load_state_dict({}, strict=False).missing_keys == KEYS
    still_works(memory, before)


def failing(monkeypatch, owner, name, number):
    """The call of that number of a function runs out of memory."""
    real, calls = getattr(owner, name), []

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            raise torch.OutOfMemoryError("no memory")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, fail)


@pytest.mark.parametrize("number", [1, 2])
def test_growth_without_memory_changes_nothing(monkeypatch, number):
    memory = ck.NormalizerMemory(4)
    visit(memory)
    before = state(memory)
    with monkeypatch.context() as patch:
        failing(patch, torch, "cat", number)
        with pytest.raises(RuntimeError, match="no memory"):
            memory.grow(6)
    assert memory.num_samples == 4
    still_works(memory, before)


@pytest.mark.parametrize("name", ["observe", "last_of_each"])
def test_an_update_that_fails_changes_nothing(memory, monkeypatch, name):
    before = state(memory)
    with monkeypatch.context() as patch:
        failing(patch, memory_module, name, 1)
        with pytest.raises(RuntimeError, match="no memory"):
            memory.update(torch.arange(4), torch.zeros(4, 2))
    still_works(memory, before)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_move_that_fails_changes_nothing(monkeypatch, number):
    memory = ck.NormalizerMemory(4)
    visit(memory)
    before = state(memory)
    with monkeypatch.context() as patch:
        failing(patch, torch.Tensor, "share_memory_", number + 1)  # the first one is the probe
        with pytest.raises(RuntimeError, match="no memory"):
            memory.share_memory()
    still_works(memory, before)


@pytest.mark.parametrize("place", ["in memory", "mapped"])
def test_inference_mode_leaves_a_memory_that_can_be_updated(tmp_path, place):
    storage = tmp_path / "folder" if place == "mapped" else None
    with torch.inference_mode():
        memory = ck.NormalizerMemory(3, storage=storage)
        memory.update(torch.arange(3), torch.zeros(3, 2))
        memory.grow(4)
        memory.to("cpu").share_memory()
    memory.update(torch.arange(4), torch.ones(4, 2))
    with torch.inference_mode():
        memory.load_state_dict({name: value.clone() for name, value in memory.state_dict().items()})
        copied = copy.deepcopy(memory)
    for one in (memory, copied):
        one.update(torch.arange(4), torch.ones(4, 2))
        assert one.visits[:, 0].tolist() == [3, 3, 3, 2] and not one.cold and not one.log_mean.is_inference()


def test_distributed_data_parallel_does_not_see_the_memory(tmp_path):
    """It makes every process's parameters and buffers those of rank 0."""
    memory = ck.NormalizerMemory(4)
    visit(memory)
    before = state(memory)
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "memory": memory})
    assert not list(memory.named_buffers()) and not list(memory.named_parameters())
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model, init_sync=True)
        assert wrapped.modules_buffers == []
        assert [key for key in wrapped.state_dict() if "memory" in key] == [f"module.memory.{key}" for key in KEYS]
        still_works(memory, before)
    finally:
        torch.distributed.destroy_process_group()


def test_the_former_name_is_the_class():
    assert ck.DecomposableContrastiveLoss is ck.DatasetContrastiveLoss
    assert ck.em.DecomposableContrastiveLoss is ck.em.DatasetContrastiveLoss
    assert {"DecomposableContrastiveLoss", "DatasetContrastiveLoss"} <= {*ck.__all__} & {*ck.em.__all__}
