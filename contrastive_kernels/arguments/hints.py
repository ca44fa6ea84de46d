"""What is nearly always a mistake and yet no error: looked for in the first call that could show it, and only there."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

__all__ = ["look_at_lengths", "look_at_scale", "readable", "unseen"]

#: What no call has shown yet.
unseen = {"lengths", "scale"}

#: Rows that are looked at.
_ROWS = 64
#: A logarithm of a scale lies below (CLIP's ends at 4.6, and starts at 2.7); scales themselves lie above.
_LARGEST_LOGARITHM = 5.0
#: Lengths of rows that somebody meant to normalise.
_SHORTEST, _LONGEST = 0.5, 2.0


def look_at_lengths(x: Tensor, name: str) -> None:
    """Warns of features [N, D] that are far from unit length, for losses that are defined on the sphere."""
    if not readable(x) or x.dim() != 2 or not x.is_floating_point() or x.numel() == 0:
        return
    unseen.discard("lengths")
    length = torch.linalg.vector_norm(x.detach()[:_ROWS].float(), dim=1).nanmedian().item()
    if length < _SHORTEST or length > _LONGEST:
        warnings.warn(
            f"{name}: rows have a length of about {length:.3g}, and no normalize=True divides them by it; this loss is "
            "usually one of unit vectors (said once)",
            stacklevel=4,
        )


def look_at_scale(value: nn.Parameter) -> None:
    """Warns of a parameter that looks like the logarithm of the scale."""
    if not value.requires_grad or not readable(value):
        return
    unseen.discard("scale")
    number = value.detach().item()
    if number < _LARGEST_LOGARITHM:
        warnings.warn(
            f"logit_scale: a parameter of {number:.3g} looks like the logarithm of the scale, which multiplies the dot "
            "products as it is; pass its exp() if that is meant (said once)",
            stacklevel=4,
        )


def readable(value: Tensor) -> bool:
    """Whether the host may read a number: it waits for the device, once."""
    if torch.compiler.is_compiling() or type(value) not in (Tensor, nn.Parameter) or value.is_meta:
        return False
    if torch._C._are_functorch_transforms_active():  # under vmap there is no one number
        return False
    return value.is_cpu or (value.is_cuda and not torch.cuda.is_current_stream_capturing())
