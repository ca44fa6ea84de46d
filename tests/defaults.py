"""torch's default dtype and device, which are the user's: losses under others than usual."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from problems import ALL, BY_NAME, Inputs, engine_options, make_inputs
from thorough import one_of
from torch import Tensor

import contrastive_kernels as ck

#: Default dtypes, and a default device where nothing can be computed.
DEFAULTS = ("bfloat16", "float64", "meta")


@contextmanager
def torch_default(name: str) -> Iterator[None]:
    """Another default inside the block."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    if name == "meta":
        torch.set_default_device("meta")
    else:
        torch.set_default_dtype(getattr(torch, name))
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_default_device(None if device.type == "cpu" else device)


def depending(backend: str, problems: Sequence[str] = ("base", "panels")) -> list[str]:
    """Which losses of 16-bit features depend on the default, to the bit: of one panel, and of several."""
    found = []
    for problem in problems:
        inputs = make_inputs(BY_NAME[problem], torch.bfloat16)
        for number, loss in enumerate(ALL):
            for reduction in one_of(number, ("mean", "none")):
                options = {**engine_options(inputs, loss, backend), "reduction": reduction}
                usual = _outcome(inputs, loss, options)
                for name in DEFAULTS:
                    with torch_default(name):
                        others = _outcome(inputs, loss, options)
                    if not all(torch.equal(one, other) for one, other in zip(usual, others)):
                        found.append(f"{problem} {loss} {reduction} under {name}")
    return found


def _outcome(inputs: Inputs, loss: str, options: dict[str, Any]) -> list[Tensor]:
    """The value and the gradients of the features and of the scale."""
    leaves = [v.detach().clone().requires_grad_() for v in (inputs.x, inputs.y, inputs.scale)]
    value = inputs.call(ck, loss, *leaves, inputs.bias, **options)
    return [value.detach(), *torch.autograd.grad(value.sum(), leaves, allow_unused=True, materialize_grads=True)]
