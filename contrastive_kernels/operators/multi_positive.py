"""Each positive by itself: the sum over a row's positives p of softplus(n_i - z_ip), n_i the log-sum over the others.

The columns of other ids are streamed by panels: n_i, and the weights gain_i S_i exp(z - n_i) with S_i the sum over p of
sigmoid(n_i - z_ip). The positives, which are few, lie about the diagonal of the sorted matrix, and are operations of
torch in blocks of it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..engine.driver import gradient_pass, normalizer_of, softmax_side, statistics_pass
from ..engine.gradients import Gradients, Wanted
from ..engine.matrix import Problem, ScoreMatrix
from ..engine.positive_blocks import PositiveBlock, PositiveBlocks
from ..panels.pairs import EVERY_PAIR
from ..panels.panel import Side, present
from ..panels.size import saved_dtype, score_dtype
from ..panels.terms import EXPONENTIAL
from .label_matrix import in_one_go, of_pairs, value_and_gradients
from .parts import gradients_of
from .registration import register
from .second import dense_logits, dense_normalizer
from .shared import Call, Outputs, Primitive

__all__ = ["multi_positive_loss"]


def multi_positive_loss(problem: Problem, gain: Tensor, reduction: str) -> Tensor:
    """The sum over every row's positives, or that of all rows.

    Parameters
    ----------
    problem : Problem
        Rows and columns have ids, and no row a positive beside.
    gain : Tensor
        Weights of the rows [N] in the dtype of the scores.
    reduction : {"sum", "none"}
        "none" gives [N].
    """
    loss: Tensor = multi_positive_losses(problem, (gain,), (reduction,))[0]
    return loss


# ---- what is computed ----


def _blocks(problem: Problem) -> PositiveBlocks:
    pairs = problem.pairs
    ids = present(pairs.row_ids), present(pairs.col_ids)
    return PositiveBlocks(problem.x, problem.y, *ids, problem.symmetric, problem.workspace_bytes)


def _margins(blocks: PositiveBlocks, block: PositiveBlock, params: Tensor, normalizer: Tensor) -> tuple[Tensor, Tensor]:
    """Scores <x_i, y_p> and n_i - z_ip [R, C] of a block; -inf where a pair is no positive."""
    scores = blocks.x[block.rows] @ blocks.y[block.cols].T
    shift, rest = normalizer[:, blocks.row_order[block.rows], None]
    margins = (shift - (scores * params[0] + params[1])) + rest
    return scores, margins.masked_fill_(~block.positives, -torch.inf)


def _forward(call: Call) -> Outputs:
    """The loss; dx, dy, dscale, dbias where they come with it; normalisers of the other columns [2, N], S [N], and the
    positives' mean score."""
    if in_one_go(call):
        return *value_and_gradients(call, of_pairs), None, None, None
    problem, (reduction,), gain = call.problem, call.settings, present(call.extras[0])
    matrix = ScoreMatrix.of(problem, EXPONENTIAL, problem.backend())
    normalizer = normalizer_of(statistics_pass(matrix, cols=False)[0])
    blocks, losses, softmax = _blocks(problem), torch.zeros_like(gain), torch.zeros_like(gain)
    total = torch.zeros(2, dtype=gain.dtype, device=gain.device)  # of the positives' scores, and their number
    for block in blocks:
        rows = blocks.row_order[block.rows]
        scores, margins = _margins(blocks, block, matrix.params, normalizer)
        losses[rows] -= logsigmoid(-margins).sum(1)
        softmax[rows] += torch.sigmoid(margins).sum(1)
        total[0] += scores.masked_fill_(~block.positives, 0.0).sum()
        total[1] += block.positives.sum()
    losses = gain * losses
    value = losses if reduction == "none" else losses.sum()
    center = total[:1] / total[1:].clamp(min=1)
    kept = (normalizer, softmax, center) if True in call.needs else (None, None, None)
    return value, None, None, None, None, *kept


def _fake(call: Call) -> Outputs:
    (x, y), dtype = (call.problem.x, call.problem.y), score_dtype(call.problem.x.dtype)
    value = x.new_empty((x.shape[0],) if call.settings[0] == "none" else (), dtype=dtype)
    if True not in call.needs:
        return value, *(None,) * 7
    if in_one_go(call):
        saved = saved_dtype(x.dtype)
        kinds = (x.shape, saved), (y.shape, saved), ((), dtype), ((), dtype)
        return (
            value,
            *(x.new_empty(shape, dtype=of) if need else None for (shape, of), need in zip(kinds, call.needs)),
            None, None, None,
        )  # fmt: skip
    return (
        value, None, None, None, None, x.new_empty((2, x.shape[0]), dtype=dtype),
        x.new_empty(x.shape[0], dtype=dtype), x.new_empty(1, dtype=dtype),
    )  # fmt: skip


# ---- autograd ----


def _gradients(call: Call, kept: Outputs, upstream: Outputs) -> Outputs:
    """The other columns' part by panels, then the positives'; added up before they are rounded."""
    (*_, normalizer, softmax, center), problem = kept, call.problem
    gain = present(call.extras[0]) * upstream[0]
    matrix = ScoreMatrix.of(problem, EXPONENTIAL, problem.backend(), score_dtype(problem.x.dtype))
    matrix.params[2] = center[0]
    row = softmax_side(normalizer, gain * softmax)
    made = gradient_pass(matrix, row, row if problem.symmetric else Side(), Wanted(*call.wants))
    _add_positives(_blocks(problem), matrix, normalizer, gain, made)
    return gradients_of(call, made)


def _add_positives(
    blocks: PositiveBlocks, matrix: ScoreMatrix, normalizer: Tensor, gain: Tensor, made: Gradients
) -> None:
    """The weights -gain_i sigmoid(n_i - z_ip) of the positives, times both features."""
    scale = matrix.params[0]
    of_rows = None if made.dx is None else torch.zeros_like(blocks.x)
    of_cols = None if made.dy is None else torch.zeros_like(blocks.y)
    if blocks.symmetric:  # rows and columns are sorted alike
        of_cols = of_rows
    for block in blocks:
        scores, margins = _margins(blocks, block, matrix.params, normalizer)
        w = torch.sigmoid(margins).mul_(-gain[blocks.row_order[block.rows], None])
        if made.dparams is not None:
            made.dparams[0] += (w * (scores - matrix.params[2])).sum(dtype=made.dparams.dtype)
            made.dparams[1] += w.sum(dtype=made.dparams.dtype)
        w *= scale
        if of_rows is not None:
            of_rows[block.rows].addmm_(w, blocks.y[block.cols])
        if of_cols is not None:
            of_cols[block.cols].addmm_(w.T, blocks.x[block.rows])
    if made.dx is not None and of_rows is not None:
        made.dx[blocks.row_order] += of_rows
    if made.dy is not None and of_cols is not None:
        made.dy[blocks.col_order] += of_cols


def _dense(call: Call, rows: slice, turned: bool) -> Outputs:
    """The losses of some rows, or their sum, in operations of torch."""
    problem, (reduction,), gain = call.problem, call.settings, present(call.extras[0])
    z, _ = dense_logits(replace(problem, pairs=EVERY_PAIR), rows, turned)
    alike = present(problem.pairs.alike(rows)) & (z != -torch.inf)
    shift, rest = dense_normalizer(z.masked_fill(alike, -torch.inf))
    margins = (z.masked_fill(~alike, 0.0) - shift[:, None]) - rest[:, None]
    losses = -gain[rows] * logsigmoid(margins.masked_fill(~alike, torch.inf)).sum(1)
    return (losses if reduction == "none" else losses.sum(),)


multi_positive_losses = register(
    Primitive(
        "multi_positive",
        results=1,
        outputs=8,
        forward=_forward,
        fake=_fake,
        gradients=_gradients,
        dense=_dense,
        two_sided=lambda call: False,
        made=(0, 1, 2, 3),
    )
)
