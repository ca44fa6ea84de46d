"""What kind of tensor comes in, and its memory as the engine reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["is_named_only", "looped", "readable", "settled", "with_copies", "with_others"]


def is_named_only(kind: type) -> bool:
    """Whether a type is a subclass of Tensor that changes no operation, whose memory is a tensor's."""
    if kind is Tensor or kind is torch.nn.Parameter or not issubclass(kind, Tensor):
        return False
    return kind.__torch_dispatch__ is Tensor.__torch_dispatch__


def settled(upstream: Tensor) -> Tensor:
    """What comes from upstream in memory as it is: torch knows of lazy negatives, and of zeros without memory."""
    return upstream.resolve_neg().clone() if upstream.is_neg() or upstream._is_zerotensor() else upstream


def readable(saved: Tensor) -> Tensor:
    """A saved tensor as what is prepared reads it: hooks may have given its values another layout or place."""
    if saved.is_neg():
        saved = saved.resolve_neg()
    if not saved.is_contiguous():
        saved = saved.contiguous()
    return saved.clone() if saved.data_ptr() & 15 else saved


def with_others(tensors: Sequence[Any], places: Sequence[int], others: Sequence[Any]) -> tuple[Any, ...]:
    """The tensors with others in these places."""
    changed = list(tensors)
    for place, other in zip(places, others):
        changed[place] = other
    return tuple(changed)


def with_copies(tensors: Sequence[Any], places: Sequence[int]) -> tuple[Any, ...]:
    """The tensors with copies of those in these places."""
    return with_others(tensors, places, [None if tensors[k] is None else tensors[k].clone() for k in places])


def looped(function: Callable[..., Any], info: Any, in_dims: Any, inputs: Any) -> Any:
    """vmap as a loop over the batch: what is not a tensor of the batch is the same in every turn."""
    turns = []
    for i in range(info.batch_size):
        one = [v.select(d, i) if isinstance(d, int) else v for v, d in zip(inputs, in_dims)]
        turns.append(function(*one))
    stacked = [None if parts[0] is None else torch.stack(parts) for parts in zip(*turns)]
    return tuple(stacked), tuple(None if v is None else 0 for v in stacked)
