"""Peak memory of one provider on one case, in a process of its own: ``python -m bench.memory``.

What is reported is what a training step needs *beyond its inputs and the gradients it leaves*: the run is warm (one run
before it; libraries, thread pools and the BLAS's own buffers are there), freed memory has gone back to the system, and
the size of the gradients that exist afterwards is subtracted. What the warm-up leaves behind is reported as ``kept``,
so that a cached workspace cannot hide.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from .cases import Case, make_inputs
from .check import evaluate
from .providers import get

__all__ = ["Peak", "child_command", "measure_peak", "peak_of", "why_not"]

ROOT = Path(__file__).resolve().parent.parent
#: Rows of the run that loads libraries before anything is counted.
TINY_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Peak:
    """Bytes beyond inputs and gradients: ``peak`` during a warm step, ``kept`` between steps."""

    peak: int
    kept: int


def why_not(device: str) -> str | None:
    """Why peak memory cannot be measured, or None."""
    if torch.device(device).type == "cuda" or Path("/proc/self/clear_refs").exists():
        return None
    return "peak memory on the CPU needs Linux's /proc/self/clear_refs"


def measure_peak(provider: str, case: Case, threads: int, timeout: float = 1800.0) -> Peak:
    """Runs this module in a fresh process, and says what it found; on a GPU, whose bytes torch counts, in this one."""
    if torch.device(case.device).type == "cuda":
        return _measure_here(provider, case)
    order = json.dumps({"provider": provider, "case": dataclasses.asdict(case), "threads": threads})
    done = subprocess.run(child_command(order), cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"the process ended with status {done.returncode}")
    return Peak(**json.loads(done.stdout.strip().splitlines()[-1]))


def child_command(order: str) -> list[str]:
    """The fresh process."""
    return [sys.executable, "-m", "bench.memory", order]


def peak_of(run: Callable[[], int], device: str = "cpu") -> tuple[int, int]:
    """Peak bytes of ``run()`` beyond what is there before it and what it says it leaves; and what is there before."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        left = run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before - left, before
    _trim()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    left = run()
    return _status("VmHWM") - before - left, before


def _trim() -> None:
    """Gives freed heap memory back to the system, where the C library can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _status(name: str) -> int:
    """Bytes of one line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def _measure_here(provider_name: str, case: Case) -> Peak:
    """In this process: tiny run, warm-up, measured run."""
    provider = get(provider_name)
    tiny = case.smaller(TINY_ROWS)
    tiny_inputs = make_inputs(tiny)
    evaluate(provider.build(tiny, tiny_inputs), tiny_inputs, tiny.mode)
    inputs = make_inputs(case)
    forward = provider.build(case, inputs)

    def step() -> int:
        evaluate(forward, inputs, case.mode)
        return sum(leaf.grad.nbytes for leaf in inputs.leaves.values() if leaf.grad is not None)

    def drop() -> None:
        for leaf in inputs.leaves.values():
            leaf.grad = None

    _, before = peak_of(step, case.device)
    drop()
    peak, warm = peak_of(step, case.device)
    drop()
    return Peak(max(peak, 0), max(warm - before, 0))


def main() -> None:
    """Prints one line of JSON."""
    order = json.loads(sys.argv[1])
    torch.set_num_threads(order["threads"])
    print(json.dumps(dataclasses.asdict(_measure_here(order["provider"], Case(**order["case"])))))


if __name__ == "__main__":
    main()
