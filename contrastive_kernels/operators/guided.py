"""Log-sum-exps over the negatives that a guide leaves: pairs that it finds more alike than a threshold do not count.

Blocks of rows in operations of torch. The guide's scores are made where the block's own are, and never kept; the
gradient pass makes the same blocks, so that it finds the same pairs. One walk serves rows and columns.
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

__all__ = ["guided", "guided_log_sums", "guided_log_sums_of_both"]

#: Matrices of the size of a block's scores that are there at a time, of rows alone and with columns.
_TEMPORARIES = 6, 8

#: Log-sum-exps [N], differentiable, and the same as (shift, rest) [2, N].
_LogSums = tuple[Tensor, Tensor]


def guided_log_sums(problem: Problem, guide: tuple[Tensor, Tensor], threshold: Tensor) -> _LogSums:
    """log sum_j exp(z_ij) [N] over the pairs that count, differentiable, and the same as (shift, rest) [2, N].

    Parameters
    ----------
    problem : Problem
        Without a bias, be it of all pairs or of columns.
    guide : pair of Tensor
        The guide's features of the rows [N, E] and of the columns [M, E].
    threshold : Tensor
        Pairs whose guide's dot product is above threshold_i [N] are left out.
    """
    row, _, found, _ = guided(problem, (*(each.detach() for each in guide), threshold.detach()), (False,))
    return row, found


def guided_log_sums_of_both(
    problem: Problem, guide: tuple[Tensor, Tensor], threshold: Tensor
) -> tuple[_LogSums, _LogSums]:
    """The same of matching rows and columns [N], where the threshold of a row is that of its column."""
    row, col, of_row, of_col = guided(problem, (*(each.detach() for each in guide), threshold.detach()), (True,))
    return (row, of_row), (col, of_col)


def _wide(call: Call) -> Call:
    """The call with features and guide in the dtype of scores."""
    problem, (of_rows, of_cols, threshold) = call.problem, call.extras
    x = problem.x.to(score_dtype(problem.x.dtype))
    y = x if problem.symmetric else problem.y.to(x.dtype)
    guide = [present(v).to(score_dtype(present(v).dtype)) for v in (of_rows, of_cols)]
    return Call(replace(problem, x=x, y=y), (*guide, threshold), call.settings, call.needs)


def _logits(call: Call, rows: slice) -> tuple[Tensor, Tensor | None]:
    """The logits of some rows of a wide call [R, M], -inf where a pair does not count; and as columns count."""
    problem, (of_rows, of_cols, threshold) = call.problem, [present(v) for v in call.extras]
    z = (problem.x[rows] @ problem.y.T) * problem.scale
    scores = of_rows[rows] @ of_cols.T
    out, alike = scores > threshold[rows, None], problem.pairs.alike(rows)
    if (too_high := problem.pairs.too_high(z, rows)) is not None:
        out |= too_high
    col = None
    if call.settings[0]:
        of_col, ceiling = scores > threshold, problem.pairs.col_ceiling
        if ceiling is not None:
            of_col |= z > ceiling
        col = z.masked_fill(of_col if alike is None else of_col | alike, -torch.inf)
    z = z.masked_fill(out if alike is None else out | alike, -torch.inf)
    for columns in _single(problem, rows):
        for each in (z, col):
            if each is not None:
                each.scatter_(1, columns[:, None], -torch.inf)
    return z, col


def _single(problem: Problem, rows: slice) -> list[Tensor]:
    """Columns that each of some rows leaves out [R]: the positive's, and its own."""
    here = torch.arange(rows.start, rows.stop, dtype=torch.int64, device=problem.x.device)
    index = here + problem.offset if problem.index is None and problem.offset is not None else None
    if problem.index is not None:
        index = problem.index[rows]
    return [each for each in (index, here if problem.symmetric else None) if each is not None]


def _row_blocks(call: Call) -> list[slice]:
    """Rows whose scores, and what is made of them, fit the workspace."""
    problem = call.problem
    per_score = _TEMPORARIES[call.settings[0]] * score_dtype(problem.x.dtype).itemsize
    per_row = per_score * max(problem.y.shape[0], 1)
    if per_row > problem.workspace_bytes:
        raise ValueError(
            f"workspace_bytes: expected at least {per_row} for the scores of a row with a guide; "
            f"got {problem.workspace_bytes}"
        )
    return list(blocks(problem.x.shape[0], problem.workspace_bytes // per_row))


def _forward(call: Call) -> Outputs:
    """The log-sum-exps of rows [N] and of columns [M], and their two numbers."""
    wide, both = _wide(call), call.settings[0]
    (n, m), x = (len(call.problem.x), len(call.problem.y)), wide.problem.x
    row = torch.zeros((2, n), dtype=x.dtype, device=x.device)
    highest = torch.full((m,), -torch.inf, dtype=x.dtype, device=x.device)
    total = torch.zeros_like(highest)
    for rows in _row_blocks(call):
        z, col = _logits(wide, rows)
        row[0, rows], row[1, rows] = _normalizer(z)
        if col is not None:
            before, highest = highest, torch.maximum(highest, col.amax(0))
            shift = highest.masked_fill(highest == -torch.inf, 0.0)
            total = total * torch.exp(before - shift) + col.sub_(shift).exp_().sum(0)
    if not both:
        return row.sum(0), None, row, None
    shift, rest = highest.masked_fill(highest == -torch.inf, 0.0), total.log()
    col_found = torch.stack([shift, rest])
    return row.sum(0), col_found.sum(0), row, col_found


def _normalizer(z: Tensor) -> tuple[Tensor, Tensor]:
    """The rows' log-sum-exps as (shift, rest), of logits that are needed no more; (0, -inf) for a row of nothing."""
    if not z.shape[1]:
        return z.new_zeros(len(z)), z.new_full((len(z),), -torch.inf)
    highest = z.amax(1)
    shift = highest.masked_fill(highest == -torch.inf, 0.0)
    return shift, z.sub_(shift[:, None]).exp_().sum(1).log()


def _fake(call: Call) -> Outputs:
    x, y, both, dtype = call.problem.x, call.problem.y, call.settings[0], score_dtype(call.problem.x.dtype)
    return (
        x.new_empty(x.shape[0], dtype=dtype),
        x.new_empty(y.shape[0], dtype=dtype) if both else None,
        x.new_empty((2, x.shape[0]), dtype=dtype),
        x.new_empty((2, y.shape[0]), dtype=dtype) if both else None,
    )


def _gradients(call: Call, kept: Outputs, upstream: Outputs) -> Outputs:
    """The weights are upstream times the softmax, of rows and of columns."""
    wide, problem = _wide(call), call.problem
    x, y, scale = wide.problem.x, wide.problem.y, problem.scale
    dx, dy = torch.zeros_like(x), torch.zeros_like(y)
    dscale = torch.zeros((), dtype=x.dtype, device=x.device)
    for rows in _row_blocks(call):
        z, col = _logits(wide, rows)
        w = None
        if upstream[0] is not None:
            w = _softmax(z, kept[0][:, rows, None]).mul_(upstream[0][rows, None])
        if col is not None and upstream[1] is not None:
            of_col = _softmax(col, kept[1]).mul_(upstream[1])
            w = of_col if w is None else w.add_(of_col)
        if w is None:
            continue
        products = w @ y
        dx[rows] += products
        dy += w.T @ x[rows]
        dscale += (products * x[rows]).sum()
    if problem.symmetric:
        dx = dx + dy
    found = (dx * scale, dy * scale, dscale, torch.zeros_like(dscale))
    wanted = zip(found, call.tensors, call.needs)
    made = [like(g, t) if need else None for g, t, need in wanted]
    return (*made, *[None] * (len(call.needs) - len(made)))


def _softmax(z: Tensor, normalizer: Tensor) -> Tensor:
    """exp(z - log-sum-exp), of logits that are not needed any more; at most 1, whatever a product's last digits are."""
    shift, rest = normalizer
    return z.sub_(shift).sub_(rest.masked_fill(rest == -torch.inf, 0.0)).clamp_(max=0.0).exp_()


def _dense(call: Call, rows: slice, turned: bool) -> Outputs:
    z, _ = dense_logits(call.problem, rows, turned)
    of_rows, of_cols, threshold = (present(v) for v in call.extras)
    own, others = (of_cols, of_rows) if turned else (of_rows, of_cols)
    z = z.masked_fill((own[rows] @ others.T).detach() > threshold[rows, None], -torch.inf)
    shift, rest = dense_normalizer(z)
    return (None, shift + rest) if turned else (shift + rest, None)


guided = register(
    Primitive(
        "guided_logsumexp",
        results=2,
        outputs=4,
        forward=_forward,
        fake=_fake,
        gradients=_gradients,
        dense=_dense,
        two_sided=lambda call: call.settings[0],
        found=2,
    )
)
