"""The package as a way of asking has it, and the truth to it: reference.py in float64, by the rule of tolerance.py."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import problems
import tolerance
import torch
from drawn import Way
from hypothesis import assume
from paths import walked
from problems import Inputs, Outcome, Problem, make_inputs, run
from torch import Tensor
from within import around, through

import contrastive_kernels as ck
from contrastive_kernels import reference
from contrastive_kernels.arguments.checks import normalized


class Asked:
    """The package with a way's numbers and normalisation; problems.run calls its losses."""

    def __init__(self, way: Way) -> None:
        self.way = way

    def __getattr__(self, name: str) -> Callable[..., Tensor]:
        function = getattr(ck, name)

        def call(x: Tensor, y: Tensor, *rest: Any, **options: Any) -> Tensor:
            drawn = "generator" in options  # which vmap does not allow, and a checkpoint refuses
            way = None if self.way.within in ("vmap", "checkpoint") and drawn else self.way.within
            asked = through(way, function)
            return asked(x, y, *map(self._number, rest), normalize=self.way.normalize, **options)

        return call

    def _number(self, value: Any) -> Any:
        scalar = isinstance(value, Tensor) and value.dim() == 0 and not value.requires_grad
        return value.item() if scalar and self.way.numbers else value


class Normalizing:
    """The reference of normalised features.

    Their values are rounded as the package rounds them, for a 16-bit rounding is worth more than what the rule allows;
    that they are right is asserted in `unit`. The gradients are those of the exact norm.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def unit(self, v: Tensor) -> Tensor:
        """Rows over their norms."""
        exact, dtype = v.detach().double(), torch.finfo(self.dtype)
        exact = exact / exact.norm(dim=1, keepdim=True)
        found = normalized(v.detach().to(self.dtype)).double()
        assert ((found - exact).abs() <= 4 * dtype.eps * exact.abs() + dtype.tiny).all()
        over = v / v.norm(dim=1, keepdim=True)
        return over + (found.to(v.dtype) - over).detach()

    def __getattr__(self, name: str) -> Callable[..., Tensor]:
        function = getattr(reference, name)
        return lambda x, y, *rest, **options: function(self.unit(x), self.unit(y), *rest, **options)


@contextlib.contextmanager
def settings_of(way: Way) -> Iterator[None]:
    """torch's own settings, and the walk."""
    before, threads = torch.get_default_dtype(), torch.get_num_threads()
    try:
        torch.set_num_threads(way.threads)
        with walked("usual" if way.one_call else "large"), around(way.within):
            torch.set_default_dtype(way.default_dtype)
            yield
    finally:
        torch.set_default_dtype(before)
        torch.set_num_threads(threads)


def workspace_of(way: Way, call: Callable[[int], Any]) -> int | None:
    """workspace_bytes for a call that refuses a workspace that is too small; None: the usual one."""
    return math.ceil(way.workspace * problems.smallest_workspace(call)) if way.workspace else None


def lengthened(inputs: Inputs) -> Inputs:
    """The same with rows of lengths that are powers of 2, which no dtype rounds."""
    return replace(inputs, x=_longer(inputs.x), y=_longer(inputs.y))


def _longer(v: Tensor) -> Tensor:
    return v * _lengths(v)[:, None].to(v.dtype)


def _lengths(v: Tensor) -> Tensor:
    return 2.0 ** (torch.arange(len(v), dtype=torch.float64) % 5)


def ask(loss: str, inputs: Inputs, way: Way) -> Outcome:
    """What the package answers."""
    copies = inputs.x.clone(), inputs.y.clone()

    def call(size: int | None) -> Outcome:
        options = {} if size is None else {"workspace_bytes": size}
        return run(
            Asked(way), inputs, loss, way.dtype, way.needs, reduction=way.reduction, backend=way.backend, **options
        )  # fmt: skip

    with settings_of(way):
        outcome = call(workspace_of(way, call))
    for before, now in zip(copies, (inputs.x, inputs.y)):
        assert torch.equal(before, now), "the features were written to"
    return outcome


def truth_of(loss: str, problem: Problem, way: Way) -> tuple[Inputs, Outcome, Outcome, dict[str, Tensor]]:
    """The inputs to ask with, the truth, float32 torch's errors, and the floors."""
    inputs = make_inputs(problem, way.dtype)
    expected = tolerance.expected(problem, loss, way.dtype, way.reduction)
    floors = tolerance.floors(problem, loss, way.dtype, way.reduction)
    if way.dtype == torch.float64:  # whose truth has roundings of its own, which few entries do not level out
        floors = {name: 4 * floor for name, floor in floors.items()}
    if not way.normalize:
        return inputs, *expected, floors
    inputs, module = lengthened(inputs), Normalizing(way.dtype)
    truth = run(module, inputs, loss, torch.float64, reduction=way.reduction)
    if way.dtype == torch.float64:
        errors = expected[1]
    else:
        plain = run(module, inputs, loss, torch.float32, reduction=way.reduction)
        rounded = plain.map(lambda name, v: v.to(way.dtype) if name in ("x", "y") else v)
        of_length = {"x": _lengths(inputs.x)[:, None], "y": _lengths(inputs.y)[:, None]}
        errors = rounded.map(
            lambda name, v: torch.maximum(
                (v.double() - truth[name]).abs(), expected[1][name] / of_length.get(name, 1.0)
            )
        )
    # a gradient leaves its loss and then its norm: two roundings, of rows that are as many times smaller
    longer = {name: 2 * floors[name] / _lengths(v)[:, None] for name, v in (("x", inputs.x), ("y", inputs.y))}
    return inputs, truth, errors, floors | longer


def assert_right(loss: str, problem: Problem, way: Way) -> None:
    """Value, gradients and their dtypes, by the one rule. No NaN where the reference is finite."""
    try:
        inputs, truth, errors, floors = truth_of(loss, problem, way)
        assume(fits(truth, way.dtype))
        ours = ask(loss, inputs, way)
    finally:
        for cached in (tolerance.expected, tolerance.floors, problems.make_inputs):
            cached.cache_clear()
    scores = problems.score_dtype(way.dtype)
    needs = [name for name in way.needs if name != "candidate_bias" or problem.candidate_bias is not None]
    for name in ("value", "x", "y", "scale", "bias", *ours.gradients.keys() & {"candidate_bias"}):
        if name != "value":
            assert (ours.gradients[name] is not None) == (name in needs), f"d{name}: expected for {needs} alone"
            if name not in needs:
                continue
        assert ours[name].dtype == (way.dtype if name in ("x", "y") else scores), name
        assert_near(name, ours[name], truth[name], errors[name], floors[name])


def assert_near(name: str, ours: Tensor, truth: Tensor, torch_error: Tensor, floor: Tensor) -> None:
    """The rule for one result. Of one number the root mean square is the maximum, and has the maximum's floor."""
    if ours.numel() != 1:
        tolerance.assert_accurate(name, ours, truth, torch_error, floor)
        return
    tolerance.assert_accurate(name, ours, truth, torch_error, 4 * floor)
    error, allowed = (ours.double() - truth).abs().item(), (2 * torch_error + floor).sum().item()
    assert error <= allowed, f"{name}: got {ours.item():.9g}, expected {truth.item():.9g}; {error:.3g} > {allowed:.3g}"


def fits(truth: Outcome, dtype: torch.dtype) -> bool:
    """Whether the dtype holds the truth, with room for what is added up on the way."""
    largest = torch.finfo(torch.float16).max / 16 if dtype == torch.float16 else 1e30
    results = [truth.value, *(g for g in truth.gradients.values() if g is not None)]
    return all(bool((v.abs() < largest).all()) for v in results)
