"""What tests on a GPU share: the problems' arguments there, and what torch's own products are there."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from problems import Inputs, Outcome
from tolerance import Product

import contrastive_kernels as ck

DEVICE = torch.device("cuda")


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def require(backend: str, dtype: torch.dtype) -> None:
    """Skips where the backend cannot serve this GPU."""
    reason = ck.why_not(backend, torch.zeros(1, 1, dtype=dtype, device=DEVICE))
    if reason is not None:
        pytest.skip(reason)


def on_gpu(inputs: Inputs) -> Inputs:
    """The same arguments on the GPU, in the same layout."""

    def moved(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(moved, value))
        if not isinstance(value, torch.Tensor):
            return value
        if value.dim() == 2 and not value.is_contiguous():
            length = value.untyped_storage().size() // value.element_size()
            base = torch.full((length,), torch.nan, dtype=value.dtype, device=DEVICE)
            view = base.as_strided(value.shape, value.stride(), value.storage_offset())
            (view[:1] if 0 in value.stride() else view).copy_(value[:1] if 0 in value.stride() else value)
            return view
        return value.to(DEVICE)

    return dataclasses.replace(inputs, **{f.name: moved(getattr(inputs, f.name)) for f in dataclasses.fields(inputs)})


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b in float32 as torch multiplies large matrices on the GPU; before torch 2.8 without tensor cores.

    The rows of one and the columns of the other are repeated, for cuBLAS adds a small product in several parts, whose
    bias is smaller: 2,048 x 2,048 are tiles enough for every multiprocessor.
    """
    rows, cols = a.shape[0], b.shape[1]
    if not rows or not cols:
        return torch.zeros(rows, cols)
    a = a.to(DEVICE).repeat(-(-2048 // rows), 1)
    b = b.to(DEVICE).T.repeat(-(-2048 // cols), 1).T
    if a.dtype == torch.float32:
        made = a @ b
    elif DEVICE.type == "cuda" and hasattr(torch.ops.aten.mm, "dtype"):
        made = torch.mm(a, b, out_dtype=torch.float32)
    else:
        made = a.float() @ b.float()
    return made[:rows, :cols].cpu()


def tensor_cores(dtype: torch.dtype) -> Product | None:
    """Torch's own products, where tensor cores make them."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        return product
    return product if dtype.itemsize == 2 else None


def on_cpu(outcome: Outcome) -> Outcome:
    return outcome.map(lambda name, value: value.cpu())


def features_near(n, d, dtype):
    """Unit vectors: one [D] with dot products near 0.45, one [D] with some near 0, and x and y [N, D]."""
    g = torch.Generator().manual_seed(d)
    common = torch.nn.functional.normalize(torch.randn(1, d, generator=g), dim=1)

    def beside(length, share):
        noise = torch.randn(length, d, generator=g)
        noise = torch.nn.functional.normalize(noise - noise @ common.T * common, dim=1)
        return (share**0.5 * common + (1 - share) ** 0.5 * noise).to(dtype).to(DEVICE)

    return beside(1, 0.45)[0], beside(1, 0.0)[0], beside(n, 0.45), beside(n, 0.45)
