"""Matrices that are small, taken for such that a GPU's backend makes the scores of once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

from contrastive_kernels.engine import strategy

__all__ = ["small_bands"]


@contextmanager
def small_bands() -> Iterator[None]:
    """Within it any workspace asks, features may be as few and bands as short as they like, and nothing is prepared."""
    with ExitStack() as held:
        for name, value in (
            ("KEPT_FEATURES", 1),
            ("KEPT_SHARE", 10**6),
            ("PREPARED_SCORES", 0),
            ("asked_to_keep", lambda size: True),
        ):
            held.enter_context(mock.patch.object(strategy, name, value))
        for remembered in (strategy.remembered, strategy.remembered_shape):
            remembered.cache_clear()
            held.callback(remembered.cache_clear)
        yield
