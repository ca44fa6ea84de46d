"""How a check meets its examples: the same few in every run of the tests, or new ones for FUZZ_SECONDS."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from typing import Any

import hypothesis
from hypothesis import HealthCheck

#: Seconds that all fuzzing tests take together; 0: a fixed number of examples each, the same in every run.
SECONDS = float(os.environ.get("FUZZ_SECONDS") or 0)
#: Between two looks at the clock.
BATCH = 50


def fuzzed(examples: int, **strategies: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a test of a check: `examples` of its arguments in `make test`, as many as there is time for otherwise."""

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        def test(share: float) -> None:
            if not share:
                _run(check, strategies, examples, None)
                return
            end, met = time.monotonic() + share, 0
            while time.monotonic() < end:
                _run(check, strategies, BATCH, random.SystemRandom().getrandbits(64))
                met += BATCH
            print(f"{check.__name__}: {met} examples")

        test.__name__ = test.__qualname__ = check.__name__
        test.__doc__, test.__module__ = check.__doc__, check.__module__
        return test

    return decorate


def _run(check: Callable[..., None], strategies: dict[str, Any], examples: int, seed: int | None) -> None:
    """Some examples: drawn from a seed, or from what the check is named. A failure prints the smallest one found."""
    settings = hypothesis.settings(
        max_examples=examples,
        derandomize=seed is None,
        database=None,
        deadline=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )

    def named(**arguments: Any) -> None:
        check(**arguments)

    named.__name__ = named.__qualname__ = check.__name__
    run = settings(hypothesis.given(**strategies)(named))
    if seed is not None:
        run = hypothesis.seed(seed)(run)
    run()
