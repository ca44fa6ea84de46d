"""The differentiable primitives over the stream. They save x, y and vectors, or gradients; scores of small matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from . import shared as _ops
from . import softmax_loss as _loss_sum

__all__ = ["Options", "PairSums", "log_sum", "loss_sum", "pair_sum", "sigmoid_rows"]


@dataclass(frozen=True)
class Options:
    """What both primitives take beside their tensors."""

    backend: str
    workspace_bytes: int
    #: the positives lie at row + offset; None: at given indices, or nowhere
    offset: int | None = None
    symmetric: bool = False


def log_sum(
    x: Tensor, y: Tensor, params: Tensor, index: Tensor | None, rows: bool, cols: bool, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """log sum_j exp(z_ij) over negatives by rows [N] and by columns [M], and <x_i, y_p(i)> [N]; all differentiable.

    What is not wanted, and the last where there are no positives, is an empty tensor.
    """
    y = _another_tensor(x, y, options.symmetric)
    needs = _needs(x, y, params)
    return _LogSum.apply(x, y, params, index, rows, cols, options, needs)


def _needs(*tensors: Tensor | None) -> tuple[bool, ...]:
    """Which gradients are needed; decided before `apply`, for ctx.needs_input_grad is True even under no_grad."""
    return tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors)


def _another_tensor(x: Tensor, y: Tensor, symmetric: bool = False) -> Tensor:
    """y, as another tensor than x: torch.compile refuses an autograd.Function that is given one tensor twice.

    A symmetric stream reads only x, so that y takes no gradient.
    """
    if symmetric:
        return x.detach()
    return y.view_as(y) if y is x else y


def _refuse_second_derivatives() -> None:
    """Backward runs with gradients enabled only under create_graph=True, whose graph would miss what was saved."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("contrastive_kernels: second derivatives are not implemented; got create_graph=True")


class _LogSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, y, params, index, rows, cols, o: Options, needs):  # type: ignore[no-untyped-def]
        row, col, dots, scores = _ops.log_sum(
            x, y, params, index, o.offset, rows, cols, o.symmetric, any(needs), o.backend, o.workspace_bytes
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, y, params, row, col, scores, index)
        ctx.constants = (o.offset, o.symmetric, o.backend, o.workspace_bytes, needs)
        return row, col, dots

    @staticmethod
    def backward(ctx: Any, row_gradient: Tensor | None, col_gradient: Tensor | None, dot_gradient: Tensor | None):  # type: ignore[no-untyped-def]
        _refuse_second_derivatives()
        x, y, params, row, col, scores, index = ctx.saved_tensors
        offset, symmetric, backend, workspace_bytes, needs = ctx.constants
        row_gradient, col_gradient, dot_gradient = (
            None if g is None or g.numel() == 0 else g for g in (row_gradient, col_gradient, dot_gradient)
        )
        if row_gradient is None and col_gradient is None:  # only the positives' dot products were used
            row_gradient = torch.zeros_like(row) if row.numel() else None
            col_gradient = torch.zeros_like(col) if row_gradient is None else None
        needs = tuple(a and b for a, b in zip(needs, ctx.needs_input_grad))
        dx, dy, dparams = _ops.log_sum_backward(
            x, y, params, index, offset, symmetric, row, col, scores, row_gradient, col_gradient,
            dot_gradient, *needs, backend, workspace_bytes,
        )  # fmt: skip
        need_x, need_y, need_params = needs
        return (
            dx if need_x else None,
            dy if need_y and not symmetric else None,
            dparams if need_params else None,
            *(None,) * 5,
        )


def loss_sum(
    x: Tensor, y: Tensor, params: Tensor, index: Tensor | None, gain: Tensor, cols: bool, options: Options
) -> Tensor:
    """sum_i gain_i softplus(log-sum_i - z_i,p(i)) over rows, and with `cols` over a square's columns too; a scalar.

    Its gradients are made with it where that saves a product, and are multiplied by what comes from upstream.
    """
    y = _another_tensor(x, y, options.symmetric)
    return _LossSum.apply(x, y, params, index, gain, cols, options, _needs(x, y, params))


class _LossSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, y, params, index, gain, cols, o: Options, needs):  # type: ignore[no-untyped-def]
        row, col, dots, *gradients = _loss_sum.loss_sum(
            x, y, params, index, o.offset, gain, cols, o.symmetric, *needs, o.backend, o.workspace_bytes
        )
        z_pos = params[0] * dots + params[1]
        losses = -logsigmoid(z_pos - row)
        if cols:
            losses = losses - logsigmoid(z_pos - col)
        dx, dy, dparams = gradients
        made = dx.dim() == 2 or dy.dim() == 2 or dparams.numel() > 0
        if made:
            ctx.save_for_backward(*gradients)
        else:
            ctx.save_for_backward(x, y, params, index, gain, row, col, dots)
        ctx.constants = (made, cols, o, needs, (x.dtype, y.dtype, params.dtype))
        return (gain * losses).sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor):  # type: ignore[no-untyped-def]
        _refuse_second_derivatives()
        made, cols, o, needs, dtypes = ctx.constants
        needs = tuple(a and b for a, b in zip(needs, ctx.needs_input_grad))
        if made:
            gradients = _scaled(ctx.saved_tensors, upstream, needs, dtypes)
        else:
            gradients = _second_pass(upstream, ctx.saved_tensors, cols, o, needs)
        return (*gradients, *(None,) * 5)


def _second_pass(upstream: Tensor, saved, cols: bool, o: Options, needs):  # type: ignore[no-untyped-def]
    """The gradients of a loss_sum whose forward pass found the log-sums alone."""
    x, y, params, index, gain, row, col, dots = saved
    z_pos = params[0] * dots + params[1]
    row_gradient = upstream * gain * torch.sigmoid(row - z_pos)
    col_gradient = upstream * gain * torch.sigmoid(col - z_pos) if cols else None
    dz_pos = -row_gradient if col_gradient is None else -row_gradient - col_gradient
    dx, dy, dparams = _ops.log_sum_backward(
        x, y, params, index, o.offset, o.symmetric, row, col, x.new_empty(0), row_gradient, col_gradient,
        dz_pos * params[0], *needs, o.backend, o.workspace_bytes,
    )  # fmt: skip
    need_x, need_y, need_params = needs
    return (
        dx if need_x else None,
        dy if need_y else None,
        dparams + torch.stack([(dz_pos * dots).sum(), dz_pos.sum()]) if need_params else None,
    )


def _scaled(gradients, upstream: Tensor, needs, dtypes):  # type: ignore[no-untyped-def]
    """The kept gradients that are needed, times what comes from upstream: out of place, for a retained graph's sake."""
    kept = zip(gradients, needs, dtypes)
    return tuple((g * upstream).to(dtype or g.dtype) if needed else None for g, needed, dtype in kept)


@dataclass(frozen=True)
class PairSums:
    """The vectors of a pair sum: normalisers and gains of rows [N] and columns [M]; None where there are none."""

    row_normalizer: Tensor | None
    row_gain: Tensor
    col_normalizer: Tensor | None = None
    col_gain: Tensor | None = None
    #: normalisers count from the positive's logit
    relative: bool = False


def pair_sum(
    x: Tensor, y: Tensor, params: Tensor, index: Tensor | None, term: str, sums: PairSums, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum over pairs with weights known beforehand: value and gradients in one pass.

    exponential: sum_i r_i sum_j exp(z_ij - a_i) + sum_j c_j sum_i exp(z_ij - b_j) over negatives.
    sigmoid: sum_i r_i (sum_j softplus(z_ij) over negatives + softplus(-z_i,p(i))).

    Returns the scalar, which is differentiable, and what is not: the rows' and columns' log-sums (sigmoid: row sums)
    and the positives' dot products [N].
    """
    y = _another_tensor(x, y)
    needs = _needs(x, y, params, sums.row_normalizer, sums.col_normalizer)
    col_gain = sums.row_gain.clone() if sums.col_gain is sums.row_gain else sums.col_gain
    return _PairSum.apply(
        x, y, params, sums.row_normalizer, sums.col_normalizer, sums.row_gain, col_gain, index, term,
        sums.relative, options, needs,
    )  # fmt: skip


class _PairSum(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, x, y, params, row_normalizer, col_normalizer, row_gain, col_gain, index, term, relative,
        o: Options, needs,
    ):  # fmt: skip
        row, col, dots, dx, dy, dparams = _ops.pair_sum(
            x, y, params, index, o.offset, term, row_normalizer, row_gain, col_normalizer, col_gain, relative,
            *needs[:3], o.backend, o.workspace_bytes,
        )  # fmt: skip
        dtypes = (x.dtype, y.dtype, params.dtype)
        if term == "sigmoid":
            total = (row_gain * row).sum()
            side_gradients = (None, None)
        else:
            z_pos = params[0] * dots + params[1] if relative else 0.0
            row_sums = row_gain * torch.exp(row - row_normalizer - z_pos)
            total, side_gradients = row_sums.sum(), (-row_sums, None)
            if col_gain is not None:
                col_sums = col_gain * torch.exp(col - col_normalizer - z_pos)
                total, side_gradients = total + col_sums.sum(), (-row_sums, -col_sums)
        ctx.save_for_backward(dx, dy, dparams, *side_gradients)
        ctx.constants = (needs, dtypes)
        ctx.mark_non_differentiable(row, col, dots)
        ctx.set_materialize_grads(False)
        return total, row, col, dots

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *unused: Tensor | None):  # type: ignore[no-untyped-def]
        _refuse_second_derivatives()
        needs, dtypes = ctx.constants
        if upstream is None:
            return (None,) * 12
        return (*_scaled(ctx.saved_tensors, upstream, needs, (*dtypes, None, None)), *(None,) * 7)


def sigmoid_rows(x: Tensor, y: Tensor, params: Tensor, options: Options) -> Tensor:
    """The sigmoid loss by rows [N]. Its gradients depend on what comes from upstream, so they take a second pass."""
    y = _another_tensor(x, y)
    return _SigmoidRows.apply(x, y, params, options, _needs(x, y, params))


class _SigmoidRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, y, params, o: Options, needs):  # type: ignore[no-untyped-def]
        ones = torch.ones(len(x), dtype=params.dtype, device=x.device)
        rows = _ops.pair_sum(
            x, y, params, None, o.offset, "sigmoid", None, ones, None, None, False,
            False, False, False, o.backend, o.workspace_bytes,
        )[0]  # fmt: skip
        ctx.save_for_backward(x, y, params)
        ctx.constants = (o.offset, o.backend, o.workspace_bytes, needs)
        return rows

    @staticmethod
    def backward(ctx: Any, upstream: Tensor):  # type: ignore[no-untyped-def]
        _refuse_second_derivatives()
        x, y, params = ctx.saved_tensors
        offset, backend, workspace_bytes, needs = ctx.constants
        _, _, _, *gradients = _ops.pair_sum(
            x, y, params, None, offset, "sigmoid", None, upstream.contiguous(), None, None, False,
            *needs, backend, workspace_bytes,
        )  # fmt: skip
        wanted = zip(gradients, needs, (x, y, params))
        return (*(g.to(t.dtype) if need else None for g, need, t in wanted), None, None)
