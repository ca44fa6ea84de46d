"""Functions of the Triton kernels on single numbers, in its interpreter: a part of ``tests/interpreted.py hostile``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from contrastive_kernels._triton.sigmoid import FACTORS, sum_by_products

__all__ = ["products", "rounding"]


@triton.jit
def products_kernel(e_ptr, out_ptr, FACTORS: tl.constexpr):
    rows = tl.arange(0, 16)
    e = tl.load(e_ptr + rows[:, None] * 128 + tl.arange(0, 128)[None, :])
    tl.store(out_ptr + rows, sum_by_products(e, FACTORS))


def products() -> list[str]:
    """What fails of logarithms of products, which compiled kernels take in place of sums of logarithms."""
    e = torch.exp(-torch.linspace(0, 40, 16)[:, None] * (0.5 + torch.rand(16, 128)))
    e[0] = 1.0
    found = torch.empty(16)
    products_kernel[(1,)](e, found, FACTORS=FACTORS)
    wanted = e.double().log1p().sum(1)
    error = ((found.double() - wanted).abs() / wanted).max().item()
    return [] if error < 1e-6 else [f"sums by products are off by {error}"]


def rounding() -> list[str]:
    """What fails of TF32: operands are rounded, not cut off, once and where torch allows it."""
    from contrastive_kernels._triton.vector_launch import tensor_core_operand

    x = torch.randn(65, 33) * torch.logspace(-30, 30, 33)
    x[0, :4] = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0])
    x[1, 0] = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)[0]  # NaN
    failures = [] if tensor_core_operand(x) is x else ["float32 is rounded though torch allows no TF32"]
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        rounded = tensor_core_operand(x)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    finite = x.isfinite()
    error = (rounded[finite].double() - x[finite].double()) / x[finite].double().abs().clamp(min=1e-300)
    if not torch.equal(rounded.view(torch.int32)[finite] & 0x1FFF, torch.zeros_like(x[finite], dtype=torch.int32)):
        failures.append("digits are left that the tensor cores cut off")
    if error.abs().max() > 2**-11 or (rounded[finite].abs() > x[finite].abs()).double().mean() < 0.4:
        failures.append("float32 is not rounded to the nearest TF32")
    if not torch.equal(rounded[0, :4], x[0, :4]) or not rounded[1, 0].isnan():
        failures.append("inf or NaN has not stayed")
    return failures
