"""From tensors to launches of the kernels around the panels; see vectors.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import launch
from .start import Arguments
from .vectors import dots_kernel, gains_kernel, gradients_kernel, losses_kernel, tf32_kernel

__all__ = [
    "DOTS_ROWS",
    "Gains",
    "block_d",
    "gains",
    "gradients",
    "losses",
    "positive_dots",
    "tensor_core_operand",
]

#: Rows of a program, and features at a time.
DOTS_ROWS = _ROWS = 16
_FEATURES = 256
#: Rows of a program that has only vectors.
_VECTOR = 1024
#: The names of the kernels' options; each kernel's constants always come in one order.
_OPTIONS = {"num_warps": 4, "num_stages": 1}


class Gains(NamedTuple):
    """What a gradient pass of the softmax loss is told."""

    #: [3] scale, 0 and a center of the scores
    params: Tensor
    #: [N], [N]
    row: Tensor
    col: Tensor | None
    #: [N] dL/d<x_i, y_p(i)>
    coefficients: Tensor
    #: float64 [2] the positives' part of dL/d(scale, bias)
    dparams: Tensor


def _programs(n: int, block: int) -> int:
    return -(-n // block)


def block_d(d: int) -> int:
    """Features that are read at a time."""
    return min(max(1 << (d - 1).bit_length(), 16), _FEATURES)


def positive_dots(
    x: Tensor,
    y: Tensor,
    index: Tensor | None,
    offset: int | None,
    scale: Tensor | float,
    bias: Tensor | float,
    centered: bool,
) -> tuple[Tensor, Tensor]:
    """<x_i, y_p(i)> [N], 0 where a row has no positive; and (scale, bias, 0 or a center of these) [3]. N > 0."""
    n, d = x.shape
    dots, params = (torch.empty(k, dtype=torch.float32, device=x.device) for k in (n, 3))
    launch._launch(
        dots_kernel, _programs(n, _ROWS),
        Arguments(
            x, y, index, None, _detached(scale), _detached(bias), dots, params, None, None,
            n, offset or 0, d, x.stride(0), y.stride(0), 0.0,
        ),
        SCALE_IS_TENSOR=isinstance(scale, Tensor), BIAS_IS_TENSOR=isinstance(bias, Tensor), CENTERED=centered,
        BLOCK=_ROWS, BLOCK_D=block_d(d), **_OPTIONS,
    )  # fmt: skip
    return dots, params


def losses(
    row_state: Tensor,
    col_state: Tensor | None,
    dots: Tensor,
    params: Tensor,
    gain: Tensor | None,
    share: float,
    summed: bool,
) -> Tensor:
    """gain_i * share * softplus(n_i - z_i) [N], of rows and of columns, or their sum; N > 0.

    The states (shift, sum) [2, N] become normalisers (shift, rest), with a rest of +inf where there was nothing.
    """
    n = dots.shape[0]
    programs = _programs(n, _VECTOR)
    shape = () if summed and programs == 1 else (programs if summed else n,)
    out = torch.empty(shape, dtype=torch.float32, device=dots.device)
    launch._launch(
        losses_kernel, programs, Arguments(row_state, col_state, dots, params, gain, out, n, share),
        SUMMED=summed, BLOCK=_VECTOR, **_OPTIONS,
    )  # fmt: skip
    return out.sum() if summed and programs > 1 else out


def gains(
    row: Tensor,
    col: Tensor | None,
    dots: Tensor,
    scale: Tensor | float,
    gain: Tensor | None,
    share: float,
    upstream: Tensor,
) -> Gains:
    """Gains of rows and columns, coefficients of the positives and what they add to dparams; N > 0."""
    n = dots.shape[0]
    programs = _programs(n, _VECTOR)
    made = torch.empty(2 if col is None else 3, n, dtype=torch.float32, device=dots.device).unbind()
    params = torch.empty(3, dtype=torch.float32, device=dots.device)
    partials = torch.empty((2,) if programs == 1 else (programs, 2), dtype=torch.float64, device=dots.device)
    col_gain = None if col is None else made[2]
    launch._launch(
        gains_kernel, programs,
        Arguments(
            row, col, dots, _detached(scale), gain, upstream, params, made[0], col_gain, made[1], partials, n, share
        ),
        SCALE_IS_TENSOR=isinstance(scale, Tensor), UPSTREAM_BY_ROW=upstream.dim() == 1, BLOCK=_VECTOR,
        CENTER_ROWS=_ROWS, **_OPTIONS,
    )  # fmt: skip
    return Gains(params, made[0], col_gain, made[1], partials if programs == 1 else partials.sum(0))


def gradients(
    x: Tensor,
    y: Tensor,
    index: Tensor | None,
    offset: int | None,
    coefficients: Tensor | None,
    rescale: Tensor | None,
    dx: tuple[Tensor, Tensor] | None,
    dy: tuple[Tensor, Tensor] | None,
    first: int = 0,
) -> None:
    """Finishes (sums, out) of dx, its rows from `first` on, and of dy: rescaled, with the positives' part, rounded.

    Without coefficients there is no such part; with an index, that of dx's rows, dy has its part already.
    """
    (n, d), m = x.shape, y.shape[0]
    rows = 0 if dx is None else dx[1].shape[0]
    programs = _programs(rows, _ROWS) + (0 if dy is None else _programs(m, _ROWS))
    if not programs:
        return
    dx_sums, dx_out = (None, None) if dx is None else dx
    dy_sums, dy_out = (None, None) if dy is None else dy
    launch._launch(
        gradients_kernel, programs,
        Arguments(
            x, y, index, coefficients, rescale, dx_sums, dx_out, dy_sums, dy_out,
            n, m, rows, first, offset or 0, d, x.stride(0), y.stride(0),
        ),
        BLOCK=_ROWS, BLOCK_D=block_d(d), **_OPTIONS,
    )  # fmt: skip


def tensor_core_operand(x: Tensor) -> Tensor:
    """x [N, D] as the tensor cores take it: float32 rounded, where torch's setting allows TF32; else x itself."""
    n = x.numel()
    if launch.precision_of(x.dtype) != "tf32" or not n:
        return x
    out = torch.empty_like(x)
    launch._launch(tf32_kernel, _programs(n, _VECTOR), Arguments(x.detach(), out, n), BLOCK=_VECTOR, **_OPTIONS)
    return out


def _detached(value: Tensor | float) -> Tensor | float:
    return value.detach() if isinstance(value, Tensor) else value
