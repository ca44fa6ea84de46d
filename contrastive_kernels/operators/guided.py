"""The log-sum-exp over the negatives that a guide leaves: pairs that it finds more alike than a threshold do not count.

Blocks of rows in operations of torch. The guide's scores are made where the block's own are, and never kept; the
gradient pass makes the same blocks, so that it finds the same pairs.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..engine.matrix import Problem
from ..panels.panel import present
from ..panels.size import blocks, score_dtype
from .registration import register
from .second import dense_logits, dense_normalizer
from .shared import Call, Outputs, Primitive, like

__all__ = ["guided", "guided_log_sums"]

#: Matrices of the size of a block's scores that are there at a time.
_TEMPORARIES = 6


def guided_log_sums(problem: Problem, guide: tuple[Tensor, Tensor], threshold: Tensor) -> tuple[Tensor, Tensor]:
    """log sum_j exp(z_ij) [N] over the pairs that count, differentiable, and the same as (shift, rest) [2, N].

    Parameters
    ----------
    problem : Problem
        Without biases of columns.
    guide : pair of Tensor
        The guide's features of the rows [N, E] and of the columns [M, E].
    threshold : Tensor
        Pairs whose guide's dot product is above threshold_i [N] are left out.
    """
    extras = (*(each.detach() for each in guide), threshold.detach())
    rows, normalizer = guided(problem, extras, ())
    return rows, normalizer


def _wide(call: Call) -> Call:
    """The call with features and guide in the dtype of scores."""
    problem, (of_rows, of_cols, threshold) = call.problem, call.extras
    x = problem.x.to(score_dtype(problem.x.dtype))
    y = x if problem.symmetric else problem.y.to(x.dtype)
    guide = [present(v).to(score_dtype(present(v).dtype)) for v in (of_rows, of_cols)]
    return Call(replace(problem, x=x, y=y), (*guide, threshold), call.settings, call.needs)


def _logits(call: Call, rows: slice) -> Tensor:
    """The logits of some rows of a wide call [R, M], -inf where a pair does not count."""
    z, _ = dense_logits(call.problem, rows, False)
    of_rows, of_cols, threshold = (present(v) for v in call.extras)
    return z.masked_fill((of_rows[rows] @ of_cols.T).detach() > threshold[rows, None], -torch.inf)


def _row_blocks(problem: Problem) -> list[slice]:
    """Rows whose scores, and what is made of them, fit the workspace."""
    per_row = _TEMPORARIES * score_dtype(problem.x.dtype).itemsize * max(problem.y.shape[0], 1)
    if per_row > problem.workspace_bytes:
        raise ValueError(
            f"workspace_bytes: expected at least {per_row} for the scores of a row with a guide; "
            f"got {problem.workspace_bytes}"
        )
    return list(blocks(problem.x.shape[0], problem.workspace_bytes // per_row))


def _forward(call: Call) -> Outputs:
    """The log-sum-exps [N], and their two numbers [2, N]."""
    wide = _wide(call)
    found = torch.zeros((2, call.problem.x.shape[0]), dtype=wide.problem.x.dtype, device=wide.problem.x.device)
    for rows in _row_blocks(call.problem):
        found[0, rows], found[1, rows] = dense_normalizer(_logits(wide, rows))
    return found.sum(0), found


def _fake(call: Call) -> Outputs:
    x, dtype = call.problem.x, score_dtype(call.problem.x.dtype)
    return x.new_empty(x.shape[0], dtype=dtype), x.new_empty((2, x.shape[0]), dtype=dtype)


def _gradients(call: Call, kept: Outputs, upstream: Outputs) -> Outputs:
    """The weights are upstream times the softmax."""
    wide, (shift, rest) = _wide(call), kept[0]
    problem = wide.problem
    x, y = problem.x, problem.y
    dx, dy = torch.zeros_like(x), torch.zeros_like(y)
    dscale, dbias = (torch.zeros((), dtype=x.dtype, device=x.device) for _ in range(2))
    scale = problem.scale
    for rows in _row_blocks(call.problem):
        z = _logits(wide, rows)
        # at most the softmax, whatever a product's last digits are
        w = torch.exp(((z - shift[rows, None]) - rest[rows, None]).clamp(max=0.0))
        w = w.masked_fill(z == -torch.inf, 0.0) * upstream[0][rows, None]
        products = w @ y
        dx[rows] += products
        dy += w.T @ x[rows]
        dscale += (products * x[rows]).sum()
        dbias += w.sum()
    if problem.symmetric:
        dx = dx + dy
    found = (dx * scale, dy * scale, dscale, dbias)
    wanted = zip(found, call.tensors, call.needs)
    made = [like(g, t) if need else None for g, t, need in wanted]
    return (*made, *[None] * (len(call.needs) - len(made)))


def _dense(call: Call, rows: slice, turned: bool) -> Outputs:
    shift, rest = dense_normalizer(_logits(call, rows))
    return (shift + rest,)


guided = register(
    Primitive(
        "guided_logsumexp",
        results=1,
        outputs=2,
        forward=_forward,
        fake=_fake,
        gradients=_gradients,
        dense=_dense,
        two_sided=lambda call: False,
        found=1,
    )
)
