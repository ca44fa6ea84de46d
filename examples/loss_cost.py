"""Time and peak memory of the fused CLIP loss and of the dense formula, in a process that does nothing else.

    python examples/loss_cost.py 4096 8192 16384

One step is forward and backward with a learnable temperature, on the CPU in fp32. Peak memory is what a step needs
beyond its inputs and the gradients that it leaves.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # for the benchmark's memory gauge

from objectives import dense_clip_loss  # noqa: E402
from options import SIZE, THREADS, Distinct, run  # noqa: E402

import contrastive_kernels as ck  # noqa: E402
from bench.memory import peak_of, why_not  # noqa: E402

__all__ = ["Cost", "loss_costs"]

DENSE_SECONDS = 12.0  # a dense step that is expected to take longer is not taken
DENSE_MATRICES = 8  # N x N fp32 matrices that the dense formula was seen to hold at its peak
PROVIDERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"fused": ck.clip_loss, "dense": dense_clip_loss}


@dataclasses.dataclass(frozen=True)
class Cost:
    """One step at one batch size; ``skipped`` says why there is no number."""

    provider: str
    rows: int
    seconds: float | None = None
    peak_bytes: int | None = None
    value: float | None = None
    skipped: str = ""


def _available_bytes() -> int:
    """Memory that a process may still take, on Linux; elsewhere a cautious guess."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 4 << 30
    lines = meminfo.read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def measure(provider: str, rows: int, dim: int) -> Cost:
    """Warm-up by a smaller step, then one step for the memory, and the fastest of a few for the time."""
    generator = torch.Generator().manual_seed(0)
    x, y = (normalize(torch.randn(n, dim, generator=generator), dim=1).requires_grad_() for n in (rows, rows))
    scale = torch.tensor(1 / 0.07, requires_grad=True)
    leaves = (x, y, scale)
    values = []

    def step() -> int:
        for leaf in leaves:
            leaf.grad = None
        loss = PROVIDERS[provider](x, y, scale)
        loss.backward()
        values.append(float(loss.detach()))
        return sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None)

    few = min(rows, 256)
    PROVIDERS[provider](x[:few], y[:few], scale).backward()
    for leaf in leaves:
        leaf.grad = None
    times = []
    started = time.perf_counter()
    peak = peak_of(step)[0] if why_not("cpu") is None else None
    times.append(time.perf_counter() - started)
    while sum(times) < 1.5 and len(times) < 6:
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return Cost(provider, rows, min(times), peak, values[-1])


def _measure_all(sizes: Sequence[int], dim: int) -> Iterator[Cost]:
    """Both providers at every size, ascending; the dense one always at the first, then as long as it fits."""
    dense_seconds = 0.0  # expected at the next size
    for i, rows in enumerate(sizes):
        yield measure("fused", rows, dim)
        needed = DENSE_MATRICES * 4 * rows**2
        if i and dense_seconds > DENSE_SECONDS:
            yield Cost("dense", rows, skipped=f"about {dense_seconds:.0f} s")
        elif needed > 0.7 * _available_bytes():
            yield Cost("dense", rows, skipped=f"{needed / 2**30:.0f} GiB")
        else:
            cost = measure("dense", rows, dim)
            dense_seconds = cost.seconds or 0.0
            yield cost
        if i + 1 < len(sizes):
            dense_seconds *= (sizes[i + 1] / rows) ** 2


def loss_costs(sizes: Sequence[int], dim: int) -> Iterator[Cost]:
    """Measures in a fresh process, so that nothing the caller keeps counts; yields as results come."""
    command = [sys.executable, str(Path(__file__)), "--json", "--dim", str(dim)]
    command += ["--threads", str(torch.get_num_threads()), *map(str, sizes)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            yield Cost(**json.loads(line))
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}")


def main() -> None:
    """The command: a line per measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=SIZE, nargs="+", action=Distinct, help="batch sizes")
    parser.add_argument("--dim", type=SIZE, default=256)
    parser.add_argument("--threads", type=THREADS, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for cost in _measure_all(sorted(arguments.rows), arguments.dim):
        print(json.dumps(dataclasses.asdict(cost)) if arguments.json else cost, flush=True)


if __name__ == "__main__":
    run(main)
