"""The Triton backend in Triton's interpreter, on CPU tensors: a program, for the interpreter is chosen at import.

    python tests/interpreted.py float32 | float16 | bfloat16 | hostile | launches

It prints what fails and exits with 1 then.
"""

from __future__ import annotations

import json
import os
import sys
import warnings

if __name__ == "__main__":  # not where pytest looks for doctests: the whole process would be interpreted
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from problems import BY_NAME, PROBLEMS, engine_options, make_inputs, run
from tolerance import assert_outcome
from triton.runtime import interpreter

import contrastive_kernels as ck

#: Problem: its losses (None: all of them).
SUBSETS: dict[str, dict[str, tuple[str, ...] | None]] = {
    "float32": {
        "base": None,
        "n1": None,
        "n3": ("clip_loss", "nt_xent"),
        "no-rows": None,
        "one-row": ("info_nce",),
        "d1": ("clip_loss",),
        "d7": ("decomposable_pair", "sigmoid"),
        "panels": ("clip_loss", "nt_xent", "sigmoid"),
        "offset-panels": None,
        "index": ("info_nce",),
        "index-panels": ("decomposable",),
        "part-block": None,
        "t0.005": ("clip_loss", "decomposable_pair"),
        "zero-scale": ("clip_loss", "sigmoid"),
        "negative-scale": ("nt_xent",),
        "identical": ("clip_loss",),
        "huge": ("clip_loss", "sigmoid", "decomposable_pair"),
        "outliers": ("clip_loss", "decomposable_pair"),
        "siglip-start": None,
        "misaligned": ("clip_loss",),
        "sparse-weights": ("clip_loss", "decomposable_pair"),
        "very-stale": ("decomposable_pair",),
        "stale-panels": ("decomposable_pair",),
        "drawn-wide": ("decomposable",),
    },
    "float16": {
        "base": None,
        "nearly-solved": ("clip_loss", "decomposable_pair"),
        "panels": ("clip_loss",),
        "t0.01": ("nt_xent", "sigmoid"),
        "zero-weights": ("clip_loss",),
        "sparse-weights": ("decomposable",),
        "rather-stale": None,
    },
    "bfloat16": {
        "base": None,
        "nearly-solved": ("info_nce",),
        "wide-panels": ("info_nce",),
        "d123": ("sigmoid",),
        "t0.001": ("decomposable_pair",),
    },
}


def patch_once() -> None:
    """Triton 3.9 replaces triton.language anew whenever one function calls another, which takes half the time."""
    done: set[int] = set()

    def call(self, *arguments, **keywords):
        if id(self.fn.__globals__) not in done:
            interpreter._patch_lang(self.fn)
            done.add(id(self.fn.__globals__))
        return self.rewrite()(*arguments, **keywords)

    interpreter.InterpretedFunction.__call__ = call


def problems_of(dtype: torch.dtype) -> list[str]:
    """What fails of a dtype's problems."""
    failures = []
    for number, (name, losses) in enumerate(SUBSETS[str(dtype).removeprefix("torch.")].items()):
        inputs = make_inputs(BY_NAME[name], dtype)
        for loss in inputs.problem.losses if losses is None else losses:
            number += 1
            reduction = ("mean", "none")[number % 2]
            try:
                outcome = run(ck, inputs, loss, dtype, reduction=reduction, **engine_options(inputs, loss, "triton"))
                assert_outcome(inputs, loss, reduction, outcome)
            except AssertionError as error:
                failures.append(f"{name} {loss} {reduction}: {error}")
    return failures


def hostile() -> list[str]:
    """What fails of NaN and infinity among the inputs, and of equality of two runs."""
    failures = []
    inputs = make_inputs(BY_NAME["base"], torch.float32)
    for loss in ("clip_loss", "sigmoid", "decomposable_pair"):
        first, second = (run(ck, inputs, loss, torch.float32, backend="triton") for _ in range(2))
        for name in ("value", "x", "y", "scale"):
            if not torch.equal(first[name], second[name]):
                failures.append(f"{loss}: two runs differ in {name}")
        for poison in (torch.nan, torch.inf):
            x = inputs.x.clone()
            x[-1, 3] = poison
            x.requires_grad_()
            value = inputs.call(ck, loss, x, inputs.y, inputs.scale, inputs.bias, backend="triton")
            value.backward()
            if value.isfinite() or (poison != poison and not x.grad[-1].isnan().all()):
                failures.append(f"{loss}: {poison} in x gives {value.item()}")
    return failures


def launches() -> dict[str, tuple[int, int]]:
    """Launches of value and gradients by case: as planned, and as counted."""
    from contrastive_kernels._triton import launch
    from contrastive_kernels.engine import workspace

    counted = 0
    started, accumulated = launch._launch, workspace.Workspace.accumulate

    def counting(function):
        def run(*arguments, **keywords):
            nonlocal counted
            counted += 1
            return function(*arguments, **keywords)

        return run

    launch._launch, workspace.Workspace.accumulate = counting(started), counting(accumulated)
    result = {}
    for loss, n, workspace_bytes in (("clip_loss", 130, 65536), ("nt_xent", 70, 65536), ("sigmoid", 65, 2**20)):
        counted = 0
        x, y = (torch.randn(n, 24).requires_grad_() for _ in range(2))
        scale = torch.ones((), requires_grad=True)
        more = (-1.0,) if loss == "sigmoid" else ()
        getattr(ck, loss)(x, y, scale, *more, backend="triton", workspace_bytes=workspace_bytes).backward()
        plan = ck.plan(n, d=24, loss=loss, backend="triton", workspace_bytes=workspace_bytes)
        result[f"{loss} {n}"] = (sum(each.launches for each in plan.passes), counted)
    return result


if __name__ == "__main__":
    patch_once()
    warnings.simplefilter("ignore", RuntimeWarning)  # numpy says so wherever -inf meets -inf
    torch.set_num_threads(1)
    assert ck.why_not("triton", torch.zeros(1, 1)) is None and len(PROBLEMS) > 40
    what = sys.argv[1]
    if what == "launches":
        print(json.dumps(launches()))
        sys.exit()
    failed = hostile() if what == "hostile" else problems_of(getattr(torch, what))
    print("\n".join(failed))
    sys.exit(bool(failed))
