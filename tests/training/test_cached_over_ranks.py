"""On several ranks: a step in chunks under the wrappers that reduce gradients is the plain step of one process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from launch import run, succeeded
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import contrastive_kernels as ck

D = 5


class Towers(nn.Module):
    """One module with both towers and the scale, which only the loss uses."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, 8))
        self.text = nn.Linear(D, 8)
        self.log_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> Tensor:
        return self.image(image) if text is None else self.text(text)


def towers() -> Towers:
    torch.manual_seed(0)
    return Towers().double()


def batch(n: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(n)
    return torch.randn(n, D, generator=g).double(), torch.randn(n, D, generator=g).double()


def loss_of(model: Towers, **over: Any) -> Callable[[Tensor, Tensor], Tensor]:
    clip = ck.ClipLoss(normalize=True, **over)
    return lambda x, y: clip(x, y, model.log_scale.exp())


def single(n: int) -> list[Tensor]:
    model = towers()
    x, y = batch(n)
    loss_of(model)(model.image(x), model.text(y)).backward()
    return [p.grad for p in model.parameters()]


def own(sizes: list[int]) -> tuple[Tensor, Tensor]:
    rank = dist.get_rank()
    i = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    x, y = batch(sum(sizes))
    return x[i], y[i]


@contextmanager
def counted_reductions(wrapped: DistributedDataParallel) -> Any:
    """How often a bucket is reduced."""
    counts = [0]

    def hook(state, bucket):
        counts[0] += 1
        shared = bucket.buffer().clone()
        dist.all_reduce(shared)
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(shared / dist.get_world_size())
        return future

    wrapped.register_comm_hook(None, hook)
    yield counts


def by_ddp(sizes: list[int], size: int, way: str) -> tuple[list[Tensor], int]:
    model = towers()
    wrapped = DistributedDataParallel(model)
    encoders = (lambda v: wrapped(image=v), lambda v: wrapped(text=v))
    with counted_reductions(wrapped) as counts:
        over = {"chunk_size": size, "no_sync": wrapped.no_sync}
        if way == "step":
            ck.cached_step(encoders, own(sizes), loss_of(model, uneven=True), **over)
        else:
            ck.cached_loss(encoders, own(sizes), loss_of(model, uneven=True), **over).backward()
    return [p.grad for p in model.parameters()], counts[0]


@pytest.mark.parametrize("way", ["step", "loss"])
@pytest.mark.parametrize("sizes, size", [([6, 6], 2), ([7, 3], 2), ([2, 5, 4], 8)], ids=str)
def test_distributed_data_parallel(sizes, size, way, tmp_path):
    """Uneven shards of different numbers of chunks, and gradients that are reduced once."""
    wanted = single(sum(sizes))
    for found, reductions in succeeded(run(len(sizes), by_ddp, tmp_path, sizes, size, way)):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)
        assert reductions == 1


def by_two_wrappers(sizes: list[int]) -> list[Tensor]:
    """Each tower has a wrapper, which is found, and the scale has none."""
    model = towers()
    encoders = [DistributedDataParallel(tower) for tower in (model.image, model.text)]
    ck.cached_step(encoders, own(sizes), loss_of(model), chunk_size=2)
    dist.all_reduce(model.log_scale.grad)
    model.log_scale.grad /= dist.get_world_size()
    return [p.grad for p in model.parameters()]


def test_a_wrapper_for_each_tower(tmp_path):
    wanted = single(10)
    for found in succeeded(run(2, by_two_wrappers, tmp_path, [5, 5])):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


def by_ddp_that_searches(sizes: list[int], size: int) -> list[Tensor]:
    """It looks for unused parameters, of which each forward pass of one tower has some."""
    model = towers()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    encoders = (lambda v: wrapped(image=v), lambda v: wrapped(text=v))
    loss = loss_of(model, uneven=True)
    ck.cached_step(encoders, own(sizes), loss, chunk_size=size, no_sync=wrapped.no_sync)
    return [p.grad for p in model.parameters()]


def by_fsdp(sizes: list[int], size: int, each_chunk: bool) -> list[Tensor]:
    """Layers and the rest in shards; gradients reduced with each chunk, or once."""
    model, mesh = towers(), init_device_mesh("cpu", (dist.get_world_size(),))
    model.log_scale = nn.Parameter(model.log_scale.detach()[None])  # it has no parameters without dimensions
    fully_shard(model.image[0], mesh=mesh)
    fully_shard(model, mesh=mesh)

    @contextmanager
    def no_sync() -> Any:
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)

    encoders = (lambda v: model(image=v), lambda v: model(text=v))
    over = {} if each_chunk else {"no_sync": no_sync}
    ck.cached_step(encoders, own(sizes), loss_of(model, uneven=True), chunk_size=size, **over)
    sharded = [p.grad for p in model.parameters()]
    assert all(g._local_tensor.numel() < g.numel() for g in sharded if len(g) > 1)
    return [g.full_tensor().reshape(p.shape) for g, p in zip(sharded, towers().parameters())]


def by_other_wrappers(sizes: list[int], size: int) -> dict[str, list[Tensor]]:
    """All in one group of processes."""
    return {
        "DDP that searches": by_ddp_that_searches(sizes, size),
        "FSDP": by_fsdp(sizes, size, True),
        "FSDP with no_sync": by_fsdp(sizes, size, False),
    }


def test_unused_parameters_and_shards(tmp_path):
    """Uneven shards of as many chunks each."""
    wanted = single(11)
    for found in succeeded(run(2, by_other_wrappers, tmp_path, [6, 5], 2)):
        for name, gradients in found.items():
            torch.testing.assert_close(
                gradients, wanted, rtol=1e-12, atol=1e-13, msg=lambda text, n=name: f"{n}: {text}"
            )


def accumulated(sizes: list[int]) -> list[Tensor]:
    """Two steps of which the first one is not reduced, as the caller's own no_sync says."""
    model = towers()
    wrapped = DistributedDataParallel(model)
    encoders = (lambda v: wrapped(image=v), lambda v: wrapped(text=v))
    over = {"chunk_size": 2, "no_sync": wrapped.no_sync}
    with wrapped.no_sync():
        ck.cached_step(encoders, own(sizes), loss_of(model), **over)
    alone = model.text.weight.grad.clone()
    ck.cached_step(encoders, own(sizes), loss_of(model), **over)
    return [alone, *[p.grad for p in model.parameters()]]


def test_accumulation_of_several_steps(tmp_path):
    wanted = [2 * g for g in single(8)]
    (alone, *one), (other_alone, *other) = succeeded(run(2, accumulated, tmp_path, [4, 4]))
    for found in (one, other):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)
    assert not torch.allclose(alone, other_alone), "nothing was reduced within no_sync"


def twice() -> bool:
    """A step, and another one: the wrapper has finished with the first."""
    model = towers()
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    encoders = (lambda v: wrapped(image=v), lambda v: wrapped(text=v))
    for _ in range(3):
        optimizer.zero_grad()
        ck.cached_step(encoders, own([5, 4]), loss_of(model, uneven=True), chunk_size=2, no_sync=wrapped.no_sync)
        optimizer.step()
    every = [torch.empty_like(model.log_scale) for _ in range(2)]
    dist.all_gather(every, model.log_scale.detach())
    return bool(every[0] == every[1])


def test_several_steps(tmp_path):
    assert succeeded(run(2, twice, tmp_path)) == [True, True]
