"""Processes that share a loss: each runs a test's function, and what it returns comes back.

They are forked from one that has imported torch already, and stay for the next test; each test has a group of its own.
"""

from __future__ import annotations

import atexit
import datetime
import io
import multiprocessing
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from poison import PLACES, poisoned
from torch import distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch", "torch.distributed", "torch._dynamo", "contrastive_kernels", "problems", "tolerance"]
)


@dataclass(frozen=True)
class Failure:
    """An exception on a rank."""

    kind: str
    text: str
    trace: str


class _Worker:
    """A process that waits for functions to run."""

    def __init__(self) -> None:
        self.pipe, there = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=_serve, args=(there,), daemon=True)
        self.process.start()
        there.close()


_workers: list[_Worker] = []


def _dismiss() -> None:
    for worker in _workers:
        worker.process.kill()
        worker.pipe.close()
    for worker in _workers:
        worker.process.join()
    _workers.clear()


atexit.register(_dismiss)


def run(ranks: int, function: Callable[..., Any], folder: Path, *arguments: Any, seconds: float = 60) -> list[Any]:
    """What a function(*arguments) of a module gives on every rank: its result, a Failure, or None if it died.

    `folder`: an empty one, where the ranks meet. `seconds`: the time-out of their group.
    """
    while len(_workers) < ranks:
        _workers.append(_Worker())
    pipes: dict[Any, int] = {worker.pipe: rank for rank, worker in enumerate(_workers[:ranks])}
    for pipe, rank in pipes.items():
        pipe.send((rank, ranks, folder, seconds, function))
        pipe.send_bytes(_packed(arguments))
    results: list[Any] = [None] * ranks
    left = dict(pipes)
    while left:
        ready = wait(list(left), timeout=10 * seconds)
        if not ready:
            _dismiss()
            raise AssertionError(f"ranks {sorted(left.values())} of {ranks} neither returned nor failed")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = left.pop(pipe)
            try:
                results[rank] = torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)
            except (EOFError, ConnectionResetError):  # it died
                results[rank] = None
    if any(result is None or isinstance(result, Failure) for result in results):
        _dismiss()  # who waited in vain may have left something behind
    return results


def _packed(value: Any) -> bytes:
    message = io.BytesIO()  # (a pipe would send tensors as shared memory)
    torch.save(value, message)
    return message.getvalue()


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    for owner, name in PLACES:
        setattr(owner, name, poisoned(getattr(owner, name)))
    while True:
        try:
            rank, ranks, folder, seconds, function = pipe.recv()
            arguments = torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)
        except EOFError:
            os._exit(0)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/store",
                rank=rank,
                world_size=ranks,
                timeout=datetime.timedelta(seconds=seconds),
            )
            dist.barrier()  # nobody leaves while others are still joining
            result = (function(*arguments),)
            dist.destroy_process_group()
        except BaseException as error:
            result = Failure(type(error).__name__, str(error), traceback.format_exc())
        pipe.send_bytes(_packed(result))


def succeeded(results: list[Any]) -> list[Any]:
    """The results, of which none is a failure."""
    for rank, result in enumerate(results):
        assert not isinstance(result, Failure), f"rank {rank}: {result.trace}"
        assert result is not None, f"rank {rank} died"
    return [result[0] for result in results]
