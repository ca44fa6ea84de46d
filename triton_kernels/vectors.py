"""The kernels of what surrounds the panels: the positive pairs, losses, gains, the last step of the gradients.

All is of size N or N D.
Each does in one launch what takes five to twenty operations of torch, and small batches consist of launches. A program
writes what no other program writes, and sums are taken in one order: two runs agree bitwise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .sigmoid import sigmoid_from, softplus_from

__all__ = [
    "center_of",
    "dots_kernel",
    "dots_of",
    "finish_rows",
    "gains_kernel",
    "gradients_kernel",
    "losses_kernel",
    "normalizer_of",
    "number",
    "softmax_exponent",
    "store_params",
    "tf32_kernel",
]

_INF = tl.constexpr(float("inf"))


@triton.jit
def number(value, IS_TENSOR: tl.constexpr):
    """A number that the host knows, or a tensor of one element, in float32."""
    if IS_TENSOR:
        return tl.load(value).to(tl.float32)
    else:  # noqa: RET505 (the compiler would see both)
        return tl.zeros([], tl.float32) + value


@triton.jit
def center_of(dots, rows, N):
    """A number near the positives' dot products: the mean of the first ones, if it is finite."""
    count = tl.minimum(N, rows.shape[0])
    center = tl.sum(tl.where(rows < N, dots, 0.0), 0) / count
    return tl.where(tl.abs(center) < _INF, center, 0.0)


@triton.jit
def store_params(params_ptr, scale, bias, center):
    tl.store(params_ptr, scale)
    tl.store(params_ptr + 1, bias)
    tl.store(params_ptr + 2, center)


@triton.jit
def _partner(index_ptr, rows, N, first, offset):
    """(the row of the other operand that these rows' positives are, whether there is one)."""
    exists = rows < N
    if index_ptr is None:
        partner = (rows + (first + offset)).to(tl.int64)
    else:
        partner = tl.load(index_ptr + rows, mask=exists, other=-1)
        exists = partner >= 0
    return tl.where(exists, partner, 0), exists


@triton.jit
def dots_of(
    x_ptr, y_ptr, rows, partner, exists, D, x_stride, y_stride, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """<x_i, y_partner(i)> [BLOCK], 0 where there is none."""
    features = tl.arange(0, BLOCK_D)
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * x_stride + features[None, :]
    y_ptrs = y_ptr + partner[:, None] * y_stride + features[None, :]
    sums = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for k in range(0, D, BLOCK_D):
        mask = exists[:, None] & (features[None, :] < D - k)
        x = tl.load(x_ptrs + k, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptrs + k, mask=mask, other=0.0).to(tl.float32)
        sums += x * y
    return tl.sum(sums, 1)


@triton.jit(do_not_specialize=["scale", "bias", "gain_ptr", "N", "offset", "share"])
def dots_kernel(
    x_ptr,  # [N, D]
    y_ptr,  # [M, D]
    index_ptr,  # int64 [N] or None
    mirror_ptr,  # int64 [N] or None: the positive of row i is i + offset modulo N, and is left here
    scale,
    bias,
    dots_ptr,  # [N]
    params_ptr,  # [3]
    gain_ptr,  # [N] or None
    row_gain_ptr,  # [N] or None
    N, offset, D, x_stride, y_stride,
    share,
    SCALE_IS_TENSOR: tl.constexpr, BIAS_IS_TENSOR: tl.constexpr, CENTERED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dots_i = <x_i, y_p(i)>, 0 where a row has no positive; params = (scale, bias, 0 or a center of the dots).

    And share * gain_i, the gains of the rows, where there is room for them.
    """
    program = tl.program_id(0)
    rows = program * BLOCK + tl.arange(0, BLOCK)
    partner, exists = _partner(index_ptr, rows, N, 0, offset)
    if mirror_ptr is not None:
        partner = tl.where(partner < N, partner, partner - N)
        tl.store(mirror_ptr + rows, partner, mask=exists)
    dots = dots_of(x_ptr, y_ptr, rows, partner, exists, D, x_stride, y_stride, BLOCK, BLOCK_D)
    tl.store(dots_ptr + rows, dots, mask=rows < N)
    if row_gain_ptr is not None:
        gain = tl.zeros([BLOCK], tl.float32) + share
        if gain_ptr is not None:
            gain *= tl.load(gain_ptr + rows, mask=rows < N, other=0.0)
        tl.store(row_gain_ptr + rows, gain, mask=rows < N)
    if program == 0:
        center = 0.0
        if CENTERED:
            center = center_of(dots, rows, N)
        store_params(params_ptr, number(scale, SCALE_IS_TENSOR), number(bias, BIAS_IS_TENSOR), center)


@triton.jit
def softmax_exponent(shift, rest, z):
    """n - z of a normaliser n = shift + rest, whose two numbers are never added: where they are large, digits go."""
    return rest - (z - shift)


@triton.jit
def normalizer_of(shift, total):
    """(shift, rest) of (shift, sum): a rest of +inf where there was nothing. An infinite sum is not nothing: NaN."""
    nothing = total == 0
    rest = tl.where(nothing, _INF, tl.log(tl.where(nothing, 1.0, total)))
    return tl.where(nothing, 0.0, shift), tl.where(total == _INF, float("nan"), rest)


@triton.jit
def _normalizer_of_state(state_ptr, rows, inside, N):
    """(shift, rest) of a state (shift, sum) [2, N], which they replace."""
    shift = tl.load(state_ptr + rows, mask=inside, other=0.0)
    total = tl.load(state_ptr + N + rows, mask=inside, other=0.0)
    shift, rest = normalizer_of(shift, total)
    tl.store(state_ptr + rows, shift, mask=inside)
    tl.store(state_ptr + N + rows, rest, mask=inside)
    return shift, rest


@triton.jit
def _losses(state_ptr, rows, inside, N, z):
    """softplus(n - z) [BLOCK]; 0 without negatives."""
    shift, rest = _normalizer_of_state(state_ptr, rows, inside, N)
    t = softmax_exponent(shift, rest, z)
    return tl.where(rest == _INF, 0.0, softplus_from(t, tl.exp(-tl.abs(t))))


@triton.jit(do_not_specialize=["N", "share"])
def losses_kernel(
    row_state_ptr,  # [2, N] (shift, sum) becomes (shift, rest)
    col_state_ptr,  # the same of columns, or None
    dots_ptr,  # [N]
    params_ptr,  # [3]
    gain_ptr,  # [N] or None
    out_ptr,  # [N] losses, or their sums by program
    N,
    share,
    SUMMED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """loss_i = gain_i * share * (softplus(n_i - z_i), and the column's), z_i the logit of row i's positive."""
    program = tl.program_id(0)
    rows = program * BLOCK + tl.arange(0, BLOCK)
    inside = rows < N
    z = tl.load(dots_ptr + rows, mask=inside, other=0.0) * tl.load(params_ptr)
    loss = _losses(row_state_ptr, rows, inside, N, z)
    if col_state_ptr is not None:
        loss += _losses(col_state_ptr, rows, inside, N, z)
    if gain_ptr is not None:
        loss *= tl.load(gain_ptr + rows, mask=inside, other=0.0)
    loss *= share
    if SUMMED:
        tl.store(out_ptr + program, tl.sum(tl.where(inside, loss, 0.0), 0))
    else:
        tl.store(out_ptr + rows, loss, mask=inside)


@triton.jit
def _softmax(normalizer_ptr, rows, inside, N, z):
    """sigmoid(n - z) [BLOCK], the probability that is not the positive's; 0 without negatives."""
    shift = tl.load(normalizer_ptr + rows, mask=inside, other=0.0)
    rest = tl.load(normalizer_ptr + N + rows, mask=inside, other=_INF)
    t = softmax_exponent(shift, rest, z)
    return tl.where(rest == _INF, 0.0, sigmoid_from(t, tl.exp(-tl.abs(t))))


@triton.jit(do_not_specialize=["N", "share"])
def gains_kernel(
    row_normalizer_ptr,  # [2, N]
    col_normalizer_ptr,  # [2, N] or None
    dots_ptr,  # [N]
    scale,
    gain_ptr,  # [N] or None
    upstream_ptr,  # [1], or [N]
    params_ptr,  # [3]
    row_gain_ptr,  # [N]
    col_gain_ptr,  # [N] or None
    coefficients_ptr,  # [N]
    dparams_ptr,  # float64 [programs, 2]
    N,
    share,
    SCALE_IS_TENSOR: tl.constexpr, UPSTREAM_BY_ROW: tl.constexpr, BLOCK: tl.constexpr, CENTER_ROWS: tl.constexpr,
):  # fmt: skip
    """What a gradient pass of the softmax loss is told: gain * softmax of rows and columns, the positives' dL/d<x, y>.

    And the positives' part of dL/d(scale, bias), and params = (scale, 0, center) for the pass.
    """
    program = tl.program_id(0)
    first = tl.arange(0, CENTER_ROWS)
    center = center_of(tl.load(dots_ptr + first, mask=first < N, other=0.0), first, N)
    factor = number(scale, SCALE_IS_TENSOR)
    rows = program * BLOCK + tl.arange(0, BLOCK)
    inside = rows < N
    dots = tl.load(dots_ptr + rows, mask=inside, other=0.0)
    gain = tl.zeros([BLOCK], tl.float32) + share
    if gain_ptr is not None:
        gain *= tl.load(gain_ptr + rows, mask=inside, other=0.0)
    if UPSTREAM_BY_ROW:
        gain *= tl.load(upstream_ptr + rows, mask=inside, other=0.0)
    else:
        gain *= tl.load(upstream_ptr)
    z = dots * factor
    row_gain = gain * _softmax(row_normalizer_ptr, rows, inside, N, z)
    tl.store(row_gain_ptr + rows, row_gain, mask=inside)
    dz = -row_gain
    if col_normalizer_ptr is not None:
        col_gain = gain * _softmax(col_normalizer_ptr, rows, inside, N, z)
        tl.store(col_gain_ptr + rows, col_gain, mask=inside)
        dz -= col_gain
    tl.store(coefficients_ptr + rows, dz * factor, mask=inside)
    dz = tl.where(inside, dz, 0.0)
    dscale = dz * tl.where(inside, dots - center, 0.0)
    tl.store(dparams_ptr + 2 * program, tl.sum(dscale.to(tl.float64), 0))
    tl.store(dparams_ptr + 2 * program + 1, tl.sum(dz.to(tl.float64), 0))
    if program == 0:
        store_params(params_ptr, factor, 0.0, center)


@triton.jit
def finish_rows(
    out_ptr, sums_ptr, other_ptr, other_stride, partner, coefficients, rows, n, D, rescale, BLOCK_D: tl.constexpr
):
    """out = sums * rescale + coefficient * the partner's row, for these of n rows; sums may be where out is."""
    features = tl.arange(0, BLOCK_D)
    place = rows.to(tl.int64)[:, None] * D + features[None, :]
    other_ptrs = other_ptr + partner[:, None] * other_stride + features[None, :]
    for k in range(0, D, BLOCK_D):
        mask = (rows < n)[:, None] & (features[None, :] < D - k)
        sums = tl.load(sums_ptr + place + k, mask=mask, other=0.0) * rescale
        other = tl.load(other_ptrs + k, mask=mask & (coefficients != 0)[:, None], other=0.0).to(tl.float32)
        sums += coefficients[:, None] * other
        tl.store(out_ptr + place + k, sums.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N", "M", "R", "first", "offset"])
def gradients_kernel(
    x_ptr,  # [N, D]
    y_ptr,  # [M, D]
    index_ptr,  # int64 [R] of the rows of dx, or None
    coefficients_ptr,  # [N] or None
    rescale_ptr,  # [1] or None
    dx_sums_ptr,  # [R, D] float32 or None
    dx_ptr,  # [R, D]
    dy_sums_ptr,  # [M, D] float32 or None
    dy_ptr,  # [M, D]
    N, M, R, first, offset, D, x_stride, y_stride,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx of the R rows from `first` on, and dy, from their float32 sums and the positive pairs' part.

    dx_i gets coefficient_i * y_p(i), and where p(i) = i + offset dy_p(i) gets coefficient_i * x_i.
    """
    program = tl.program_id(0)
    rescale = 1.0
    if rescale_ptr is not None:
        rescale = tl.load(rescale_ptr)
    dx_programs = 0
    if dx_sums_ptr is not None:
        dx_programs = tl.cdiv(R, BLOCK)
        if program < dx_programs:
            rows = program * BLOCK + tl.arange(0, BLOCK)
            partner, exists = _partner(index_ptr, rows, R, first, offset)
            coefficients = tl.zeros([BLOCK], tl.float32)
            if coefficients_ptr is not None:
                coefficients = tl.load(coefficients_ptr + first + rows, mask=exists, other=0.0)
            finish_rows(dx_ptr, dx_sums_ptr, y_ptr, y_stride, partner, coefficients, rows, R, D, rescale, BLOCK_D)
    if dy_sums_ptr is not None:  # noqa: SIM102 (known to the compiler, unlike what follows)
        if program >= dx_programs:
            rows = (program - dx_programs) * BLOCK + tl.arange(0, BLOCK)
            partner = rows - offset
            exists = (partner >= 0) & (partner < N) & (rows < M)
            partner = tl.where(exists, partner, 0).to(tl.int64)
            coefficients = tl.zeros([BLOCK], tl.float32)
            if coefficients_ptr is not None and index_ptr is None:
                coefficients = tl.load(coefficients_ptr + partner, mask=exists, other=0.0)
            finish_rows(dy_ptr, dy_sums_ptr, x_ptr, x_stride, partner, coefficients, rows, M, D, rescale, BLOCK_D)


@triton.jit
def tf32_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """float32 rounded to the 10 bits of TF32 [n]; inf and NaN stay.

    The tensor cores cut the other bits off, which makes every product smaller: a bias of each logit.
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < n
    x = tl.load(x_ptr + index, mask=inside, other=0.0)
    bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    tl.store(out_ptr + index, tl.where(tl.abs(x) < _INF, bits.to(tl.float32, bitcast=True), x), mask=inside)
