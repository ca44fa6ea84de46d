"""One step of training on several ranks is one step of a single process, under the wrappers that people use."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from launch import run, succeeded
from torch import Tensor, nn
from torch import distributed as dist

import contrastive_kernels as ck

D, WIDTH = 6, 8


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(D, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        self.text = nn.Linear(D, WIDTH)
        # (one element each: fully_shard has no parameters without dimensions)
        self.log_scale, self.bias = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([-2.0]))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        return self.image(image), self.text(text), self.log_scale.exp(), self.bias.clone()


def towers(frozen: bool) -> Towers:
    torch.manual_seed(0)
    model = Towers().double()
    model.text.requires_grad_(not frozen)
    return model


def batch(n: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(n)
    return tuple(torch.randn(n, D, generator=g, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


LOSSES: dict[str, Any] = {
    "clip": lambda **over: ck.ClipLoss(normalize=True, **over),
    "sigmoid": lambda **over: ck.SigmoidLoss(normalize=True, **over),
    "nt_xent": lambda **over: ck.NTXentLoss(**over),
}


def value(loss: nn.Module, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    if isinstance(loss, ck.NTXentLoss):
        return loss(x, y, scale) + 0 * bias.sum()
    return loss(x, y, scale, bias)


def step(model: nn.Module, loss: nn.Module, image: Tensor, text: Tensor) -> Tensor:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    found = value(loss, *model(image, text))
    found.backward()
    optimizer.step()
    return found.detach()


def parameters(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def single(name: str, n: int, frozen: bool) -> tuple[Tensor, list[Tensor]]:
    model = towers(frozen)
    found = step(model, LOSSES[name](group=False), *batch(n))
    return found, parameters(model)


def own(sizes: list[int]) -> tuple[Tensor, Tensor]:
    rank = dist.get_rank()
    i = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    image, text = batch(sum(sizes))
    return image[i], text[i]


def by_ddp(name: str, sizes: list[int], frozen: bool, strategy: str) -> tuple[Tensor, list[Tensor]]:
    model = nn.parallel.DistributedDataParallel(towers(frozen))
    found = step(model, LOSSES[name](uneven=True, strategy=strategy), *own(sizes))
    return found, parameters(model.module)


@pytest.mark.parametrize("sizes", [[4, 4], [5, 2, 3]], ids=str)
@pytest.mark.parametrize(
    "name, frozen, strategy",
    [("clip", False, "grid"), ("clip", True, "ring"), ("sigmoid", False, "ring"), ("nt_xent", False, "grid")],
)
def test_distributed_data_parallel(name, frozen, strategy, sizes, tmp_path):
    wanted = single(name, sum(sizes), frozen)
    for found in succeeded(run(len(sizes), by_ddp, tmp_path, name, sizes, frozen, strategy)):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


def by_fsdp(name: str, sizes: list[int]) -> tuple[Tensor, list[Tensor]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = towers(False)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (model.image, model.text, model):
        fully_shard(part, mesh=mesh)
    found = step(model, LOSSES[name](uneven=True), *own(sizes))
    return found, [p.full_tensor().clone() for p in model.parameters()]


def test_fully_sharded(tmp_path):

    wanted = single("clip", 8, False)
    for found in succeeded(run(2, by_fsdp, tmp_path, "clip", [4, 4])):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


def by_accelerate(sizes: list[int]) -> tuple[Tensor, list[Tensor]]:
    from accelerate import Accelerator

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # (it asks, and joins the group that is there)
    accelerator = Accelerator(cpu=True)
    model = towers(False)
    prepared = accelerator.prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    found = value(LOSSES["clip"](uneven=True), *prepared(*own(sizes)))
    accelerator.backward(found)
    optimizer.step()
    return found.detach(), parameters(accelerator.unwrap_model(prepared))


def test_accelerate(tmp_path):
    pytest.importorskip("accelerate")
    wanted = single("clip", 8, False)
    for found in succeeded(run(2, by_accelerate, tmp_path, [4, 4])):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


def compiled(sizes: list[int]) -> tuple[Tensor, list[Tensor]]:
    """The model compiled by itself, and with the loss."""
    model, loss = towers(False), LOSSES["clip"](uneven=True)
    wrapped = nn.parallel.DistributedDataParallel(torch.compile(model, backend="aot_eager"))

    @torch.compile(backend="aot_eager")
    def whole(image: Tensor, text: Tensor) -> Tensor:
        return value(loss, *wrapped(image, text))

    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    found = whole(*own(sizes))
    found.backward()
    optimizer.step()
    return found.detach(), parameters(model)


def test_compiled(tmp_path):
    wanted = single("clip", 8, False)
    for found in succeeded(run(2, compiled, tmp_path, [5, 3], seconds=120)):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


def accumulated(sizes: list[int]) -> Tensor:
    """Two micro-batches, the first one without a reduction of gradients, as gradient accumulation does."""
    model = nn.parallel.DistributedDataParallel(towers(False))
    loss = LOSSES["clip"]()
    image, text = own(sizes)
    half = len(image) // 2
    with model.no_sync():
        value(loss, *model(image[:half], text[:half])).backward()
    value(loss, *model(image[half:], text[half:])).backward()
    return torch.cat([p.grad.reshape(-1) for p in model.parameters()])


def test_gradient_accumulation(tmp_path):
    """The sum of both micro-batches' gradients, each over all ranks."""
    model, loss = towers(False), LOSSES["clip"](group=False)
    image, text = batch(8)
    for part in ([0, 1, 4, 5], [2, 3, 6, 7]):
        value(loss, *model(image[part], text[part])).backward()
    wanted = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    for found in succeeded(run(2, accumulated, tmp_path, [4, 4])):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


def on_one_rank_alone() -> float | None:
    """Evaluation on rank 0 with group=False, while the others are elsewhere."""
    if dist.get_rank():
        return 0.0
    return LOSSES["clip"](group=False)(torch.eye(4), torch.eye(4), 5.0).item()


def test_evaluation_on_one_rank(tmp_path):
    first, _ = succeeded(run(2, on_one_rank_alone, tmp_path))
    assert first == pytest.approx(ck.clip_loss(torch.eye(4), torch.eye(4), 5.0).item())


def with_higher_derivatives() -> list[str]:
    """A penalty on gradients, beside the loss, which alone would have left it out without a word."""
    said = []
    for loss in (ck.clip_loss, ck.feature_separation, ck.geometric_consistency):
        x, y = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
        more: tuple[Any, ...] = ()
        if loss is not ck.geometric_consistency:
            more = (2.0,) if loss is ck.clip_loss else (x, y, None, None, 2.0)
        value = loss(x, y, *more, group="world")
        with pytest.raises(RuntimeError, match="second derivatives") as caught:
            (g,) = torch.autograd.grad(value, x, create_graph=True)
            (value + g.square().sum()).backward()
        said.append(str(caught.value))
    return said


def test_second_derivatives_are_refused_where_they_are_asked_for(tmp_path):
    assert all(len(found) == 3 for found in succeeded(run(2, with_higher_derivatives, tmp_path)))


def deep_copy() -> bool:
    copy.deepcopy(ck.ClipLoss())
    return True


def test_modules_can_be_copied_in_a_group(tmp_path):
    assert succeeded(run(2, deep_copy, tmp_path)) == [True, True]
