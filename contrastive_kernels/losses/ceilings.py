"""A margin of a loss as ceilings of its problem's rows and columns: what scores higher is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..arguments.checks import scale_tensor
from ..arguments.margin import Margin, scores_of, upper_bounds
from ..engine.matrix import Problem
from ..panels.size import score_dtype

__all__ = ["own_logits", "with_ceilings", "with_margin"]


def with_margin(
    problem: Problem, margin: Margin, *, both: bool = False, logits: Sequence[Tensor | None] | None = None
) -> Problem:
    """The same problem, whose rows leave out what lies above their positives by more than the margin.

    both: so do the columns, each by its own positive, as those of a symmetric matrix always do. logits: the positives'
    logits of rows, and of columns, where they are given.
    """
    given = None if logits is None else logits[0]
    own = own_logits(problem) if given is None else given.detach()
    others = own
    if both and logits is not None and logits[1] is not None:
        others = logits[1].detach()
    two_sided = both or problem.symmetric
    return with_ceilings(problem, upper_bounds(own, margin), upper_bounds(others, margin) if two_sided else None)


def with_ceilings(problem: Problem, rows: Tensor, cols: Tensor | None) -> Problem:
    """The same with these ceilings [N], [M]."""
    return replace(problem, pairs=problem.pairs._replace(row_ceiling=rows, col_ceiling=cols))


def own_logits(problem: Problem) -> Tensor:
    """scale * <x_i, y_p(i)> [N], without what is added to columns, detached; of a row without a positive, -inf."""
    x, y, index = problem.x.detach(), problem.y.detach(), problem.index
    if index is None:
        index = torch.arange(x.shape[0], dtype=torch.int64, device=x.device) + (problem.offset or 0)
    dots = scores_of(x, y, index[:, None], score_dtype(x.dtype), problem.workspace_bytes)[:, 0]
    return dots * scale_tensor(x, problem.scale).detach()
