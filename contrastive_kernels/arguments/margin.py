"""Bounds above which a candidate counts as a positive that nobody labelled, and the scores of given pairs."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from .checks import is_number, shown

__all__ = ["Margin", "check_margin", "check_margin_of_loss", "require_no_margin", "scores_of", "upper_bounds"]

#: An absolute one, or ("relative", m).
Margin = float | tuple[str, float]


def check_margin(margin: Any, name: str = "margin") -> None:
    """None, a finite number, or a relative one."""
    if margin is None:
        return
    number = margin
    if isinstance(margin, (tuple, list)) and len(margin) == 2 and isinstance(margin[0], str):
        if margin[0] != "relative":
            raise ValueError(f"{name}: expected a number or ('relative', number); got {shown(margin)}")
        number = margin[1]
    if not is_number(number):
        raise TypeError(f"{name}: expected None, a number or ('relative', number); got {shown(margin)}")
    if not -sys.float_info.max <= number <= sys.float_info.max:
        raise ValueError(f"{name}: expected a finite number; got {shown(margin)}")


def require_no_margin(margin: Any, name: str) -> None:
    """Of members of a loss whose sums over candidates do not know of one."""
    if margin is not None:
        raise ValueError(f"margin: expected None with {name}; got {shown(margin)}")


def check_margin_of_loss(margin: Any, label_smoothing: float) -> None:
    """A margin, of a loss whose target lies on the positive alone."""
    check_margin(margin)
    if label_smoothing:
        require_no_margin(margin, "label_smoothing")


def upper_bounds(own: Tensor, margin: Margin) -> Tensor:
    """The largest score that a candidate may have [N], from the positives' scores [N], or logits for logits."""
    return own * (1 + float(margin[1])) if isinstance(margin, (tuple, list)) else own + float(margin)


def scores_of(x: Tensor, y: Tensor, index: Tensor, dtype: torch.dtype, memory: int) -> Tensor:
    """<x_i, y_p> [N, P] of the documents p in index [N, P], in `dtype`; -inf where it is -1."""
    n, count = index.shape
    if not len(y) or not n:
        return torch.full((n, count), -torch.inf, dtype=dtype, device=x.device)
    rows = max(1, memory // (3 * max(count, 1) * x.shape[1] * dtype.itemsize))
    found = []
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        partners = y[index[part].clamp(min=0)].to(dtype)  # [rows, P, D]
        found.append((partners * x[part, None].to(dtype)).sum(2).masked_fill(index[part] < 0, -torch.inf))
    return torch.cat(found)
