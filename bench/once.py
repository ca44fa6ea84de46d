"""``python -m bench.once``: one step of each loss on small problems of several panels, checked or only run.

Checked it is the first thing to do on a new machine; with ``--no-check`` it is a short program for sanitizers and
profilers to watch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

import contrastive_kernels as ck

from .cases import DTYPES, Case, Inputs, make_inputs, precision
from .check import check_small, evaluate
from .formulas import DENSE
from .providers import Provider

__all__ = ["main", "provider_of"]


def provider_of(backend: str, workspace_bytes: int | None) -> Provider:
    """Ours on one backend, with a workspace of its own size."""

    def build(case: Case, i: Inputs) -> Callable[[], Tensor]:
        function: Callable[..., Tensor] = getattr(ck, case.loss)
        return partial(function, i.x, i.y, i.scale, *i.extra, backend=backend, workspace_bytes=workspace_bytes)

    return Provider(f"ours-{backend}", build, frozenset(DENSE), backend=backend, package="contrastive-kernels")


def _outcome(provider: Provider, case: Case, check: bool) -> str | None:
    """What is wrong with a step, or None."""
    try:
        with precision(case):
            if check:
                verdict = check_small(provider, case, case.n)
                return None if verdict.ok else str(verdict)
            inputs = make_inputs(case)
            evaluate(provider.build(case, inputs), inputs, case.mode)
            if torch.device(case.device).type == "cuda":
                torch.cuda.synchronize()
    except Exception as error:  # the next problem may tell more
        return f"{type(error).__name__}: {error}"
    return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.once", description=__doc__)
    parser.add_argument("--backend", default=",".join(ck.list_backends()), help="comma-separated; all")
    parser.add_argument("--case", default=",".join(DENSE), help="comma-separated; all")
    parser.add_argument("--dtype", default="bfloat16,float32", help="comma-separated")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--n", type=int, default=300)
    parser.add_argument("--d", type=int, default=72)
    parser.add_argument("--workspace", type=int, help="bytes; by default what suits the device")
    parser.add_argument("--no-check", action="store_true", help="run only")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line per problem; returns 1 where one is wrong."""
    args = _parser().parse_args(argv)
    wrong = 0
    for backend in args.backend.split(","):
        for dtype in args.dtype.split(","):
            row = torch.empty(1, args.d, dtype=DTYPES[dtype], device=args.device)
            if (reason := ck.why_not(backend, row, row)) is not None:
                print(f"{backend} {dtype}: left out, {reason}", flush=True)
                continue
            for loss in args.case.split(","):
                case = Case(loss, args.n, args.d, dtype=dtype, device=args.device)
                problem = _outcome(provider_of(backend, args.workspace), case, not args.no_check)
                wrong += problem is not None
                print(f"{backend} {dtype} {loss} N = {args.n}, D = {args.d}: {problem or 'ok'}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
