"""Wrappers that reduce gradients over ranks: what holds them back, and which backward passes they want to reduce in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

__all__ = ["no_syncs", "parameters_searched_for", "reducing"]

NoSync = Callable[[], AbstractContextManager[Any]]


def no_syncs(encoders: Sequence[Any], no_sync: Any) -> list[NoSync]:
    """What keeps wrappers from reducing gradients, each once."""
    if no_sync is not None and not callable(no_sync):
        raise TypeError(f"no_sync: expected a function that gives a context; got {type(no_sync).__name__}")
    wrappers = {id(each): each for each in encoders if callable(getattr(each, "no_sync", None))}
    own = [wrapper.no_sync for wrapper in wrappers.values()]
    return own if no_sync is None or no_sync in own else [*own, no_sync]


def _searching(encoder: Any, no_sync: Any) -> Any:
    """The wrapper behind an encoder, if it looks for parameters that its last forward pass did not use."""
    wrapper = encoder if callable(getattr(encoder, "no_sync", None)) else getattr(no_sync, "__self__", None)
    return wrapper if getattr(wrapper, "find_unused_parameters", False) else None


def reducing(encoders: Sequence[Any], no_sync: Any) -> list[bool]:
    """Of which encoders a chunk goes backward with reduction: all, but of a wrapper that searches the last alone.

    It takes the parameters of its other forward passes for unused, and reduces what gradients they have by then.
    """
    behind = [_searching(encoder, no_sync) for encoder in encoders]
    return [
        wrapper is None or all(wrapper is not later for later in behind[k + 1 :]) for k, wrapper in enumerate(behind)
    ]


def parameters_searched_for(encoders: Sequence[Any], no_sync: Any) -> set[int]:
    """The ids of the parameters of such wrappers, whose gradients have to be there before the last backward pass."""
    behind = (_searching(encoder, no_sync) for encoder in encoders)
    return {id(parameter) for wrapper in behind if wrapper is not None for parameter in wrapper.parameters()}
