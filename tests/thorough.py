"""How much of a long list a run takes: a part in which everything is met once, or with `make thorough` all of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

THOROUGH = bool(os.environ.get("THOROUGH"))
#: Why a test is left to the long form.
LONG = "minutes: make thorough"


def one_of(number: int, several: Sequence[T]) -> Sequence[T]:
    """One of several, in turn by the number of whom they belong to; all of them in the long form."""
    return several if THOROUGH or not several else (several[number % len(several)],)


def every(step: int) -> int:
    """The step of a slice: 1 in the long form."""
    return 1 if THOROUGH else step
