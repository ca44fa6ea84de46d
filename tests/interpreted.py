"""The Triton backend in Triton's interpreter, on CPU tensors: a program, for the interpreter is chosen at import.

    python tests/interpreted.py panels | persistent | float32 | float16 | bfloat16 | whole | exact | hostile | launches

It prints what fails and exits with 1 then. Problems meet one of their losses, and of those in float32 every second
does; all of them do, and meet all losses, with THOROUGH=1.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

if __name__ == "__main__":  # not where pytest looks for doctests: the whole process would be interpreted
    os.environ["TRITON_INTERPRET"] = "1"

import defaults
import torch
from exact import EQUAL, assert_exact, equal
from interpreted_graphs import again
from interpreted_kept import keeping, kept_exponentials
from interpreted_numbers import products, rounding
from problems import ALL, BY_NAME, PROBLEMS, engine_options, make_inputs, run
from thorough import THOROUGH, every, one_of
from tolerance import assert_outcome
from triton.runtime import interpreter

import contrastive_kernels as ck
from contrastive_kernels import backends
from contrastive_kernels.panels.panel import Panel
from contrastive_kernels.panels.size import Size
from contrastive_kernels.panels.terms import PairTerm

#: Panels of thousands of columns, of which the unit matrix is too large.
LARGE = (
    "two-chunks", "three-chunks", "diagonal-of-a-block", "column-biases-far-apart", "ceilings-biased", "guide-of-rows",
)  # fmt: skip
#: Problem: its losses (None: all of them).
SUBSETS: dict[str, dict[str, tuple[str, ...] | None]] = {
    "float32": {
        "base": None,
        "n1": None,
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
        "common-256": ("info_nce", "sigmoid"),
        "common-block": ("decomposable",),
        "outliers": ("clip_loss", "decomposable_pair"),
        "siglip-start": None,
        "misaligned": ("clip_loss",),
        "sparse-weights": ("clip_loss", "decomposable_pair"),
        "very-stale": ("decomposable_pair",),
        "stale-panels": ("decomposable_pair",),
        "drawn-wide": ("decomposable",),
        "ids": None,
        "dcl-softmax": None,
        "candidate-bias": None,
        "padded": ("info_nce", "sigmoid", "decomposable"),
        "biased-zero-scale": ("info_nce",),
        "ids-panels": ("clip_loss", "nt_xent", "sup_con", "sup_con_inside_wide", "multi_positive_nce"),
        "smoothed": None,
        "margin": ("info_nce", "clip_loss", "nt_xent", "decomposable_pair"),
        "margin-panels": ("nt_xent",),
        "guide-panels": ("info_nce", "nt_xent"),
        "smoothed-panels": ("nt_xent",),
        "smoothed-wide": None,
        "n3": ("clip_loss", "nt_xent", "sup_con_wide", "multi_positive_nce_wide"),
        "common-100": ("clip_loss", "nt_xent", "decomposable_pair", "sup_con_inside"),
        "ids-sigmoid-wide": None,
        "ids-far-apart": ("clip_loss", "sigmoid", "decomposable_pair"),
        "ids-equal": ("nt_xent", "sigmoid"),
    },
    "float16": {
        "base": None,
        "nearly-solved": ("clip_loss", "decomposable_pair"),
        "panels": ("clip_loss",),
        "t0.01": ("nt_xent", "sigmoid"),
        "zero-weights": ("clip_loss",),
        "sparse-weights": ("decomposable",),
        "rather-stale": None,
        "ids-solved": ("clip_loss", "sigmoid", "sup_con_wide"),
        "smoothed-solved": ("clip_loss",),
        "candidate-bias": ("info_nce",),
    },
    "bfloat16": {
        "base": None,
        "nearly-solved": ("info_nce", "sup_con"),
        "wide-panels": ("info_nce",),
        "margin-relative": ("clip_loss",),
        "guide": ("clip_loss",),
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


class OnScores:
    """The backend for panels whose scores are there: they are the product of themselves and the unit matrix."""

    name = "triton"

    def __init__(self) -> None:
        self.backend = backends.get("triton")

    def _given(self, panel: Panel) -> Panel:
        (rows, cols), cpu = panel.scores.shape, torch.device("cpu")
        size = Size(rows, cols, cols, torch.float32, cpu, False, 0, 132, False)
        scratch = torch.full((self.backend.scratch(rows, cols, size),), torch.nan)
        x, y = panel.scores.clone(), torch.eye(cols)
        return replace(panel, x=x, y=y, scratch=scratch, factor=panel.params[:1])

    def reduce_panel(self, term: PairTerm, panel: Panel) -> None:
        self.backend.reduce_panel(term, self._given(panel))

    def weight_panel(self, term: PairTerm, panel: Panel) -> None:
        self.backend.weight_panel(term, self._given(panel))


class Persistently(OnScores):
    """The same by persistent_kernel with this tile; rows are padded to what the TMA unit copies."""

    def __init__(self, tile: Any) -> None:
        super().__init__()
        self.tile = tile

    def _given(self, panel: Panel) -> Panel:
        from contrastive_kernels._triton.launch import Scratch

        given = super()._given(panel)
        given.scratch = torch.full((sum(Scratch.of(self.tile.part, *panel.scores.shape)),), torch.nan)
        given.x, given.y = (torch.nn.functional.pad(t, (0, -t.shape[1] % 4)) for t in (given.x, given.y))
        return given

    def weight_panel(self, term: PairTerm, panel: Panel) -> None:
        given = self._given(panel)
        rows, cols = panel.weights.shape
        given.weights = torch.full((rows, cols + -cols % 8), torch.nan, dtype=panel.weights.dtype)[:, :cols]
        self.backend.weight_panel(term, given)
        panel.weights.copy_(given.weights)


def persistent() -> list[str]:
    """The cases of panels(), half of them in tiles of one part and half of four."""
    from contrastive_kernels._triton import configs, launch, persistent_launch

    chosen, failures = launch._persistent_tile, []
    started = []
    start = persistent_launch.start

    def starting(kernel, *arguments):
        started.append(kernel)
        start(kernel, *arguments)

    persistent_launch.start = starting
    tiles = (configs.PersistentTile(64, 64, 32, 4, 1), configs.PersistentTile(32, 128, 32, 4, 1, parts=4))
    for k, tile in enumerate(tiles):
        launch._persistent_tile = lambda *_, tile=tile: tile
        some = slice(k, None, len(tiles) * every(20) + (not THOROUGH))  # (not in step with the checks of a case)
        failures += [f"{tile}: {failure}" for failure in panels(Persistently(tile), some)]
    if not THOROUGH:  # (which has all of them above)
        failures += panels(Persistently(tiles[1]), slice(1, None, 24), "ceilings")
    launch._persistent_tile = chosen
    persistent_launch.start = start
    assert len(started) > (100 if THOROUGH else 4)
    return failures + small_gains() + kept_exponentials()


def small_gains() -> list[str]:
    """What fails of 16-bit weights whose gains are small: rows with larger normalisers than the mean keep digits.

    In float16 the factor lifts them; in bfloat16 there is none, and they would be subnormal where they are referred.
    """
    from contrastive_kernels._triton import configs, launch

    x, y = (torch.nn.functional.normalize(torch.randn(64, 16, dtype=torch.float64)) for _ in range(2))
    x *= torch.where(torch.arange(64) < 32, 70.0, 1.4)[:, None]
    failures = []
    for dtype, gain, factor in ((torch.float16, 1e-30, 2.0**14 / 1e-30), (torch.bfloat16, 1e-34, 1.0)):
        z = x.to(dtype).double() @ y.to(dtype).double().T
        normalizer = torch.logsumexp(z, 1)
        gains, factors, params = torch.full((64,), gain), torch.tensor([factor]), torch.tensor([1.0, 0.0, 0.0])
        tile, weights = configs.PersistentTile(32, 64, 16, 4, 1), torch.empty(64, 64, dtype=dtype)
        scratch = torch.full((sum(launch.Scratch.of(tile.part, 64, 64)),), torch.nan)
        row = launch.Vectors(None, torch.stack([normalizer.float(), torch.zeros(64)]), gains)
        operands, sides = (x.to(dtype), y.to(dtype)), (row, launch.Vectors())
        launch.run_panel("exponential", *operands, params, launch.Pairs(), *sides, scratch, weights, factors, tile=tile)
        wanted = gain * factor * torch.exp(z - normalizer[:, None])
        error = ((weights.double() - wanted).abs().amax(1) / wanted.amax(1)).max().item()
        if not error < torch.finfo(dtype).eps:
            failures.append(f"small gains of {dtype}: weights are off by {error}")
    return failures


def panels(backend: OnScores | None = None, chosen: slice = slice(None), named: str = "") -> list[str]:
    """What fails of the cases that all backends meet, panel by panel; of those whose names begin so."""
    sys.path.insert(0, str(Path(__file__).parent / "backends"))
    import test_panel_pass as tests
    from panels import CASES, Case

    failures, backend = [], backend or OnScores()
    checks = [tests.test_reduce_panel, tests.test_weights_in_place_and_without_parameter_sums]
    checks += [tests.test_sigmoid_panels]
    for states, dtype in ((False, torch.float32), (True, torch.float32), (True, torch.float16)):
        checks.append(partial(tests.test_weight_panel, dtype=dtype, with_states=states))
    small = {name: make() for name, make in CASES.items() if name not in LARGE}
    # a usual tile rounds relative to z - shift, wherever the center lies and whatever the scale
    small["high-without-center"] = Case(65, 131, level=1e4, params=(1.0, 0.0, 0.0))
    small["high-and-scaled"] = Case(65, 131, level=1e4, params=(0.7, 0.0, 0.0))
    runs = [(name, partial(check, backend, case)) for name, case in small.items() for check in checks]
    runs.append(("without negatives", partial(tests.test_rows_without_negatives_weigh_nothing, backend)))
    for rows, cols in ((1, 1), (2, 1), (1, 2), (40, 40)):
        check = partial(tests.test_rows_of_nothing_beside_small_normalizers, backend, rows, cols)
        runs.append((f"{rows} x {cols}", check))
    for name, check in [each for each in runs if each[0].startswith(named)][chosen]:
        try:
            check()
        except AssertionError as error:
            failures.append(f"{name} {check}: {error}")
    return failures


def problems_of(dtype: torch.dtype) -> list[str]:
    """What fails of a dtype's problems."""
    failures = []
    subset = list(enumerate(SUBSETS[str(dtype).removeprefix("torch.")].items()))
    for number, (name, losses) in subset[:: every(2) if dtype == torch.float32 else 1]:
        inputs = make_inputs(BY_NAME[name], dtype)
        for loss in one_of(number, inputs.problem.losses if losses is None else losses):
            number += 1
            reduction = ("mean", "none")[number % 2]
            try:
                outcome = run(ck, inputs, loss, dtype, reduction=reduction, **engine_options(inputs, loss, "triton"))
                assert_outcome(inputs, loss, reduction, outcome)
            except AssertionError as error:
                failures.append(f"{name} {loss} {reduction}: {error}")
    return failures


def exact() -> list[str]:
    """What fails of equal logits: prepared, and in panels with the products of the gradients behind them."""
    failures = []
    for number, name in enumerate(EQUAL):
        for k, dtype in enumerate((torch.float32, torch.bfloat16)):
            inputs = make_inputs(equal(name, 8), dtype)
            for loss in [*ALL][(number + k) % every(2) :: every(2)]:
                for reduction in ("mean", "none"):
                    outcome = run(ck, inputs, loss, dtype, reduction=reduction, backend="triton")
                    try:
                        assert_exact(inputs, loss, reduction, outcome)
                    except AssertionError as error:
                        failures.append(f"{name} {loss} {reduction} {dtype}: {error}")
    return failures


def whole() -> list[str]:
    """What fails of means and sums of small matrices, which are prepared; and of second derivatives and kept graphs."""
    from contrastive_kernels._triton import whole_launch

    prepared: list[str] = []
    forward = whole_launch._Whole.forward

    def counting(self, *arguments):
        prepared.append(type(self).__name__)
        return forward(self, *arguments)

    whole_launch._Whole.forward = counting
    failures = []
    # (ids, biases, smoothing and denominators without the positive are never prepared: the other programs have them)
    usual = [p for p in PROBLEMS if p.ids is None and p.candidate_bias is None and p.include_positive]
    usual = [p for p in usual if not p.label_smoothing and p.margin is None and p.guide is None]
    for number, problem in enumerate(p for p in usual if max(p.n, p.m or p.n) <= 130 and not p.small_panels):
        for dtype in one_of(number // 2, (torch.float32, torch.bfloat16)):
            inputs, reduction = make_inputs(problem, dtype), ("mean", "sum")[number % 2]
            losses = problem.losses  # in bfloat16 one of them: only the product's operands are others
            if dtype != torch.float32 or not THOROUGH:
                losses = (losses[(number + (dtype != torch.float32)) % len(losses)],)
            for loss in losses:
                options = engine_options(inputs, loss, "triton")
                try:
                    outcome = run(ck, inputs, loss, dtype, reduction=reduction, **options)
                    assert_outcome(inputs, loss, reduction, outcome)
                except AssertionError as error:
                    failures.append(f"{problem.name} {loss} {reduction} {dtype}: {error}")
    if len(prepared) < (50 if THOROUGH else 25) or set(prepared) != {"WholeSoftmax", "WholeSigmoid", "WholeRatio"}:
        failures.append(f"prepared were {len(prepared)}: {set(prepared)}")
    return failures + again() + whole_persistently()


def whole_persistently() -> list[str]:
    """What fails of the same where their panel is one of persistent programs."""
    from contrastive_kernels._triton import configs, whole_launch
    from contrastive_kernels.operators import prepared

    tiles, failures, made = [configs.PersistentTile(32, 64, 32, 4, 1, parts=parts) for parts in (1, 2)], [], 0
    launches = whole_launch._Panel._persistent_launches

    def counting(*arguments):
        nonlocal made
        made += 1
        return launches(*arguments)

    with patch.object(whole_launch._Panel, "_persistent_launches", counting):
        losses = ("clip_loss", "nt_xent", "sigmoid", "decomposable_pair", "info_nce")[:: every(2)]
        for number, loss in enumerate(losses):
            inputs = make_inputs(BY_NAME["n64"], torch.bfloat16)
            prepared._prepared.clear()
            with patch.object(whole_launch, "persistent_tile_of", lambda *_, tile=tiles[number % 2]: tile):
                outcome = run(ck, inputs, loss, torch.bfloat16, reduction="mean", backend="triton")
            try:
                assert_outcome(inputs, loss, "mean", outcome)
            except AssertionError as error:
                failures.append(f"persistently: {loss}: {error}")
    prepared._prepared.clear()
    passes = sum(1 if loss in ("sigmoid", "decomposable_pair") else 2 for loss in losses)
    return failures if made == passes else [*failures, f"{made} panels by persistent programs, expected {passes}"]


def hostile() -> list[str]:
    """What fails of NaN and infinity among the inputs, of equality of two runs, and under other defaults of torch."""
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
    failures += [f"depends on torch's default: {what}" for what in defaults.depending("triton", ["n3"])]
    return failures + lazy_negatives() + rounding() + products()


def lazy_negatives() -> list[str]:
    """What fails of tensors whose negation torch has put off, as features, scale, weights and from upstream."""
    x, y = (torch.nn.functional.normalize(torch.randn(5, 8)) for _ in range(2))
    results = []
    for late in (torch.neg, torch._neg_view):
        for reduction in ("mean", "none"):
            a, b = late(-x).requires_grad_(), y.clone().requires_grad_()
            scale, weight = late(torch.tensor(-5.0)), late(-torch.arange(1.0, 6.0))
            loss = ck.clip_loss(a, b, scale, weight=weight, reduction=reduction, backend="triton")
            loss.backward(late(torch.full_like(loss, -0.5)))
            results += [loss.detach(), a.grad, b.grad]
    half = len(results) // 2
    same = [torch.equal(a, b) for a, b in zip(results[:half], results[half:])]
    return [] if all(same) else [f"lazy negatives are read with the wrong sign: {same}"]


def launches() -> dict[str, tuple[int, int]]:
    """Launches of value and gradients by case: as planned, and as counted."""
    from contrastive_kernels._triton import launch, whole, whole_launch
    from contrastive_kernels.engine import workspace

    counted = 0
    started = launch._launch
    of_panels = (launch.score_kernel, launch.rest_kernel, launch.merge_kernel, whole.sigmoid_kernel)

    def counting(function):
        def run(first, *arguments, **keywords):
            nonlocal counted
            counted += function is not started or first in of_panels
            return function(first, *arguments, **keywords)

        return run

    launch._launch, whole_launch.product = counting(started), counting(whole_launch.product)
    workspace.Workspace.accumulate = counting(workspace.Workspace.accumulate)
    result = {}
    for loss, n, workspace_bytes in (("clip_loss", 130, 65536), ("nt_xent", 70, 65536), ("sigmoid", 65, 2**20)):
        counted = 0
        x, y = (torch.randn(n, 24).requires_grad_() for _ in range(2))
        scale = torch.ones((), requires_grad=True)
        more = (-1.0,) if loss == "sigmoid" else ()
        getattr(ck, loss)(x, y, scale, *more, backend="triton", workspace_bytes=workspace_bytes).backward()
        plan = ck.plan(n, d=24, loss=loss, backend="triton", workspace_bytes=workspace_bytes)
        result[f"{loss} {n}"] = (sum(each.launches for each in plan.passes), counted)
    with keeping(False) as weighed:
        counted, options = 0, {"backend": "triton", "workspace_bytes": 80_000}
        x, y = (torch.randn(n, 24).requires_grad_() for n in (130, 120))
        ck.info_nce(x, y, torch.ones((), requires_grad=True), **options, positives=torch.zeros(130).long()).backward()
        planned = sum(each.launches for each in ck.plan(130, 120, 24, loss="info_nce", **options).passes)
    result["info_nce in bands"] = (planned, counted + len(weighed))
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
    named = {"exact": exact, "hostile": hostile, "persistent": persistent, "whole": whole}
    named["panels"] = partial(panels, chosen=slice(None, None, every(17)))
    failed = named[what]() if what in named else problems_of(getattr(torch, what))
    print("\n".join(failed))
    sys.exit(bool(failed))
