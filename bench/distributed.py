"""``python -m bench --distributed``: the loss over the processes of a group, against gathering all features.

Weak scaling (as many rows a process) and strong scaling (as many in all) on 1, 2 and 4 processes with gloo, each with
as many threads. Within a number of processes everything takes turns in the same processes; peak memory is measured in
processes of its own.
"""

from __future__ import annotations

import datetime
import gc
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch import distributed as dist

import contrastive_kernels as ck

from . import memory, results
from .cases import SOFTMAX_SCALE, Case
from .formulas import gathered_clip_loss
from .providers import Provider
from .report import megabytes, milliseconds, provider_name
from .structures import make_features

__all__ = ["Plan", "check", "contenders", "run", "scaling_tables"]

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

#: Largest error of value and gradients, relative to the largest entry of the float64 definition's.
TOLERANCE = 1e-4
#: Rows a process of the problem that is checked, and of the one that loads libraries before memory is counted.
SMALL_ROWS = 96
#: Seconds that a collective may wait for a process that is slow, or dead.
TIMEOUT = 600
GATHERED = "gathered"

_CONTEXT: Any = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Parameters
    ----------
    processes : tuple of int
        Their numbers.
    each, total : int
        Rows a process for weak scaling, and of all processes for strong scaling.
    d : int
        Features.
    totals : tuple of int
        Rows of all processes in place of these two.
    strategies : tuple of str
        Of ours.
    rounds : int
        Turns of everything.
    threads : int
        Of each process: by default the largest number of processes shares the cores, if there are enough.
    """

    processes: tuple[int, ...] = (1, 2, 4)
    each: int = 2048
    total: int = 8192
    d: int = 256
    totals: tuple[int, ...] = ()
    strategies: tuple[str, ...] = ("grid", "ring")
    rounds: int = 5
    threads: int = max(1, (os.cpu_count() or 1) // 4)

    def sizes(self, processes: int) -> list[int]:
        """Rows of all processes together, ascending."""
        return sorted(self.totals or {self.each * processes, self.total})


def contenders(processes: int, strategies: Sequence[str] = ("auto", "grid", "ring")) -> dict[str, Loss]:
    """Who computes the loss of all rows from the share [n, D] of each process."""
    if processes == 1:
        return {"ours": ck.clip_loss, GATHERED: gathered_clip_loss}
    ours = {f"ours-{s}": partial(ck.clip_loss, group="world", strategy=s) for s in strategies}
    return {**ours, GATHERED: gathered_clip_loss}


# In each process


@dataclass
class _Share:
    """This process's rows of a problem."""

    x: Tensor
    y: Tensor
    scale: Tensor

    @classmethod
    def of(cls, n: int, d: int) -> _Share:
        """Of n rows in all."""
        rank, size = dist.get_rank(), dist.get_world_size()
        x, y = (v[n * rank // size : n * (rank + 1) // size].clone() for v in make_features(n, d))
        return cls(x.requires_grad_(), y.requires_grad_(), torch.tensor(SOFTMAX_SCALE, requires_grad=True))

    def step(self, loss: Loss) -> Tensor:
        """Value, and gradients in .grad."""
        self.drop()
        value = loss(self.x, self.y, self.scale)
        value.backward()
        return value.detach()

    def drop(self) -> None:
        for leaf in (self.x, self.y, self.scale):
            leaf.grad = None


def check(loss: Loss, n: int, d: int) -> float:
    """The largest relative error of the mean value and of the gradients that a mean over processes would give."""
    share, size = _Share.of(n, d), dist.get_world_size()
    value = share.step(loss)
    means = torch.stack([value.double(), share.scale.grad.double()])  # type: ignore[union-attr]
    dist.all_reduce(means)
    found = [*(means / size), *(leaf.grad.double() / size for leaf in (share.x, share.y) if leaf.grad is not None)]
    x, y = (v.double().requires_grad_() for v in make_features(n, d))
    scale = torch.tensor(SOFTMAX_SCALE, dtype=torch.float64, requires_grad=True)
    whole = ck.reference.clip_loss(x, y, scale)
    dx, dy, dscale = torch.autograd.grad(whole, (x, y, scale))
    own = slice(n * dist.get_rank() // size, n * (dist.get_rank() + 1) // size)
    wanted = [(whole.detach(), whole.detach()), (dscale, dscale), (dx[own], dx), (dy[own], dy)]
    return max(float((f - w).abs().max() / all_.abs().max()) for f, (w, all_) in zip(found, wanted, strict=True))


def _time(plan: Plan) -> dict[tuple[int, str], tuple[list[float], float]]:
    """(rows, contender) -> seconds of every round, and the error."""
    losses = list(contenders(dist.get_world_size(), plan.strategies).items())
    found: dict[tuple[int, str], tuple[list[float], float]] = {}
    errors = {name: check(loss, SMALL_ROWS * dist.get_world_size(), plan.d) for name, loss in losses}
    gc.disable()
    for n in plan.sizes(dist.get_world_size()):
        share = _Share.of(n, plan.d)
        seconds: dict[str, list[float]] = {name: [] for name, _ in losses}
        for turn in range(plan.rounds + 1):  # the first warms up
            first = turn % len(losses)
            for name, loss in losses[first:] + losses[:first]:
                dist.barrier()
                start = time.perf_counter()
                share.step(loss)
                seconds[name].append(time.perf_counter() - start)
        found |= {(n, name): (times[1:], errors[name]) for name, times in seconds.items()}
    return found


def _remember(n: int, d: int, name: str) -> int:
    """Peak bytes of a warm step, beyond the share and its gradients."""
    loss, tiny = contenders(dist.get_world_size())[name], _Share.of(SMALL_ROWS * dist.get_world_size(), d)
    tiny.step(loss)
    share = _Share.of(n, d)

    def step() -> int:
        share.step(loss)
        return sum(leaf.grad.nbytes for leaf in (share.x, share.y) if leaf.grad is not None)

    step()
    share.drop()
    dist.barrier()
    return max(memory.peak_of(step)[0], 0)


def _serve(pipe: Connection, store: str, rank: int, size: int, threads: int, task: Callable[[], Any]) -> None:
    """One process: joins the group, works, and sends what it found, or what went wrong."""
    torch.set_num_threads(threads)
    try:
        wait = datetime.timedelta(seconds=TIMEOUT)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=wait)
        pipe.send((task(), None))
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        pipe.send((None, traceback.format_exc()))


def in_processes(size: int, threads: int, task: Callable[[], Any]) -> list[Any]:
    """What a function gives in each process of a new group; a RuntimeError where one fails."""
    if _CONTEXT.get_start_method() == "forkserver":
        _CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "contrastive_kernels", "bench.distributed"])
    with tempfile.TemporaryDirectory() as folder:
        pipes, started = [], []
        for rank in range(size):
            here, there = _CONTEXT.Pipe(duplex=False)
            arguments = (there, str(Path(folder) / "store"), rank, size, threads, task)
            started.append(_CONTEXT.Process(target=_serve, args=arguments, daemon=True))
            started[-1].start()
            there.close()
            pipes.append(here)
        try:
            found = [pipe.recv() for pipe in pipes]
        except EOFError:
            raise RuntimeError(f"one of {size} processes died") from None
        finally:
            for process in started:
                process.join(1.0)
                process.kill()
    for rank, (_, error) in enumerate(found):
        if error is not None:
            raise RuntimeError(f"process {rank} of {size}: {error}")
    return [result for result, _ in found]


# Rows and table


def measure(plan: Plan, say: Callable[[str], None]) -> Iterator[list[results.Row]]:
    """Rows of one number of processes after the other."""
    for processes in plan.processes:
        say(f"{processes} processes: times")
        parts = in_processes(processes, plan.threads, partial(_time, plan))
        rows = []
        for n, name in parts[0]:
            # a round lasts until the last process is done
            seconds = [max(round_) for round_ in zip(*(part[n, name][0] for part in parts), strict=True)]
            error = max(part[n, name][1] for part in parts)
            row = _row(Case("clip_loss", n, plan.d), name, processes, plan.threads)
            row |= {"rounds": plan.rounds, "error": error, "tolerance": TOLERANCE}
            if not error <= TOLERANCE:
                rows.append({**row, "status": "wrong", "reason": f"error {error:.1e} > {TOLERANCE:.0e}"})
                continue
            row |= {"status": "ok", "best_s": min(seconds), "median_s": median(seconds)}
            say(f"{processes} processes: memory of {name}, {n:,} rows")
            if memory.why_not("cpu") is None:
                row["peak_bytes"] = max(in_processes(processes, plan.threads, partial(_remember, n, plan.d, name)))
            rows.append(row)
        yield rows


def _row(case: Case, name: str, processes: int, threads: int) -> results.Row:
    """The row's key."""
    provider, _, strategy = name.partition("-")
    ours = provider == "ours"
    who = Provider(
        provider,
        build=lambda *_: NotImplemented,
        losses=frozenset((case.loss,)),
        backend=(strategy or "alone") if ours else None,
        package="contrastive-kernels" if ours else "torch",
    )
    return results.new_row(case, who, processes=processes) | {"threads": threads}


def scaling_tables(rows: Sequence[results.Row]) -> list[Table]:
    """A table per width, machine, torch and commit, of those rows that are of processes."""
    groups: dict[tuple[Any, ...], list[results.Row]] = {}
    for row in rows:
        if row.get("processes"):
            key = (row["d"], row["machine"], row["versions"].split(",")[0], row["commit"])
            groups.setdefault(key, []).append(row)
    return [_table(d, machine, version, commit, group) for (d, machine, version, commit), group in groups.items()]


def _table(d: int, machine: str, version: str, commit: str, rows: list[results.Row]) -> Table:
    """Every row beside the gathered one of its size, and beside one process."""
    rows = sorted(rows, key=lambda row: (row["processes"], row["n"], row["provider"] == GATHERED, str(row["backend"])))
    table = Table(
        title=f"clip_loss over processes, forward + backward, D = {d}, float32; {machine}; {version}; commit {commit}",
        title_justify="left",
        title_style="bold",
        caption="processes x threads; best of the rounds in turns, until the last process is done; weak, strong: the "
        "share of P times one process's speed, at as many rows a process, and in all; peak MB: beyond features and "
        "gradients, of the process that needs most",
        caption_justify="left",
    )
    names = ("processes", "rows", "a process", "provider", "best ms", "median ms", "vs gathered", "weak", "strong")
    for name in (*names, "peak MB", "error"):
        table.add_column(name, justify="left" if name in ("processes", "provider") else "right")
    found = {(row["processes"], row["n"], row["provider"], row["backend"]): row for row in rows}
    last: Any = None
    for key, row in found.items():
        processes, n = key[:2]
        if last is not None and key[:2] != last:
            table.add_section()
        crowded = " (more than cores)" if processes * row["threads"] > (os.cpu_count() or 1) else ""
        start = [f"{processes} x {row['threads']}{crowded}", f"{n:,}", f"{n // processes:,}"]
        start = start if key[:2] != last else [""] * 3
        last = key[:2]
        if row["status"] != "ok":
            table.add_row(*start, provider_name(row), *["-"] * 6, row["reason"], style="red")
            continue
        against = _ratio(found.get((processes, n, GATHERED, None)), row)
        one = (row["provider"], row["backend"] and "alone")
        weak, strong = (found.get((1, rows_, *one)) for rows_ in (n // processes, n))
        table.add_row(
            *start,
            provider_name(row),
            milliseconds(row["best_s"]),
            milliseconds(row["median_s"]),
            "" if row["provider"] == GATHERED else _shown(against, "x"),
            _shown(_ratio(weak, row), "", processes) if processes > 1 else "",
            _shown(_ratio(strong, row), "", 1 / processes) if processes > 1 else "",
            megabytes(row.get("peak_bytes")),
            f"{row['error']:.0e}",
            style=None if row["provider"] == GATHERED else "bold green" if (against or 1) >= 1 else "bold yellow",
        )
    return table


def _ratio(other: results.Row | None, row: results.Row) -> float | None:
    """Another row's time over this one's."""
    return None if other is None or "best_s" not in other else float(other["best_s"] / row["best_s"])


def _shown(ratio: float | None, unit: str = "", factor: float = 1.0) -> str:
    return "" if ratio is None else f"{ratio * factor:.2f}{unit}"


def run(plan: Plan, console: Console, path: Path | None = None) -> int:
    """Measures, prints and stores; 1 where ours is wrong, or slower than gathering."""
    rows: list[results.Row] = []
    with console.status("") as status:
        for more in measure(plan, status.update):
            rows += more
            if path:
                results.save(path, more)
    for table in scaling_tables(rows):
        console.print(table, "")
    ours = [row for row in rows if row["provider"] != GATHERED]
    theirs = {(row["processes"], row["n"]): row for row in rows if row["provider"] == GATHERED}
    slower = [row for row in ours if (_ratio(theirs[row["processes"], row["n"]], row) or 1.0) < 1.0]
    slower = slower if _is_promised(plan) else []
    for row in slower:
        console.print(f"slower: {provider_name(row)} on {row['processes']} processes, {row['n']:,} rows")
    return int(bool(slower) or any(row["status"] != "ok" for row in ours))


def _is_promised(plan: Plan) -> bool:
    """Whether ours is not to be slower at these sizes: in small ones messages take longer than products."""
    return (plan.each, plan.total, plan.d) == (Plan.each, Plan.total, Plan.d)
