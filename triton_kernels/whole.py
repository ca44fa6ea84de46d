"""The kernels that make value and gradients of a matrix that is one panel, beside those of the scores.

A small batch takes as long as its launches take the host, so each does all that can be done at its place. The gradients
come with the value, up to the factor from upstream: what is left to the backward pass is one kernel. A program writes
what no other program writes, and sums are taken in one order: two runs agree bitwise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .merge import merged
from .sigmoid import sigmoid_from, softplus_from
from .vectors import center_of, dots_of, finish_rows, normalizer_of, number, softmax_exponent, store_params

__all__ = [
    "ratio_kernel",
    "relative_dots_kernel",
    "scaled_gradients_kernel",
    "sigmoid_kernel",
    "softmax_kernel",
    "totals_kernel",
]

_INF = tl.constexpr(float("inf"))


@triton.jit
def _store_sums(ptr, loss, dscale, dbias, inside):
    """A program's part of the value, and of dL/d(scale, bias), in float64."""
    tl.store(ptr, tl.sum(tl.where(inside, loss, 0.0).to(tl.float64), 0))
    tl.store(ptr + 1, tl.sum(tl.where(inside, dscale, 0.0).to(tl.float64), 0))
    tl.store(ptr + 2, tl.sum(tl.where(inside, dbias, 0.0).to(tl.float64), 0))


@triton.jit
def _softmax_side(
    partials_ptr, normalizer_ptr, gain_ptr, gain, z, rows, inside, N, blocks,
    TERM: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """(softplus(n - z), gain * sigmoid(n - z)) [BLOCK], 0 without negatives; leaves normaliser and gain."""
    shift, total = merged(partials_ptr, rows, inside, N, blocks, TERM, BLOCK, PARTS)
    shift, rest = normalizer_of(shift, total)
    tl.store(normalizer_ptr + rows, shift, mask=inside)
    tl.store(normalizer_ptr + N + rows, rest, mask=inside)
    t = softmax_exponent(shift, rest, z)
    e = tl.exp(-tl.abs(t))
    softmax = gain * tl.where(rest == _INF, 0.0, sigmoid_from(t, e))
    tl.store(gain_ptr + rows, softmax, mask=inside)
    return tl.where(rest == _INF, 0.0, softplus_from(t, e)), softmax


@triton.jit(do_not_specialize=["gain_ptr", "N", "row_blocks", "col_blocks", "share"])
def softmax_kernel(
    row_partials_ptr,  # [col_blocks, 2, N]
    col_partials_ptr,  # [row_blocks, 2, N] or None
    dots_ptr,  # [N]
    params_ptr,  # [3]
    gain_ptr,  # [N] or None
    row_normalizer_ptr,  # [2, N]
    row_gain_ptr,  # [N]
    col_normalizer_ptr,  # [2, N] or None
    col_gain_ptr,  # [N] or None
    coefficients_ptr,  # [N] dL/d<x_i, y_p(i)>
    sums_ptr,  # float64 [programs, 3] of losses, and of what the positives add to dL/d(scale, bias)
    N, row_blocks, col_blocks,
    share,
    TERM: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """From partial results to losses, normalisers and gains of the gradient pass, for an upstream gradient of 1."""
    program = tl.program_id(0)
    rows = program * BLOCK + tl.arange(0, BLOCK)
    inside = rows < N
    scale = tl.load(params_ptr)
    center = tl.load(params_ptr + 2)
    dots = tl.load(dots_ptr + rows, mask=inside, other=0.0)
    z = dots * scale
    gain = tl.zeros([BLOCK], tl.float32) + share
    if gain_ptr is not None:
        gain *= tl.load(gain_ptr + rows, mask=inside, other=0.0)
    loss, softmax = _softmax_side(
        row_partials_ptr, row_normalizer_ptr, row_gain_ptr, gain, z, rows, inside, N, col_blocks, TERM, BLOCK, PARTS
    )
    if col_partials_ptr is not None:
        col_loss, col_softmax = _softmax_side(
            col_partials_ptr, col_normalizer_ptr, col_gain_ptr, gain, z, rows, inside, N, row_blocks, TERM, BLOCK, PARTS
        )
        loss += col_loss
        softmax += col_softmax
    tl.store(coefficients_ptr + rows, -softmax * scale, mask=inside)
    _store_sums(sums_ptr + 3 * program, loss * gain, -softmax * (dots - center), -softmax, inside)


@triton.jit
def _two_sum(a, b):
    """a + b as (rounded sum, exact remainder); where b is infinite, as (a, b)."""
    total = a + b
    part = total - a
    rest = (a - (total - part)) + (b - part)
    infinite = tl.abs(b) == _INF
    return tl.where(infinite, a, total), tl.where(infinite, b, rest)


@triton.jit
def _relative_side(given_ptr, copy_ptr, normalizer_ptr, gain_ptr, z, gain, log_k, rows, inside, N):
    """Leaves the normaliser z + given - log k and the gain of a side; without negatives where a row does not count."""
    given = tl.load(given_ptr + rows, mask=inside, other=0.0)
    tl.store(copy_ptr + rows, given, mask=inside)
    shift, rest = _two_sum(z, tl.where(gain == 0, _INF, given - log_k))
    tl.store(normalizer_ptr + rows, shift, mask=inside)
    tl.store(normalizer_ptr + N + rows, rest, mask=inside)
    tl.store(gain_ptr + rows, gain, mask=inside)


@triton.jit(
    do_not_specialize=["scale", "bias", "row_given_ptr", "col_given_ptr", "gain_ptr", "N", "offset", "share", "log_k"]
)
def relative_dots_kernel(
    x_ptr,  # [N, D]
    y_ptr,  # [M, D]
    scale,
    bias,
    dots_ptr,  # [N]
    params_ptr,  # [3]
    row_given_ptr,  # [N]
    col_given_ptr,  # [N] or None
    gain_ptr,  # [N] or None
    row_copy_ptr,  # [N] of what is given
    col_copy_ptr,  # [N] or None
    row_normalizer_ptr,  # [2, N]
    row_gain_ptr,  # [N]
    col_normalizer_ptr,  # [2, N] or None
    col_gain_ptr,  # [N] or None
    N, offset, D,
    share,
    log_k,
    SCALE_IS_TENSOR: tl.constexpr, BIAS_IS_TENSOR: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dots_i = <x_i, y_(i + offset)>; normalisers known relative to their logits, as two numbers; and gains."""
    program = tl.program_id(0)
    rows = program * BLOCK + tl.arange(0, BLOCK)
    inside = rows < N
    partner = tl.where(inside, rows + offset, 0).to(tl.int64)
    dots = dots_of(x_ptr, y_ptr, rows, partner, inside, D, D, D, BLOCK, BLOCK_D)
    tl.store(dots_ptr + rows, dots, mask=inside)
    factor = number(scale, SCALE_IS_TENSOR)
    added = number(bias, BIAS_IS_TENSOR)
    if program == 0:
        store_params(params_ptr, factor, added, center_of(dots, rows, N))
    z = dots * factor + added
    gain = tl.zeros([BLOCK], tl.float32) + share
    if gain_ptr is not None:
        gain *= tl.load(gain_ptr + rows, mask=inside, other=0.0)
    _relative_side(row_given_ptr, row_copy_ptr, row_normalizer_ptr, row_gain_ptr, z, gain, log_k, rows, inside, N)
    if col_given_ptr is not None:
        _relative_side(col_given_ptr, col_copy_ptr, col_normalizer_ptr, col_gain_ptr, z, gain, log_k, rows, inside, N)


@triton.jit
def _ratio_side(
    partials_ptr, given_ptr, normalizer_ptr, gain_ptr, rows, inside, N, blocks, c, excess,
    TERM: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """gain * exp(found - given normaliser) [BLOCK], 0 where nothing is found; and gain * (c u - log u - excess).

    The latter in float64, so that values near 0 keep their digits. Where c is 0 no u, however large, counts.
    """
    shift, total = merged(partials_ptr, rows, inside, N, blocks, TERM, BLOCK, PARTS)
    given_shift = tl.load(normalizer_ptr + rows, mask=inside, other=0.0)
    given_rest = tl.load(normalizer_ptr + N + rows, mask=inside, other=_INF)
    nothing = total == 0
    rest = tl.log(tl.where(nothing, 1.0, total))
    ratio = tl.where(nothing, 0.0, tl.exp((tl.where(nothing, 0.0, shift) - given_shift) + (rest - given_rest)))
    gain = tl.load(gain_ptr + rows, mask=inside, other=0.0)
    given = tl.load(given_ptr + rows, mask=inside, other=0.0).to(tl.float64)
    of_positive = tl.where(c == 0, 0.0, c * tl.exp(-given))
    constant = tl.where(gain == 0, 0.0, gain * (of_positive + given - excess))
    return ratio * gain, constant


@triton.jit(do_not_specialize=["row_given_ptr", "col_given_ptr", "N", "row_blocks", "col_blocks", "c", "excess"])
def ratio_kernel(
    row_partials_ptr,  # [col_blocks, 2, N]
    col_partials_ptr,  # [row_blocks, 2, N] or None
    dots_ptr,  # [N]
    params_ptr,  # [3]
    row_given_ptr,  # [N] -log u
    col_given_ptr,  # [N] or None
    row_normalizer_ptr,  # [2, N]
    row_gain_ptr,  # [N]
    col_normalizer_ptr,  # [2, N] or None
    col_gain_ptr,  # [N] or None
    coefficients_ptr,  # [N] dL/d<x_i, y_p(i)>
    sums_ptr,  # float64 [programs, 3] of values, and of what the positives add to dL/d(scale, bias)
    N, row_blocks, col_blocks,
    c,
    excess,
    TERM: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Sums of exponentials relative to the positives' logits, which take as much as the weights give; and constants."""
    program = tl.program_id(0)
    rows = program * BLOCK + tl.arange(0, BLOCK)
    inside = rows < N
    value, constant = _ratio_side(
        row_partials_ptr, row_given_ptr, row_normalizer_ptr, row_gain_ptr, rows, inside, N, col_blocks, c, excess,
        TERM, BLOCK, PARTS,
    )  # fmt: skip
    if col_partials_ptr is not None:
        of_col, beside = _ratio_side(
            col_partials_ptr, col_given_ptr, col_normalizer_ptr, col_gain_ptr, rows, inside, N, row_blocks, c, excess,
            TERM, BLOCK, PARTS,
        )  # fmt: skip
        value += of_col
        constant += beside
    dots = tl.load(dots_ptr + rows, mask=inside, other=0.0)
    tl.store(coefficients_ptr + rows, -value * tl.load(params_ptr), mask=inside)
    dscale = -value * (dots - tl.load(params_ptr + 2))
    _store_sums(sums_ptr + 3 * program, value + constant, dscale, -value, inside)


@triton.jit(do_not_specialize=["N", "col_blocks"])
def sigmoid_kernel(
    row_partials_ptr,  # [col_blocks, 2, N]
    dots_ptr,  # [N]
    params_ptr,  # [3]
    gain_ptr,  # [N] what each row's loss is multiplied by
    coefficients_ptr,  # [N] dL/d<x_i, y_p(i)>
    sums_ptr,  # float64 [programs, 3] of losses, and of what the positives add to dL/d(scale, bias)
    N, col_blocks,
    TERM: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The losses gain_i * (the negatives' sum + softplus(-z_i)), and the positives' gradients."""
    program = tl.program_id(0)
    rows = program * BLOCK + tl.arange(0, BLOCK)
    inside = rows < N
    scale = tl.load(params_ptr)
    dots = tl.load(dots_ptr + rows, mask=inside, other=0.0)
    gain = tl.load(gain_ptr + rows, mask=inside, other=0.0)
    z = dots * scale + tl.load(params_ptr + 1)
    e = tl.exp(-tl.abs(z))
    _, negatives = merged(row_partials_ptr, rows, inside, N, col_blocks, TERM, BLOCK, PARTS)
    loss = gain * (negatives + softplus_from(-z, e))
    dz = -gain * sigmoid_from(-z, e)
    tl.store(coefficients_ptr + rows, dz * scale, mask=inside)
    _store_sums(sums_ptr + 3 * program, loss, dz * (dots - tl.load(params_ptr + 2)), dz, inside)


@triton.jit
def _sum(ptr, stride, n, BLOCK: tl.constexpr):
    """The sum of every stride-th of n * stride numbers, in float64."""
    index = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, n, BLOCK):
        inside = first + index < n
        total += tl.load(ptr + (first + index) * stride, mask=inside, other=0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["programs", "blocks"])
def totals_kernel(
    sums_ptr,  # float64 [programs, 3]
    params_partials_ptr,  # [blocks, 2] or None
    value_ptr,  # []
    dparams_ptr,  # float64 [2]
    programs, blocks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The value, and dL/d(scale, bias), of their parts; in one program."""
    tl.store(value_ptr, _sum(sums_ptr, 3, programs, BLOCK).to(tl.float32))
    if params_partials_ptr is not None:
        tl.store(dparams_ptr, _sum(sums_ptr + 1, 3, programs, BLOCK) + _sum(params_partials_ptr, 2, blocks, BLOCK))
        dbias = _sum(sums_ptr + 2, 3, programs, BLOCK) + _sum(params_partials_ptr + 1, 2, blocks, BLOCK)
        tl.store(dparams_ptr + 1, dbias)


@triton.jit
def _store_scaled(out_ptr, dparam_ptr, upstream):
    """A gradient of scale or bias, in its own dtype."""
    gradient = tl.load(dparam_ptr) * upstream
    if out_ptr.dtype.element_ty != tl.float64:  # the interpreter has no way from float64 to bfloat16 but this
        gradient = gradient.to(tl.float32)
    tl.store(out_ptr, gradient.to(out_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["upstream_ptr", "N", "M", "offset"])
def scaled_gradients_kernel(
    x_ptr,  # [N, D]
    y_ptr,  # [M, D]
    coefficients_ptr,  # [N]
    dparams_ptr,  # float64 [2]
    upstream_ptr,  # []
    dx_sums_ptr,  # [N, D] float32 or None
    dx_ptr,  # [N, D]
    dy_sums_ptr,  # [M, D] float32 or None
    dy_ptr,  # [M, D]
    dscale_ptr,  # [] or None
    dbias_ptr,  # [] or None
    N, M, offset, D,
    SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """upstream * (sums + the positive pairs' part), of dx, dy, dscale and dbias.

    dx_i has coefficient_i * y_p(i), and dy_p(i) coefficient_i * x_i, where p(i) = i + offset; where the matrix is
    symmetric, p(i) = i + offset modulo N = 2 * offset, and dx has both parts.
    """
    program = tl.program_id(0)
    upstream = tl.load(upstream_ptr)
    if program == 0:
        if dscale_ptr is not None:
            _store_scaled(dscale_ptr, dparams_ptr, upstream)
        if dbias_ptr is not None:
            _store_scaled(dbias_ptr, dparams_ptr + 1, upstream)
    dx_programs = 0
    if dx_sums_ptr is not None:
        dx_programs = tl.cdiv(N, BLOCK)
        if program < dx_programs:
            rows = program * BLOCK + tl.arange(0, BLOCK)
            coefficients = tl.load(coefficients_ptr + rows, mask=rows < N, other=0.0)
            partner = rows + offset
            if SYMMETRIC:
                partner = tl.where(partner < N, partner, partner - N)
                coefficients += tl.load(coefficients_ptr + partner, mask=rows < N, other=0.0)
            partner = tl.where(rows < N, partner, 0).to(tl.int64)
            finish_rows(dx_ptr, dx_sums_ptr, y_ptr, D, partner, coefficients * upstream, rows, N, D, upstream, BLOCK_D)
    if dy_sums_ptr is not None:  # noqa: SIM102 (known to the compiler, unlike what follows)
        if program >= dx_programs:
            rows = (program - dx_programs) * BLOCK + tl.arange(0, BLOCK)
            partner = rows - offset
            exists = (partner >= 0) & (partner < N) & (rows < M)
            partner = tl.where(exists, partner, 0).to(tl.int64)
            coefficients = tl.load(coefficients_ptr + partner, mask=exists, other=0.0) * upstream
            finish_rows(dy_ptr, dy_sums_ptr, x_ptr, D, partner, coefficients, rows, M, D, upstream, BLOCK_D)
