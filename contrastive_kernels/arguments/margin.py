"""Scores of given pairs, and the bounds above which a candidate counts as a positive that nobody labelled."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..arguments.checks import is_number, shown

__all__ = ["Margin", "check_margin", "scores_of", "upper_bounds"]

#: An absolute one, or ("relative", m).
Margin = float | tuple[str, float]


def check_margin(margin: Any) -> None:
    """None, a finite number, or a relative one."""
    if margin is None:
        return
    number = margin
    if isinstance(margin, (tuple, list)) and len(margin) == 2 and isinstance(margin[0], str):
        if margin[0] != "relative":
            raise ValueError(f"margin: expected a number or ('relative', number); got {shown(margin)}")
        number = margin[1]
    if not is_number(number):
        raise TypeError(f"margin: expected None, a number or ('relative', number); got {shown(margin)}")
    if not math.isfinite(number):
        raise ValueError(f"margin: expected a finite number; got {shown(margin)}")


def upper_bounds(x: Tensor, y: Tensor, index: Tensor, margin: Margin, dtype: torch.dtype, memory: int) -> Tensor:
    """The largest score that a candidate may have [N]; +inf for a row whose positive, in index [N, 1], is -1."""
    own = scores_of(x, y, index, dtype, memory)[:, 0]
    bound = own * (1 + float(margin[1])) if isinstance(margin, (tuple, list)) else own + float(margin)
    return bound.masked_fill(index[:, 0] < 0, torch.inf)


def scores_of(x: Tensor, y: Tensor, index: Tensor, dtype: torch.dtype, memory: int) -> Tensor:
    """<x_i, y_p> [N, P] of the documents p in index [N, P], in `dtype`; -inf where it is -1."""
    n, count = index.shape
    found = torch.full((n, count), -torch.inf, dtype=dtype, device=x.device)
    if not len(y):
        return found
    rows = max(1, memory // (3 * max(count, 1) * x.shape[1] * dtype.itemsize))
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        partners = y[index[part].clamp(min=0)].to(dtype)  # [rows, P, D]
        found[part] = (partners * x[part, None].to(dtype)).sum(2).masked_fill_(index[part] < 0, -torch.inf)
    return found
