"""A stage of ``bench.kernels``: steps of several losses, kernel by kernel."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

import torch

import contrastive_kernels as ck

from .cases import Case, make_inputs
from .measure import Work, interleave, warm_up

if TYPE_CHECKING:
    from .kernels import Log

__all__ = ["timeline"]

MIB = 2**20
#: (loss, N, workspaces in MiB; 0: the default)
STEPS = (
    ("clip_loss", 65536, (64, 256, 512, 1024, 10240)),  # the last holds all exponentials
    ("info_nce", 65536, (512, 1024)),  # the last in bands of them
    ("sigmoid", 65536, (512,)),
    ("decomposable", 65536, (512,)),
    ("clip_loss", 4096, (0,)),
    ("clip_loss", 256, (0,)),
    ("info_nce", 256, (0,)),
)


def timeline(args: argparse.Namespace, log: Log) -> None:
    """Prints what each kernel of a step takes; on a CPU, each operation."""
    for d in args.d:
        for loss, n, workspaces in STEPS:
            for workspace in workspaces:
                n = min(n, args.n)
                key = {"what": "timeline", "loss": loss, "n": n, "d": d, "dtype": args.dtype, "workspace": workspace}
                if (row := log.find(**key, backend=args.backend)) is None:
                    if time.monotonic() > log.deadline:
                        print(f"no time for {key} and what follows", flush=True)
                        return
                    row = log.add(**key, backend=args.backend, **_profiled(args, loss, n, d, workspace))
                print(
                    f"{loss}, N = {n:,}, D = {d}, workspace {workspace or 'default'}: {row['step_ms']:.3f} ms,", end=" "
                )
                print(f"{row['launches']} launches, {row['busy_ms']:.3f} ms busy")
                for name, (ms, count) in row["kernels"].items():
                    print(f"    {ms:10.3f} ms {count:6}  {name}", flush=True)


def _profiled(args: argparse.Namespace, loss: str, n: int, d: int, workspace: int) -> dict[str, Any]:
    """A step's milliseconds, launches, and the kernels that take the most."""
    cuda = torch.device(args.device).type == "cuda"
    inputs = make_inputs(Case(loss, n, d, dtype=args.dtype, device=args.device))
    loss_of, options = getattr(ck, loss), {"workspace_bytes": workspace * MIB} if workspace else {}

    def step() -> None:
        for leaf in inputs.leaves.values():
            leaf.grad = None
        loss_of(inputs.x, inputs.y, inputs.scale, *inputs.extra, backend=args.backend, **options).backward()

    work = Work(step, args.device)
    warm_up(work)
    interleave([work], args.rounds)
    kind = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profile:
        step()
        if cuda:
            torch.cuda.synchronize()
    name = "self_device_time_total" if cuda else "self_cpu_time_total"
    found = sorted(((getattr(e, name) / 1e3, e.count, e.key) for e in profile.key_averages()), reverse=True)
    found = [entry for entry in found if entry[0] > 0]
    return {
        "step_ms": 1e3 * work.best,
        "busy_ms": sum(ms for ms, *_ in found),
        "launches": sum(count for _, count, _ in found),
        "kernels": {key[:80]: (ms, count) for ms, count, key in found[:12]},
    }
