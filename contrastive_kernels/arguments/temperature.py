"""The scale of logits as its inverse, a temperature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..panels.size import score_dtype
from .checks import Refused, check_number, check_scale, check_vector

__all__ = ["scale_of"]


def scale_of(x: Any, logit_scale: Any, temperature: Any, prefix: str = "") -> Any:
    """1 / temperature; what is wrong with it, for ``check_scale`` to raise, where all ranks of a group hear of it.

    Parameters
    ----------
    x : Tensor
        Features [N, D], not checked so far.
    logit_scale
        None: one of both is expected.
    temperature : float or Tensor
        A number above 0, or a tensor of one element or of [N], which nobody looks into; None: the scale is as it is.
    prefix : str
        What the names of both begin with.
    """
    if temperature is None or not isinstance(x, Tensor):
        return logit_scale
    name = f"{prefix}temperature"
    try:
        if logit_scale is not None:
            other = f"an {prefix}logit_scale" if prefix else "a logit_scale"
            raise TypeError(f"{name}: expected None beside {other}; got {type(temperature).__name__}")
        if isinstance(temperature, (torch.SymFloat, torch.SymInt)):
            return 1.0 / temperature
        if isinstance(temperature, Tensor):
            if temperature.dim() == 1 and temperature.numel() != 1:
                check_vector(temperature, name, x.shape[0], x, differentiable=True)
            else:
                check_scale(x, temperature, name)
            return temperature.to(score_dtype(x.dtype)).reciprocal()
        number, least = (
            check_number(temperature, name, positive=True),
            1.0 / torch.finfo(score_dtype(x.dtype)).max,
        )
        if number < least:
            raise ValueError(f"{name}: expected a number of at least {least:.3g}; got {number}")
        return 1.0 / number
    except (TypeError, ValueError) as error:
        return Refused(error)
