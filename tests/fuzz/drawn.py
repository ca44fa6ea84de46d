"""What is drawn: a problem of tests/problems.py, and how it is put. A failing one can be added to that list."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from problems import BIASED, CPU_BACKENDS, DECOMPOSABLE, ONE_WAY, PAIRED, RATIOS, SOFTMAX, Problem, differentiable
from within import WAYS

import contrastive_kernels as ck

BACKENDS = tuple(name for name in CPU_BACKENDS if ck.why_not(name, torch.zeros(1, 1)) is None)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("mean", "sum", "none")

#: Small primes, and the neighbours of what a register, a stripe or the smallest panel (64) holds: half need several.
ROWS = (1, 0, 2, 3, 5, 7, 13, 31, 61, 63, 64, 65, 67, 71, 97, 101, 113, 127, 128, 129, 130, 131, 193)
FEATURES = (1, 2, 3, 5, 7, 13, 16, 31, 64, 97, 128)
SCALES = (1e-3, 0.03, 0.5, 1.0, 3.0, 14.3, 50.0, 100.0, 300.0, 1000.0, 0.0, -0.03, -1.0, -14.3, -1000.0)
UNIT = ("random", "random", "identical", "opposed", "common", "solved")
#: Of large scores: their scale is 1.
LARGE = ("normal", "huge", "outliers", "equal", "shifted")
LAYOUTS = ("contiguous", "contiguous", "transposed", "misaligned", "strided", "expanded")
#: Multiples of the smallest workspace, and the usual one (0).
WORKSPACES = (0, 1, 1, 1, 1.3, 2, 4, 9)


@dataclass(frozen=True)
class Way:
    """How a problem is put: none of it may change the answer."""

    dtype: torch.dtype = torch.float32
    backend: str = "torch"
    reduction: str = "mean"
    #: what requires a gradient
    needs: tuple[str, ...] = ()
    #: multiples of the smallest workspace; 0: the usual one
    workspace: float = 0
    #: whether a small matrix may be one call of the backend
    one_call: bool = True
    #: scale and bias come as Python's numbers where they need no gradient
    numbers: bool = False
    #: rows of lengths from 1 to 16, divided by them again
    normalize: bool = False
    default_dtype: torch.dtype = torch.float32
    threads: int = 1
    #: a way of tests/within.py
    within: str | None = None


@st.composite
def problems_of(draw: Any, loss: str) -> Problem:
    """A problem that the loss takes."""
    n, m = draw(st.sampled_from(ROWS)), None
    positives = block = None
    options: list[tuple[str, Any]] = []
    if loss in ONE_WAY:
        kind = draw(st.sampled_from(("offset", "index")))
        if kind == "index" and n:
            positives, m = "index", draw(st.sampled_from([rows for rows in ROWS if rows]))
        else:
            positives = draw(st.sampled_from((None, 0, 1, 5, 64)))
            m = n + (positives or 0) + draw(st.sampled_from((0, 1, 2, 3, 31, 67)))
    if loss in DECOMPOSABLE:
        block = draw(st.sampled_from((None, None, None, "all", *(("some",) if loss == "decomposable" else ()))))
        if block is not None:
            positives = None
        if draw(st.booleans()):
            options.append(("positive_constant", draw(st.sampled_from((0.0, 0.5, 1.0, 3.0)))))
        if draw(st.booleans()):
            options.append(("negative_scale", draw(st.sampled_from((1e-3, 0.5, 2.5, 1e4)))))
        if draw(st.booleans()):
            options.append(("shape", draw(st.sampled_from((0.3, 1.0, 20.0)))))
    square = m is None or m == n
    features = draw(st.sampled_from((*UNIT, *UNIT, *LARGE)))
    if features in ("solved", "outliers") and not square:
        features = "normal"
    length = {"equal": st.sampled_from((100.0, 1000.0)), "shifted": st.sampled_from((10.0, 100.0, 256.0))}
    include_positive = loss not in SOFTMAX or draw(st.sampled_from((True, True, False)))
    smoothing = 0.0
    if loss in SOFTMAX and include_positive:
        # (at 1, weights of nearly equal scores are their targets, and what is left are roundings)
        smoothing = draw(st.sampled_from((0.0, 0.0, 0.01, 0.1, 0.5)))
    # (rounding decides about no candidate: all count, or none)
    margins = (None, None, None, 1e30, -1e30) if loss in RATIOS and not smoothing else (None,)
    guides = (None, None, 0.5, -2.5, ("relative", 0.25), 1e9) if loss in SOFTMAX and not smoothing else (None,)
    return Problem(
        name=f"drawn-{draw(st.integers(0, 2**16))}",
        reason="drawn",
        n=n,
        m=m,
        d=draw(st.sampled_from(FEATURES)),
        scale=1.0 if features in LARGE else draw(st.sampled_from(SCALES)),
        bias=draw(st.sampled_from((None, -10.0, -3.0, 0.0, 2.0))),
        features=features,
        length=draw(length[features]) if features in length else 0.0,
        layout=draw(st.sampled_from(LAYOUTS)),
        positives=positives,
        weight=draw(st.sampled_from((None, None, "sparse", "zero"))),
        ids=draw(st.sampled_from((None, None, None, "shared", "shared", "equal", "different"))),
        include_positive=include_positive,
        label_smoothing=smoothing,
        margin=draw(st.sampled_from(margins)),
        guide=draw(st.sampled_from(guides)),
        candidate_bias=draw(st.sampled_from((None, None, "normal", "padded"))) if loss in BIASED else None,
        staleness=draw(st.sampled_from((0.0, -3.0, 2.0))) if loss in DECOMPOSABLE else 0.0,
        block=block,
        decomposable=tuple(options),
        losses=(loss,),
    )


@st.composite
def ways_of(draw: Any, loss: str | None = None) -> Way:
    """How to put it. Without a loss: a search, of which nothing is differentiated."""
    backend = draw(st.sampled_from(BACKENDS))
    names = () if loss is None else (*differentiable(loss), *(("candidate_bias",) if loss in BIASED else ()))
    frozen = draw(st.sets(st.sampled_from(names))) if names and draw(st.booleans()) else set()
    return Way(
        dtype=draw(st.sampled_from(DTYPES if backend == "torch" else DTYPES[:-1])),
        backend=backend,
        reduction=draw(st.sampled_from(REDUCTIONS)) if names else "none",
        needs=tuple(name for name in names if name not in frozen),
        workspace=draw(st.sampled_from(WORKSPACES)),
        one_call=draw(st.booleans()),
        numbers=draw(st.booleans()),
        normalize=draw(st.booleans()),
        default_dtype=draw(st.sampled_from((torch.float32, torch.float32, torch.float64, torch.bfloat16))),
        threads=draw(st.sampled_from((1, 2))),
        within=draw(st.sampled_from((None,) * len(WAYS) + WAYS)) if names else None,
    )


def loss_cases() -> Any:
    """(loss, problem, way)."""

    def of(loss: str) -> Any:
        return st.tuples(st.just(loss), problems_of(loss), ways_of(loss)).map(_with_a_truth)

    return st.sampled_from((*PAIRED, *ONE_WAY)).flatmap(of)


def _with_a_truth(case: tuple[str, Problem, Way]) -> tuple[str, Problem, Way]:
    """Where digits cancel, the truth of float64 is no better than what is compared with it: float32 then.

    Nor are normalisers those of large features that are normalised later.
    """
    loss, problem, way = case
    if problem.guide is not None:  # whose scores, of unit vectors, would be no whole numbers
        way = replace(way, normalize=False)
    if problem.features in LARGE:
        way = replace(way, normalize=False, dtype=torch.float32 if way.dtype == torch.float64 else way.dtype)
    return loss, problem, way
