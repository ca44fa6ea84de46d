"""Is a provider's result right? At a small size against the definition in float64, and at full size by a projection."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import normalize

from contrastive_kernels import reference

from .cases import DTYPES, Case, Inputs, make_inputs
from .formulas import BLOCKED, call_directly
from .providers import Provider

__all__ = ["CHECK_ROWS", "TOLERANCES", "Projection", "Verdict", "check_small", "evaluate", "project", "truth"]

#: Ragged against every tile and block of 64 ... 2,048, and large enough that more than one tile is walked.
CHECK_ROWS = 2200
#: Largest relative error of the value and of each gradient (against that gradient's largest entry). bfloat16 has 8
#: bits: a logit of 14 is rounded to 0.03, and the dense formula's weights are off by as much.
TOLERANCES = {"float64": 1e-9, "float32": 2e-4, "tf32": 1e-2, "float16": 1e-2, "bfloat16": 5e-2}
#: The projection at full size costs two float64 evaluations: seconds up to here, minutes beyond.
PROJECTION_ROWS = {"cpu": 16384, "cuda": 65536}


@dataclass(frozen=True)
class Verdict:
    """The largest error of a provider and where it is.

    Parameters
    ----------
    error : float
        Relative; infinite for a NaN.
    where : str
        "value", "dx", "dy", "dscale", "dbias" or "projection".
    tolerance : float
        What the case's dtype allows.
    rounded : bool
        What is above it comes of logits that are rounded to 16 bits.
    """

    error: float
    where: str
    tolerance: float
    rounded: bool = False

    @property
    def ok(self) -> bool:
        """Right within the tolerance, or as far as its dtype lets it be."""
        return self.rounded or self.error <= self.tolerance

    def __str__(self) -> str:
        sign = "<=" if self.error <= self.tolerance else ">"
        why = ": its logits are rounded" if self.rounded else ""
        return f"{self.where} off by {self.error:.1e} {sign} {self.tolerance:.0e}{why}"


def evaluate(forward: Callable[[], Tensor], inputs: Inputs, mode: str) -> Tensor:
    """The loss; in "fwd+bwd" the inputs' ``grad`` are filled afresh."""
    for leaf in inputs.leaves.values():
        leaf.grad = None
    if mode == "fwd":
        with torch.no_grad():
            return forward()
    loss = forward()
    loss.backward()
    return loss.detach()


def check_small(provider: Provider, case: Case, rows: int = CHECK_ROWS) -> Verdict:
    """A provider against ``reference.py`` in float64 on the same numbers, at ``rows`` rows of the same case."""
    verdict = _checked(provider, case.smaller(rows))
    if verdict.ok or not provider.rounds_logits or DTYPES[case.dtype].itemsize > 2:
        return verdict
    return replace(verdict, rounded=_checked(provider, replace(case.smaller(rows), dtype="float32")).ok)


def _checked(provider: Provider, small: Case) -> Verdict:
    inputs = make_inputs(small, seed=1)
    value = evaluate(provider.build(small, inputs), inputs, small.mode)
    expected, grads = truth(small, provider.normalizes)
    errors = {"value": abs(float(value) - expected) / max(abs(expected), 1.0)}
    for name, leaf in inputs.leaves.items():
        if leaf.grad is None:
            errors[f"d{name}"] = math.inf
            continue
        errors[f"d{name}"] = float((leaf.grad.cpu().double() - grads[name]).abs().max() / grads[name].abs().max())
    return _worst(errors, small.dtype)


@lru_cache(maxsize=8)
def truth(case: Case, normalized: bool) -> tuple[float, dict[str, Tensor]]:
    """The definition's value and gradients in float64, on the CPU."""
    i = make_inputs(case, seed=1).double()
    x, y = (normalize(i.x, dim=1), normalize(i.y, dim=1)) if normalized else (i.x, i.y)
    definition: Callable[..., Tensor] = getattr(reference, case.loss)
    loss = definition(x, y, i.scale, *i.extra)
    if case.mode == "fwd":
        return float(loss), {}
    loss.backward()
    return float(loss.detach()), {name: leaf.grad.cpu() for name, leaf in i.leaves.items() if leaf.grad is not None}


def _worst(errors: dict[str, float], dtype: str) -> Verdict:
    """The largest error, a NaN before everything."""
    finite = {name: error if math.isfinite(error) else math.inf for name, error in errors.items()}
    where = max(finite, key=lambda name: finite[name])
    return Verdict(finite[where], where, TOLERANCES[dtype])


@dataclass
class Projection:
    """At full size, where the definition does not fit: the value, and the gradients along one random direction.

    Both come from two float64 evaluations in row blocks at inputs +- step * direction, so that no gradient formula is
    involved, and one number covers every entry of every gradient.
    """

    value: float
    slope: float
    direction: dict[str, Tensor]

    def check(self, provider: Provider, value: Tensor, inputs: Inputs, dtype: str) -> Verdict:
        """A provider's result of the run at full size."""
        errors = {"value": abs(float(value) - self.value) / max(abs(self.value), 1.0)}
        if provider.normalizes:  # its gradients lack the radial part; the small size has checked them
            return _worst(errors, dtype)
        slope, square = 0.0, 0.0
        for name, leaf in inputs.leaves.items():
            if leaf.grad is None:
                return Verdict(math.inf, f"d{name}", TOLERANCES[dtype])
            grad = leaf.grad.double()
            slope += float((grad * self.direction[name]).sum())
            square += float((grad * grad).sum())
        if self.direction:
            errors["projection"] = abs(slope - self.slope) / max(math.sqrt(square), 1e-300)
        return _worst(errors, dtype)


def project(case: Case, inputs: Inputs, beyond: int = CHECK_ROWS) -> Projection | None:
    """The projection of a case, or None where the check at the small size has covered it or the cost is minutes."""
    if case.n <= beyond or max(case.shape) > PROJECTION_ROWS[torch.device(case.device).type]:
        return None
    i = inputs.double()
    blocked = BLOCKED[case.loss]
    generator = torch.Generator(case.device).manual_seed(2)
    with torch.no_grad():
        if case.mode == "fwd":
            return Projection(float(blocked(i, 1024, call_directly)), 0.0, {})
        leaves = i.leaves
        direction = {
            name: torch.randn(t.shape, generator=generator, dtype=t.dtype, device=case.device)
            for name, t in leaves.items()
        }
        # truncation and rounding are both near 1e-8 of the slope here
        step, values = 1e-5, []
        for sign in (1, -2):
            for name, leaf in leaves.items():
                leaf.add_(direction[name], alpha=sign * step)
            values.append(float(blocked(i, 1024, call_directly)))
    return Projection(sum(values) / 2, (values[0] - values[1]) / (2 * step), direction)
