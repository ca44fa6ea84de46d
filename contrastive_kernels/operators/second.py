"""Second derivatives, streamed: a block of rows after the other, each in operations of torch under autograd.

Let g be the gradients of sum_k <upstream_k, result_k> and v_x, v_y, ... the directions in which they are asked for.
What is wanted are the gradients of sum <v, g>. A loss is a sum over rows (and over columns, which are the rows of the
transposed problem), so both differentiations run inside one block of rows and are added up: memory is that of a few
blocks of the workspace's size, never of the whole matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine.problem import Problem
from ..engine.shapes import blocks
from ..panels.size import score_dtype

__all__ = ["dense_logits", "second_gradients"]

#: Matrices of the size of a block's scores that two differentiations hold at a time, at most.
_TEMPORARIES = 24

Maybe = Sequence[Any]  # tensors, numbers, None


def second_gradients(
    dense: Callable[[Maybe, slice, bool], Maybe],
    problem: Problem,
    tensors: Maybe,
    upstream: Maybe,
    directions: Maybe,
    *,
    two_sided: bool,
) -> list[Tensor | None]:
    """The gradients of sum <direction, gradient>: of the tensors, and of what came from upstream.

    Parameters
    ----------
    dense : callable
        (tensors, rows, turned) -> the results of these rows, differentiable; `turned`: of these columns.
    problem : Problem
        Whose sizes decide the blocks.
    tensors, upstream, directions : sequence
        What the results depend on, the gradients of the results, and the directions, as many as tensors.
    two_sided : bool
        Whether columns have results of their own.
    """
    dtype = score_dtype(problem.x.dtype)
    inside, above = ([_leaf(t, dtype) for t in given] for given in (tensors, upstream))
    pairs = [(t, v.detach().to(dtype)) for t, v in zip(inside, directions) if v is not None and isinstance(t, Tensor)]
    into = [t for t in (*inside, *above) if isinstance(t, Tensor) and t.requires_grad]
    totals = [torch.zeros_like(t) for t in into]
    for turned in (False, True) if two_sided else (False,):
        for rows in _row_blocks(problem, turned):
            with torch.enable_grad():
                total = _along(dense(inside, rows, turned), above, rows, pairs)
            if total is None or not total.requires_grad:
                continue
            for sums, part in zip(totals, torch.autograd.grad(total, into, allow_unused=True)):
                if part is not None:
                    sums += part
    found = {id(leaf): sums for leaf, sums in zip(into, totals)}
    both = zip((*tensors, *upstream), (*inside, *above))
    return [found[id(leaf)].to(t.dtype).reshape(t.shape) if id(leaf) in found else None for t, leaf in both]


def _along(results: Maybe, above: Maybe, rows: slice, pairs: list[tuple[Tensor, Tensor]]) -> Tensor | None:
    """sum <direction, gradient> of a block of rows, differentiable; None where nothing depends on anything."""
    weighted = [
        ((g[rows] if g.dim() else g) * result).sum()
        for g, result in zip(above, results)
        if g is not None and result is not None
    ]
    if not weighted:
        return None
    first = torch.autograd.grad(sum(weighted), [t for t, _ in pairs], create_graph=True, allow_unused=True)
    parts = [(g * v.reshape(g.shape)).sum() for g, (_, v) in zip(first, pairs) if g is not None]
    return torch.stack(parts).sum() if parts else None


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
    return blocks(n, max(1, problem.engine.workspace_bytes // per_row))


def dense_logits(problem: Problem, rows: slice, turned: bool) -> tuple[Tensor, Tensor]:
    """The logits of some rows (turned: columns) with excluded pairs at -inf [R, M], and their positives' [R]."""
    x, y = (problem.y, problem.x) if turned else (problem.x, problem.y)
    z = problem.scale * (x[rows] @ (x if problem.symmetric else y).T) + problem.bias
    if problem.col_bias is not None:
        z = z + (problem.col_bias[rows, None] if turned else problem.col_bias)
    here = torch.arange(rows.start, rows.stop, device=x.device)
    columns = torch.arange(z.shape[1], device=x.device)
    masks = [columns == here[:, None]] if problem.symmetric else []
    positive = None
    if problem.index is not None:
        positive = problem.index[rows]
    elif problem.offset is not None:
        positive = here + problem.offset
    if positive is None:
        z_pos = z.new_zeros(len(here))
    else:
        held = positive.clamp(min=0)[:, None]
        z_pos = z.gather(1, held)[:, 0].masked_fill(positive < 0, 0.0)
        masks.append(columns == positive[:, None])
    for mask in masks:
        z = z.masked_fill(mask, -torch.inf)
    return z, z_pos
