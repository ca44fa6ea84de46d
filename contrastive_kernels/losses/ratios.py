"""What losses are composed of: log-sum-exps and logits of single pairs, relative to the logit of a row's positive.

Differences are taken before anything is rounded to one number: features may have a large common part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..engine.matrix import Problem
from ..operators.logsumexp import log_sum_exps
from ..panels.size import score_dtype

__all__ = [
    "LOWEST",
    "debiased_mean",
    "joined",
    "negatives_of",
    "pair_dots",
    "relative_log_sum",
    "relative_of",
    "softplus",
    "without_infinity",
]

#: A logit so low that its exponential is 0 beside any other, and that stays finite where a few are added.
LOWEST = -1e20


def softplus(z: Tensor) -> Tensor:
    """log(1 + e^z) without a threshold; 0 for -inf."""
    return -logsigmoid(-z)


def without_infinity(logits: Tensor) -> Tensor:
    """Logits of positives [N], of which -inf is as low a number as sums take, without a gradient."""
    return logits.masked_fill(logits.detach() == -torch.inf, LOWEST)


def joined(a: Tensor, b: Tensor) -> Tensor:
    """log(e^a + e^b) [N], of which one or both may be -inf, without a gradient.

    The value is exact where both are small, and the gradient where one of the weights is.
    """
    nothing = (a == -torch.inf) & (b == -torch.inf)
    a, b = a.masked_fill(nothing, 0.0), b.masked_fill(nothing, 0.0)
    high, low = torch.maximum(a, b).detach(), torch.minimum(a, b).detach()
    moving = torch.logsumexp(torch.stack([a, b]), 0)
    return (high + softplus(low - high) + (moving - moving.detach())).masked_fill(nothing, -torch.inf)


def relative_log_sum(problem: Problem, z_pos: Tensor) -> Tensor:
    """log sum_j exp(z_ij - z_pos,i) [N] over the pairs that count, -inf where there are none; differentiable.

    The value is made of the log-sum's two numbers, the gradient is that of the log-sum. Where z_pos is infinite, so is
    the value, and the gradient finite: nothing comes back to z_pos.
    """
    rows, _, normalizer, _ = log_sum_exps(problem, (), (False,))
    return relative_of(rows, normalizer, z_pos)


def relative_of(rows: Tensor, normalizer: Tensor, z_pos: Tensor) -> Tensor:
    """The same of log-sums [N], differentiable, and their two numbers [2, N]."""
    shift, rest = normalizer.detach()
    nothing = rest == -torch.inf
    value = (shift - z_pos.detach()) + rest
    moving = (rows - z_pos.masked_fill(z_pos.detach().isinf(), 0.0)).masked_fill(nothing, 0.0)
    return value + (moving - moving.detach())


def negatives_of(problem: Problem, *, padding: bool = False) -> Tensor:
    """How many columns are negatives of each row [N] int64; `padding`: padding, too."""
    bias, row_ids, col_ids = problem.pairs.tensors[:3]
    n, m, device = problem.x.shape[0], problem.y.shape[0], problem.x.device
    kept = torch.ones(m, dtype=torch.int64, device=device)
    if bias is not None and not padding:
        kept = kept.masked_fill(bias.detach() == -torch.inf, 0)
    count = kept.sum().expand(n)
    own = problem.index
    if own is None and problem.offset is not None:
        own = torch.arange(n, dtype=torch.int64, device=device) + problem.offset
    if row_ids is not None and col_ids is not None:
        ordered, order = col_ids.sort()
        before = torch.nn.functional.pad(kept[order].cumsum(0), (1, 0))
        ends = [before[torch.searchsorted(ordered, row_ids, right=right)] for right in (True, False)]
        count = count - (ends[0] - ends[1])
    if problem.symmetric:
        count = count - 1 if row_ids is None else count
    if own is not None and m:
        own = own[:, None] if own.dim() == 1 else own
        counted = kept[own.clamp(min=0)] * (own >= 0)
        if row_ids is not None and col_ids is not None:  # those are left out already
            counted = counted * (col_ids[own.clamp(min=0)] != row_ids[:, None])
        count = count - counted.sum(1)
    return count


def debiased_mean(log_mean: Tensor, tau: float, floor: Tensor) -> Tensor:
    """log max((e^log_mean - tau) / (1 - tau), e^floor) [N]."""
    log_tau = torch.full_like(log_mean, tau).log()
    above = log_mean > log_tau
    exponent = torch.where(above, log_tau - log_mean, -1.0)
    rest = (log_mean + torch.log1p(-exponent.exp())).masked_fill(~above, -torch.inf)
    return torch.maximum(rest - torch.log1p(torch.full_like(log_mean, -tau)), floor)


def pair_dots(x: Tensor, y: Tensor, index: Tensor, base: Tensor | None = None) -> Tensor:
    """<x_i, y_k> or, with a base [N], <x_i, y_k - y_base(i)> of the columns k in index [N, K]: [N, K] in float32.

    float64 of float64 features. Differentiable as often as you like, in O((N + M) D) memory.
    """
    # (Dynamo takes no tensor twice)
    dots: Tensor = _Dots.apply(x, y.view_as(y) if y is x else y, index, base)
    return dots


def _picked(y: Tensor, index: Tensor, base: Tensor | None) -> Tensor:
    """y_k, or y_k - y_base [N, D] in the dtype of the scores."""
    dtype = score_dtype(y.dtype)
    picked = y[index].to(dtype)
    return picked if base is None else picked - y[base].to(dtype)


class _Dots(torch.autograd.Function):
    """The dot products, a column of the index at a time."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, y: Tensor, index: Tensor, base: Tensor | None) -> Tensor:
        wide = x.to(score_dtype(x.dtype))
        return torch.stack([(wide * _picked(y, each, base)).sum(1) for each in index.unbind(1)], 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, y, index, base = inputs
        ctx.save_for_backward(x, y, index, base)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        x, y, index, base = ctx.saved_tensors
        return *_Products.apply(upstream, x, y, index, base), None, None


class _Products(torch.autograd.Function):
    """sum_k g_ik y_k [N, D] and sum_ik g_ik x_i at row k [M, D], differences to the base if there is one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor, x: Tensor, y: Tensor, index: Tensor, base: Tensor | None) -> tuple[Tensor, Tensor]:
        dtype = score_dtype(x.dtype)
        wide, dx = x.to(dtype), torch.zeros(x.shape, dtype=dtype, device=x.device)
        dy = torch.zeros(y.shape, dtype=dtype, device=y.device)
        for k, each in enumerate(index.unbind(1)):
            dx = dx + g[:, k, None] * _picked(y, each, base)
            dy = _added(dy, each, g[:, k, None] * wide)
        if base is not None:
            dy = _added(dy, base, -g.sum(1)[:, None] * wide)
        return dx.to(x.dtype), dy.to(y.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        g, x, y, index, base = inputs
        ctx.save_for_backward(g, x, y, index, base)

    @staticmethod
    def backward(ctx: Any, vx: Tensor, vy: Tensor) -> Any:
        g, x, y, index, base = ctx.saved_tensors
        dg = _Dots.apply(vx, y, index, base) + _Dots.apply(x, vy, index, base)
        return dg, *_Products.apply(g, vx, vy, index, base), None, None


def _added(sums: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """sums [M, D] with rows [N, D] added at an index [N]; the same order of additions in every run."""
    if sums.device.type == "cpu":
        return sums.index_add(0, index, rows)
    return sums.index_put((index,), rows, accumulate=True)  # index_add on a GPU adds in no fixed order
