"""The loss over a data set on several ranks: every one has the table of one process, whatever samples it is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from launch import Failure, run, succeeded
from torch import Tensor
from torch import distributed as dist

import contrastive_kernels as ck

SAMPLES, D, STEPS = 20, 6, 4

OPTIONS: dict[str, dict[str, Any]] = {
    "stored": {},
    "updated": {"weights": "updated", "max_ratio": 3.0},
    "skip": {"first_visit": "skip", "negatives": "batch"},
    "safeguard": {"safeguard": 0.5, "include_positive": False, "reduction": "sum"},
    "batch": {"weights": "batch", "directions": 1},
}


def batch(step: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features that drift, and samples that occur twice, on two ranks too."""
    g = torch.Generator().manual_seed(step)
    x, y = (torch.randn(n, D, generator=g, dtype=torch.float64) for _ in range(2))
    return x, y, torch.randint(SAMPLES, (n,), generator=g)


def train(sizes: list[int], rank: int | None, **options: Any) -> dict[str, Any]:
    """Some steps, of all rows or of one rank's: values, gradients, and what the memory holds."""
    loss = ck.DatasetContrastiveLoss(SAMPLES, floor=0.1, **options)
    found: list[Tensor] = []
    for step in range(STEPS):
        x, y, index = batch(step, sum(sizes))
        i = slice(0, sum(sizes)) if rank is None else slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        x, y = x[i].requires_grad_(), y[i].requires_grad_()
        direction = 0 if loss.memory.directions == 1 else None
        value = loss(x, y, index[i], torch.tensor(2.0, dtype=torch.float64), direction=direction)
        value.backward()
        found += [value.detach(), x.grad, y.grad]
    state = {name: v.clone() for name, v in loss.memory.state_dict().items()}
    return {"steps": found, "state": state, "statistics": loss.memory.statistics()}


def on_ranks(sizes: list[int], options: dict[str, Any]) -> dict[str, Any]:
    return train(sizes, dist.get_rank(), gradients="sum", uneven=True, **options)


@pytest.mark.parametrize("sizes", [[4, 4], [5, 0, 4]], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_the_same_training(name, sizes, tmp_path):
    wanted = train(sizes, None, **OPTIONS[name])
    found = succeeded(run(len(sizes), on_ranks, tmp_path, sizes, OPTIONS[name]))
    for one in found:
        for key, value in wanted["state"].items():
            torch.testing.assert_close(one["state"][key], value, rtol=1e-10, atol=1e-12)
            assert torch.equal(one["state"][key], found[0]["state"][key]), f"{key} is not the same on all ranks"
        assert one["statistics"].visited == wanted["statistics"].visited
    for step in range(STEPS):
        value, dx, dy = wanted["steps"][3 * step : 3 * step + 3]
        parts = [one["steps"][3 * step : 3 * step + 3] for one in found]
        for part in parts:
            torch.testing.assert_close(part[0], value, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(torch.cat([part[1] for part in parts]), dx, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(torch.cat([part[2] for part in parts]), dy, rtol=1e-9, atol=1e-11)


def test_one_rank_writes_a_folder(tmp_path):
    """All others map it; a later program of another number of ranks, or of one, takes it up again."""
    (tmp_path / "2").mkdir()
    (tmp_path / "3").mkdir()
    options = {"storage": str(tmp_path / "memory")}
    wanted = train([4, 3], None)
    found = succeeded(run(2, on_ranks, tmp_path / "2", [4, 3], options))
    for one in found:
        torch.testing.assert_close(one["state"]["log_mean"], wanted["state"]["log_mean"], rtol=1e-10, atol=1e-12)
    with ck.NormalizerMemory.open(tmp_path / "memory") as memory:
        assert torch.equal(memory.visits, wanted["state"]["visits"])
    again = succeeded(run(3, on_ranks, tmp_path / "3", [2, 2, 3], options))
    assert all(torch.equal(one["state"]["visits"], again[0]["state"]["visits"]) for one in again)
    assert (again[0]["state"]["visits"] >= wanted["state"]["visits"]).all()


def open_beside(folder: str) -> bool:
    ck.NormalizerMemory(SAMPLES, storage=folder)
    return True


def test_a_folder_of_another_program_is_refused_on_every_rank(tmp_path):
    with ck.NormalizerMemory(SAMPLES, storage=tmp_path / "memory"):
        for one in run(2, open_beside, tmp_path, str(tmp_path / "memory")):
            assert isinstance(one, Failure) and one.kind == "BlockingIOError"


def wrapped(folder: str) -> dict[str, Tensor]:
    """A model that holds the loss, under DistributedDataParallel, which makes all buffers rank 0's."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower, self.loss = torch.nn.Linear(D, D), ck.DatasetContrastiveLoss(SAMPLES)

        def forward(self, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
            return self.loss(self.tower(x), self.tower(y), index, 2.0)

    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(Model())
    for step in range(STEPS):
        x, y, index = batch(step, 6)
        i = slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3)
        model(x[i].float(), y[i].float(), index[i]).backward()
    met = torch.cat([batch(step, 6)[2].unique() for step in range(STEPS)])
    return {"visits": model.module.loss.memory.visits, "met": met}


def test_no_visit_is_lost_under_distributed_data_parallel(tmp_path):
    for one in succeeded(run(2, wrapped, Path(tmp_path), "")):
        assert torch.equal(one["visits"][:, 0], torch.bincount(one["met"], minlength=SAMPLES).int())


def load(state: dict[str, Tensor]) -> Tensor:
    memory = ck.NormalizerMemory(SAMPLES)
    memory.load_state_dict(state)
    return memory.read(torch.arange(SAMPLES))[0]


def test_checkpoints_of_two_ranks_load_on_three(tmp_path):
    (tmp_path / "2").mkdir()
    (tmp_path / "3").mkdir()
    state = succeeded(run(2, on_ranks, tmp_path / "2", [4, 3], {}))[1]["state"]
    for one in succeeded(run(3, load, tmp_path / "3", state)):
        assert torch.equal(one, state["log_mean"])


def changed(folder: str | None, sizes: list[int]) -> list[dict[str, Tensor]]:
    """What a memory holds after it was loaded, scaled, grown and updated; in a folder, over the ranks."""
    memory = ck.NormalizerMemory(SAMPLES, step=0.5, storage=folder)
    rank = dist.get_rank() if sizes else 0
    found: list[dict[str, Tensor]] = []

    def visit(seed: int) -> None:
        _, _, index = batch(seed, 7)
        values = torch.randn(7, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1])) if sizes else slice(None)
        memory.update((index + memory.num_samples - SAMPLES)[own], values[own])
        found.append({name: v.clone() for name, v in memory.state_dict().items()})

    visit(0)
    kept = found[-1]
    memory.rescale(1.5)
    visit(1)
    memory.load_state_dict(kept)
    visit(2)
    memory.grow(SAMPLES + 5)
    memory.grow(SAMPLES + 5)
    visit(3)
    assert memory.statistics().samples == SAMPLES + 5
    return found


@pytest.mark.parametrize("sizes", [[4, 3], [3, 0, 4]], ids=str)
def test_a_folder_is_loaded_scaled_and_grown_on_all_ranks(sizes, tmp_path):
    """One of them writes, the others map what it has written."""
    wanted = changed(None, [])
    for found in succeeded(run(len(sizes), changed, tmp_path, str(tmp_path / "memory"), sizes)):
        for one, other in zip(found, wanted, strict=True):
            for name, value in other.items():
                torch.testing.assert_close(one[name], value, rtol=1e-12, atol=1e-12)
    with ck.NormalizerMemory.open(tmp_path / "memory") as memory:
        assert memory.num_samples == SAMPLES + 5 and torch.equal(memory.visits, wanted[-1]["visits"])


def wrongly_changed(folder: str) -> list[str]:
    """What one rank does otherwise, and a writer that has no room."""
    memory, rank, said = ck.NormalizerMemory(SAMPLES, storage=folder), dist.get_rank(), []
    state = {name: v.clone() for name, v in memory.state_dict().items()}
    short = {**state, "visits": state["visits"][: SAMPLES - rank]}
    for mistake, error in (
        (lambda: memory.rescale(1.0 + rank), ValueError),
        (lambda: memory.rescale(1.0 - 2 * rank), ValueError),
        (lambda: memory.grow(SAMPLES + 1 + rank), ValueError),
        (lambda: memory.grow(SAMPLES - rank), ValueError),
        (lambda: memory.load_state_dict(short), RuntimeError),
        (lambda: memory.grow(2**62), (OSError, ValueError)),
    ):
        with pytest.raises(error) as caught:  # type: ignore[arg-type]
            mistake()
        said.append(str(caught.value))
    memory.grow(SAMPLES + 1)
    memory.update(torch.tensor([SAMPLES]), torch.zeros(1, 2, dtype=torch.float64))
    return [*said[:5], str(memory.visits[SAMPLES].tolist())]


def test_what_one_rank_cannot_change_stays_on_all(tmp_path):
    one, other = succeeded(run(2, wrongly_changed, tmp_path, str(tmp_path / "memory")))
    assert one == other and one[-1] == "[1, 1]"


def opened(folder: str) -> tuple[int, bool]:
    """By all ranks together, and by the first one alone, beside the others."""
    with ck.NormalizerMemory.open(folder, group="world") as memory:
        memory.update(torch.tensor([3]), torch.zeros(1, 2, dtype=torch.float64))
        visits = int(memory.visits[3, 0])
        dist.barrier()
    dist.barrier()
    if dist.get_rank() == 0:
        with ck.NormalizerMemory.open(folder, group=None) as memory:
            memory.update(torch.tensor([4]), torch.zeros(1, 2, dtype=torch.float64))
    dist.barrier()
    with ck.NormalizerMemory.open(folder, read_only=True) as memory:
        return visits, bool(memory.visits[4, 0] == 1)


def test_a_folder_is_opened_by_a_group(tmp_path):
    ck.NormalizerMemory(SAMPLES, storage=tmp_path / "memory").close()
    assert succeeded(run(2, opened, tmp_path, str(tmp_path / "memory"))) == [(1, True)] * 2
