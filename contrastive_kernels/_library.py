"""How operators are registered with torch.library: opaque to torch.compile, with autocast and autograd off inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["define"]

_LIBRARY = torch.library.Library("contrastive_kernels", "DEF")


def define(schema: str, fake: Callable[..., Any], implementation: Callable[..., Any]) -> Any:
    """Registers one operator. Autocast is live inside operators, and would round out= results: it is switched off."""
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
