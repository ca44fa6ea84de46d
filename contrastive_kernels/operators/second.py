"""Second derivatives, streamed: a block of rows after the other, each in operations of torch under autograd.

Let g be the gradients of sum_k <upstream_k, result_k> and v_x, v_y, ... the directions in which they are asked for.
What is wanted are the gradients of sum <v, g>. A loss is a sum over rows (and over columns, which are the rows of the
transposed problem), so both differentiations run inside one block of rows and are added up: memory is that of a few
blocks of the workspace's size, never of the whole matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..engine.matrix import Call, Outputs, Problem
from ..panels.size import blocks, score_dtype

__all__ = ["dense_logits", "dense_normalizer", "second_gradients"]

#: Matrices of the size of a block's scores that two differentiations hold at a time, at most.
_TEMPORARIES = 24


def second_gradients(
    dense: Callable[[Call, slice, bool], Outputs],
    two_sided: bool,
    call: Call,
    upstream: list[Any],
    cotangents: tuple[Any, ...],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The gradients of sum <cotangent, gradient>: of the call's tensors, and of what came from upstream.

    `dense` gives the results of some rows, `two_sided` says that columns have results of their own.
    """
    dtype = score_dtype(call.problem.x.dtype)
    leaves = [_leaf(t, dtype) for t in call.tensors]
    above = [_leaf(g, dtype) for g in upstream]
    directions = [None if v is None else v.detach().to(dtype) for v in cotangents]
    wanted = [t for t, v in zip(leaves, directions) if v is not None and isinstance(t, Tensor)]
    directions = [v for t, v in zip(leaves, directions) if v is not None and isinstance(t, Tensor)]
    inside = Call.of(leaves, call.problem.offset, call.statics)
    into = [t for t in (*leaves, *above) if isinstance(t, Tensor) and t.requires_grad]
    totals = [torch.zeros_like(t) for t in into]
    for turned in (False, True) if two_sided else (False,):
        for rows in _row_blocks(call.problem, turned):
            with torch.enable_grad():
                results = dense(inside, rows, turned)
                weighted = [
                    ((g[rows] if g.dim() else g) * result).sum()
                    for g, result in zip(above, results)
                    if g is not None and result is not None
                ]
                if not weighted:  # columns' results that nobody asked for
                    continue
                first = torch.autograd.grad(sum(weighted), wanted, create_graph=True, allow_unused=True)
                pairs = zip(first, directions)
                parts = [(g * v.reshape(g.shape)).sum() for g, v in pairs if g is not None and v is not None]
                total = sum(parts)
            if not isinstance(total, Tensor) or not total.requires_grad:
                continue
            for sums, part in zip(totals, torch.autograd.grad(total, into, allow_unused=True)):
                if part is not None:
                    sums += part
    found = {id(t): sums for t, sums in zip(into, totals)}

    def given(tensors: Any, leaves: Any) -> list[Tensor | None]:
        pairs = zip(tensors, leaves)
        return [found[id(leaf)].to(t.dtype).reshape(t.shape) if id(leaf) in found else None for t, leaf in pairs]

    return given(call.tensors, leaves), given(upstream, above)


def _leaf(value: Any, dtype: torch.dtype) -> Any:
    """A tensor of floats as a leaf in the dtype of the scores; anything else as it is."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    leaf = value.detach().to(dtype, copy=True)
    return leaf.requires_grad_()


def _row_blocks(problem: Problem, turned: bool) -> Any:
    """Rows (turned: columns) whose scores, as often as two differentiations hold them, fit the workspace."""
    n, m = problem.x.shape[0], problem.y.shape[0]
    n, m = (m, n) if turned else (n, m)
    per_row = _TEMPORARIES * score_dtype(problem.x.dtype).itemsize * max(m, 1)
    return blocks(n, max(1, problem.workspace_bytes // per_row))


def dense_logits(problem: Problem, rows: slice, turned: bool, *, signed: bool = False) -> tuple[Tensor, Tensor]:
    """The logits of some rows (turned: columns) with excluded pairs at -inf [R, M], and their positives' [R].

    `signed`: pairs of equal ids are not left out but have -z, as the sigmoid term wants it.
    """
    x, y = (problem.y, problem.x) if turned else (problem.x, problem.y)
    scaled = problem.scale * (x[rows] @ (x if problem.symmetric else y).T)
    z, too_high = scaled + problem.bias, problem.pairs.too_high(scaled, rows, turned)
    z = problem.pairs.add_to(z.T, rows).T if turned else problem.pairs.add_to(z, slice(None))
    here = torch.arange(rows.start, rows.stop, dtype=torch.int64, device=x.device)
    columns = torch.arange(z.shape[1], dtype=torch.int64, device=x.device)
    masks = [columns == here[:, None]] if problem.symmetric else []
    held = problem.positives
    positive = None
    if held.index is not None:
        positive = held.index[rows]
    elif problem.offset is not None:
        positive = here + problem.offset
    if positive is None:
        z_pos = z.new_zeros(len(here))
    else:
        z_pos = z.gather(1, positive.clamp(min=0)[:, None])[:, 0].masked_fill(positive < 0, 0.0)
        z_pos = z_pos.masked_fill(z_pos == -torch.inf, 0.0)  # a bias leaves it out: of a row that must not count
        masks.append(columns == positive[:, None])
    if held.left_out is not None:
        masks.extend(columns == others[rows, None] for others in held.left_out.unbind(1)[1:])
    alike = problem.pairs.alike(rows, turned)
    if alike is not None and signed:
        z = torch.where(alike & (z != -torch.inf), -z, z)
    elif alike is not None:
        masks.append(alike)
    if too_high is not None:
        masks.append(too_high)
    for mask in masks:
        z = z.masked_fill(mask, -torch.inf)
    return z, z_pos


def dense_normalizer(z: Tensor) -> tuple[Tensor, Tensor]:
    """The rows' log-sum-exp as (shift, rest), differentiable; (0, -inf), with gradient 0, for a row of nothing."""
    highest = z.detach().amax(1) if z.shape[1] else z.new_full((len(z),), -torch.inf)
    shift = highest.masked_fill(highest == -torch.inf, 0.0)
    total = torch.exp(z - shift[:, None]).sum(1)
    nothing = total == 0
    return shift, total.masked_fill(nothing, 1.0).log().masked_fill(nothing, -torch.inf)
