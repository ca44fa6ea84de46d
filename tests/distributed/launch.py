"""Processes that share a loss: started in a test, each runs one function, and what it returns comes back.

The processes are forked from one that has imported torch already, so that six of them take as long as one.
"""

from __future__ import annotations

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
from torch import distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "contrastive_kernels", "problems", "tolerance"])


@dataclass(frozen=True)
class Failure:
    """An exception on a rank."""

    kind: str
    text: str
    trace: str


def run(ranks: int, function: Callable[..., Any], folder: Path, *arguments: Any, seconds: float = 30) -> list[Any]:
    """What a function(*arguments) of a module gives on every rank: its result, a Failure, or None if it died.

    `folder`: an empty one, where the ranks meet. `seconds`: the time-out of their group.
    """
    pipes, processes = [], []
    for rank in range(ranks):
        here, there = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(target=_rank, args=(there, rank, ranks, folder, seconds, function, arguments))
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    results: list[Any] = [None] * ranks
    left = dict(zip(pipes, range(ranks)))
    while left:
        ready = wait(list(left), timeout=10 * seconds)
        if not ready:
            for process in processes:
                process.kill()
            raise AssertionError(f"ranks {sorted(left.values())} of {ranks} neither returned nor failed")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = left.pop(pipe)
            try:
                results[rank] = torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)
            except EOFError:  # it died
                results[rank] = None
    for process in processes:
        process.join()
    return results


def _rank(
    pipe: Connection,
    rank: int,
    ranks: int,
    folder: Path,
    seconds: float,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=ranks,
            timeout=datetime.timedelta(seconds=seconds),
        )
        result = function(*arguments)
    except BaseException as error:
        result = Failure(type(error).__name__, str(error), traceback.format_exc())
    message = io.BytesIO()  # (a pipe would send tensors as shared memory, which ends with this process)
    torch.save(result, message)
    pipe.send_bytes(message.getvalue())
    pipe.close()
    os._exit(0)  # (others may still be about to fail: no farewell between processes)


def succeeded(results: list[Any]) -> list[Any]:
    """The results, of which none is a failure."""
    for rank, result in enumerate(results):
        assert not isinstance(result, Failure), f"rank {rank}: {result.trace}"
        assert result is not None, f"rank {rank} died"
    return results
