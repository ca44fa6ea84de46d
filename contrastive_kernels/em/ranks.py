"""A memory on several ranks: every one holds the same table, or maps the one that a rank of its machine writes."""

from __future__ import annotations

import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..distributed.group import Ranks, tell
from .manifest import Manifest
from .storage import Folder

__all__ = ["changed_together", "gathered_visits", "opened_together", "written_by_one"]


def opened_together(ranks: Ranks, path: Path, wanted: Manifest) -> Folder:
    """A folder that one rank of every machine writes, and the others map; all ranks call it.

    Whoever comes first is the writer: the folder's lock decides.
    """
    call, device = "NormalizerMemory", ranks.device()
    host = zlib.crc32(socket.gethostname().encode())
    folder, refusal = None, None
    try:
        folder = Folder(path, wanted, False)
    except BlockingIOError as error:  # another rank's, or another program's
        refusal = error
    except (OSError, ValueError) as error:
        tell(ranks, error, torch.empty(0, device=device, dtype=torch.float32))
        raise
    about = (("samples", wanted.num_samples), ("directions", wanted.directions), ("step", wanted.step),
             ("floor", wanted.floor))  # fmt: skip
    ranks.agree(call, about, torch.empty(0, 1, device=device, dtype=torch.float32), 0, 0)
    own = torch.tensor([[[host, int(folder is not None)]]], dtype=torch.int64, device=device)
    found = ranks.transport(call).all_gather(own, [1] * ranks.size)[:, 0].tolist()
    if not any(writes for at, writes in found if at == host):
        assert refusal is not None
        raise refusal
    if folder is None:
        folder = Folder(path, wanted, True)
        folder.beside = True
    return folder


def gathered_visits(
    ranks: Ranks, rows: Tensor, found: Tensor, bound: Tensor | None, columns: slice, rule: tuple[float, ...]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What all ranks have visited: their samples [N], what was found of them [N, d] and its lower bound, by rank."""
    call, device = "NormalizerMemory.update", ranks.device(rows.device)
    about = (("directions", (columns.start, columns.stop)), ("lower_bound", "given" if bound is not None else None),
             ("samples, step and floor", rule))  # fmt: skip
    sizes = ranks.agree(call, about, torch.empty(0, 1, device=device, dtype=torch.float32), len(rows), len(rows))
    transport = ranks.transport(call)

    def gathered(own: Tensor) -> Tensor:
        return transport.all_gather(own.to(device), sizes.rows).to(rows.device)

    return gathered(rows), gathered(found), None if bound is None else gathered(bound)


@contextmanager
def written_by_one(ranks: Ranks | None, folder: Folder | None) -> Iterator[bool]:
    """Whether this process writes the tables: once nobody reads what is about to change, until all may read again."""
    if ranks is None or folder is None:
        yield True
        return
    _wait_for_all(ranks)
    yield not folder.read_only
    _wait_for_all(ranks)


@contextmanager
def changed_together(ranks: Ranks | None, folder: Folder | None, call: str, about: tuple[str, Any]) -> Iterator[bool]:
    """Whether this process changes a folder's tables, in a call of all ranks; what fails then fails on each of them."""
    if ranks is None or folder is None:
        yield True
        return
    call = f"NormalizerMemory.{call}"
    nothing = torch.empty(0, 1, device=ranks.device(), dtype=torch.float32)
    ranks.agree(call, (about,), nothing, 0, 0)
    try:
        yield not folder.read_only
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        tell(ranks, error, nothing)
        raise
    ranks.agree(f"the end of {call}", (), nothing, 0, 0)


def _wait_for_all(ranks: Ranks) -> None:
    """Returns once every rank has called it."""
    ranks.transport("NormalizerMemory.update").sum(torch.zeros(1, dtype=torch.float64, device=ranks.device())).tolist()
