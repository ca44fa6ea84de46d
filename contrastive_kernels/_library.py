"""What torch.compile does not look into: operators, registered with torch.library, and functions outside graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

# A decorator: torch.compile leaves the function alone. torch.compiler.disable imports the compiler at once (as much
# time as torch itself takes); this, which torch.optim uses, when the first call comes.
from torch._compile import _disable_dynamo as outside_graphs

__all__ = ["break_in_graphs", "constant_in_graphs", "define", "outside_graphs"]

_LIBRARY = torch.library.Library("contrastive_kernels", "DEF")


def break_in_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator: `outside_graphs` where something is compiled, and the function itself where nothing is.

    The wrapper of the former takes as long as all that is done before a first message between ranks.
    """
    apart = outside_graphs(function)

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        return (apart if torch.compiler.is_compiling() else function)(*args, **options)

    return call


def constant_in_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator: torch.compile calls the function, and takes what it returns for a constant.

    What torch.compiler.assume_constant_result sets, which imports the compiler at once.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function


def define(schema: str, fake: Callable[..., Any], implementation: Callable[..., Any]) -> Any:
    """Registers one operator, inside which autograd is off, and autocast too: it would round out= results."""
    name = schema.split("(")[0]

    def run(*args: Any) -> Any:
        device = (args[0][0] if isinstance(args[0], (list, tuple)) else args[0]).device.type
        with torch.no_grad():
            # (entering it takes as long as a small operation)
            if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
                return implementation(*args)
            with torch.autocast(device, enabled=False):
                return implementation(*args)

    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"contrastive_kernels::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.contrastive_kernels, name).default
