"""Processes that torchrun starts train as one: each has its share of every batch, the first one speaks and writes."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from files import Mistake
from rich.console import Console
from torch import Tensor, distributed, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

__all__ = ["BatchNorm1d", "BatchNorm2d", "console", "count", "data_parallel", "from_first", "joined", "number",
           "one_speaks"]  # fmt: skip

T = TypeVar("T")


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def number() -> int:
    """Which of the processes this one is: 0 is the first."""
    return distributed.get_rank() if _several() else 0


def count() -> int:
    """How many there are."""
    return distributed.get_world_size() if _several() else 1


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Makes a group of the processes that torchrun started; without torchrun this one is alone.

    A mistake that all of them meet is told by one.
    """
    if not (distributed.is_available() and distributed.is_torchelastic_launched()):
        yield
        return
    store, own, processes = next(rendezvous("env://"))
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(distributed.get_node_local_rank())
    distributed.init_process_group(backend, store=store, rank=own, world_size=processes)
    try:
        yield
    except (Mistake, OSError):
        if store.add("mistakes", 1) > 1:
            raise SystemExit(1) from None
        raise
    finally:
        distributed.destroy_process_group()


def console() -> Console:
    """Where the first process prints, and the others do not."""
    return Console(quiet=number() > 0)


@contextlib.contextmanager
def one_speaks() -> Iterator[None]:
    """What several processes would print alike, such as the usage, is printed by the first."""
    with contextlib.ExitStack() as silent:
        if number() > 0:
            silent.enter_context(contextlib.redirect_stdout(io.StringIO()))
            silent.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield


def from_first(make: Callable[[], T]) -> T:
    """What the first process makes; the others wait for it."""
    found: list[Any] = [make() if number() == 0 else None]
    if count() > 1:
        distributed.broadcast_object_list(found)
    made: T = found[0]
    return made


def data_parallel(module: nn.Module) -> nn.Module:
    """The module, its gradients averaged over the processes in the backward pass."""
    return DistributedDataParallel(module) if count() > 1 else module


# Batch normalisation


class _Sum(torch.autograd.Function):
    """The sum over processes."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        total = own.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return _Sum.apply(upstream)


class _OverProcesses(nn.modules.batchnorm._BatchNorm):
    """In training, mean and variance of all processes' rows. (torch's SyncBatchNorm needs a GPU.)"""

    def forward(self, input: Tensor) -> Tensor:
        """Normalises [N, C, ...]; shares of a batch may differ in N."""
        if not self.training or count() == 1:
            return super().forward(input)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        dims, shape = [0, *range(2, input.ndim)], [1, -1, *[1] * (input.ndim - 2)]
        rows = input.new_full((1,), input.numel() / input.shape[1])
        total: Tensor = _Sum.apply(torch.cat([input.sum(dims), rows]))
        mean, n = total[:-1] / total[-1], total[-1].detach()
        variance: Tensor = _Sum.apply((input - mean.view(shape)).square().sum(dims)) / n
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (n / (n - 1)), self.momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        gain = self.weight * torch.rsqrt(variance + self.eps)
        return torch.addcmul((self.bias - mean * gain).view(shape), input, gain.view(shape))


class BatchNorm1d(_OverProcesses, nn.BatchNorm1d):
    """Of [N, C]."""


class BatchNorm2d(_OverProcesses, nn.BatchNorm2d):
    """Of [N, C, H, W]."""
