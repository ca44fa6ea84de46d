"""Two losses of the same features: values and every gradient side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import vision  # noqa: F401  (before a library that imports torchvision)
from torch import Tensor


def features(
    n: int, d: int = 16, dtype: torch.dtype = torch.float64, seed: int = 0, count: int = 2, unit: bool = True
) -> list[Tensor]:
    """Matrices [n, d] that resemble one another, of unit length or not."""
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(n, d, generator=g, dtype=torch.float64)
    made = [common + torch.randn(n, d, generator=g, dtype=torch.float64) for _ in range(count)]
    return [(torch.nn.functional.normalize(v, dim=1) if unit else v).to(dtype) for v in made]


def value_and_gradients(loss: Callable[..., Any], tensors: Sequence[Any]) -> list[Tensor]:
    """What a loss of tensors gives (a sum of several, or of a dict's), and their gradients."""
    leaves = [
        t.detach().clone().requires_grad_(t.requires_grad or t.dim() > 0) if isinstance(t, Tensor) else t
        for t in tensors
    ]
    found = loss(*leaves)
    parts = list(found.values()) if isinstance(found, dict) else list(found) if isinstance(found, tuple) else [found]
    total = sum(part * (k + 1) for k, part in enumerate(parts))
    total.backward()
    grads = [t.grad for t in leaves if isinstance(t, Tensor) and t.requires_grad]
    return [*(part.detach() for part in parts), *grads]


def assert_same(ours: Callable[..., Any], theirs: Callable[..., Any], tensors: Sequence[Any]) -> None:
    """Float64: to 1e-9. The same in float32: no further from it than twice as far as the original, and a floor."""
    wide = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in tensors]
    torch.testing.assert_close(
        value_and_gradients(ours, wide), value_and_gradients(theirs, wide), rtol=1e-9, atol=1e-12
    )
    assert_no_worse(ours, theirs, [tensors], torch.float32, factor=2.0)


def assert_no_worse(
    ours: Callable[..., Any],
    theirs: Callable[..., Any],
    batches: Sequence[Sequence[Any]],
    dtype: torch.dtype,
    factor: float = 1.0,
) -> None:
    """In a dtype: the largest errors over some batches, against float64 of the same rounded inputs, on the average."""
    ours_off: Any = 0.0
    theirs_off: Any = 0.0
    floor: Any = 0.0
    for tensors in batches:
        narrow = [t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dim() else t for t in tensors]
        wide = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in narrow]
        truth = value_and_gradients(theirs, wide)
        found, original = value_and_gradients(ours, narrow), value_and_gradients(theirs, narrow)
        ours_off, theirs_off = ours_off + _off(found, truth), theirs_off + _off(original, truth)
        # of a correctly rounded result, in its own dtype
        floor = floor + 4 * torch.stack([torch.finfo(f.dtype).eps * t.abs().max() for f, t in zip(found, truth)])
    assert (ours_off <= factor * theirs_off + floor).all(), (ours_off / len(batches), theirs_off / len(batches))


def _off(found: list[Tensor], truth: list[Tensor]) -> Tensor:
    return torch.stack([(v.double() - exact).abs().max() for v, exact in zip(found, truth)])
