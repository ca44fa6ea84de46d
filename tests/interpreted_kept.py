"""What tests/interpreted.py asks of exponentials that are kept: the one rule, in one band and several, NaN, bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from keeping import small_bands
from poison import PLACES, poisoned
from problems import BY_NAME, make_inputs, run
from thorough import every
from tolerance import assert_outcome

import contrastive_kernels as ck
from contrastive_kernels._triton import configs, kept_launch, launch, persistent_launch

#: Problem, loss, dtype, workspace (None: the default), bands or matrices, by persistent programs. In the short form,
#: every third one.
CASES: tuple[tuple[str, str, torch.dtype, int | None, int, bool], ...] = (
    ("base", "clip_loss", torch.bfloat16, None, 1, True),
    ("base", "info_nce", torch.float32, None, 1, True),
    ("outliers", "clip_loss", torch.bfloat16, None, 1, True),
    ("t0.001", "clip_loss", torch.bfloat16, None, 1, False),
    ("offset-panels", "info_nce", torch.bfloat16, 80_000, 3, True),
    ("outliers", "info_nce", torch.bfloat16, None, 1, False),
    ("index-panels", "info_nce", torch.float32, 80_000, 5, False),
    ("huge", "clip_loss", torch.float32, None, 1, False),
    ("candidate-bias", "clip_loss", torch.bfloat16, None, 2, True),
    ("common-256", "info_nce", torch.bfloat16, None, 1, True),
    ("ids", "clip_loss", torch.bfloat16, None, 1, False),
    ("zero-scale", "clip_loss", torch.float32, None, 1, False),
    ("padded-index", "info_nce", torch.bfloat16, None, 1, True),
    ("dcl-softmax", "clip_loss", torch.float32, None, 1, False),
    ("one-row", "info_nce", torch.bfloat16, None, 1, False),
    ("sparse-weights", "clip_loss", torch.bfloat16, 2**20, 1, False),
    ("margin", "clip_loss", torch.float32, None, 0, False),  # two sides that leave out other pairs: never kept
    ("smoothed", "clip_loss", torch.float32, None, 0, False),
    ("base", "clip_loss", torch.float16, None, 0, False),
)


@contextmanager
def keeping(persistent: bool) -> Iterator[list[Any]]:
    """Within it matrices of any width are kept, in bands of any size; what has been weighed so."""
    started: list[Any] = []
    start, of_size = kept_launch.start, launch._persistent_tile

    def starting(kernel: Any, *arguments: Any) -> Any:
        started.append(kernel)
        return start(kernel, *arguments)

    def tile(x: Any, y: Any, *rest: Any) -> Any:
        copied = persistent_launch.copies_by_tma(x, y, *(t for t in rest[:1] if t is not None))
        return configs.PersistentTile(32, 64, 16, 4, 1, parts=2) if persistent and copied else of_size(x, y, *rest)

    with ExitStack() as held:
        held.enter_context(small_bands())
        for owner, name in PLACES:  # memory that nobody wrote is NaN
            held.enter_context(mock.patch.object(owner, name, poisoned(getattr(owner, name))))
        held.enter_context(mock.patch.object(kept_launch, "start", starting))
        held.enter_context(mock.patch.object(launch, "_persistent_tile", tile))
        yield started


def kept_exponentials() -> list[str]:
    """What fails of value and gradients where exponentials are kept."""
    failures = []
    for name, loss, dtype, workspace, bands, persistent in CASES[:: every(3)]:
        inputs = make_inputs(BY_NAME[name], dtype)
        with keeping(persistent) as started:
            outcome = run(ck, inputs, loss, dtype, reduction="mean", backend="triton", workspace_bytes=workspace)
        if len(started) != bands:
            failures.append(f"{name} {loss} {dtype}: {len(started)} bands of kept exponentials, expected {bands}")
        try:
            assert_outcome(inputs, loss, "mean", outcome)
        except AssertionError as error:
            failures.append(f"kept exponentials: {name} {loss} {dtype}: {error}")
    return failures + _nan_and_bits()


def _nan_and_bits() -> list[str]:
    """What fails of NaN in a row, and of two runs' equality."""
    failures = []
    inputs = make_inputs(BY_NAME["base"], torch.bfloat16)
    with keeping(False):
        first, second = (run(ck, inputs, "clip_loss", torch.bfloat16, backend="triton") for _ in range(2))
        if not all(torch.equal(first[name], second[name]) for name in ("value", "x", "y", "scale")):
            failures.append("kept exponentials: two runs differ")
        x = inputs.x.clone()
        x[-1, 3] = torch.nan
        x.requires_grad_()
        value = ck.info_nce(x, inputs.y, inputs.scale, backend="triton")
        value.backward()
        if not value.isnan() or not x.grad[-1].isnan().all() or x.grad[0].isnan().any():
            failures.append(f"kept exponentials: NaN in a row gives {value.item()} and {x.grad[-1]}, {x.grad[0]}")
    return failures
