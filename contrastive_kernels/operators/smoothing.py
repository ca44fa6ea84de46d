"""Label smoothing: a share of a row's target lies on all its candidates alike, m_i of them.

loss_i = softplus(n_i - z_pos) + eps (z_pos - mean_j z_ij) over the candidates that are not masked, the positive among
them. Their mean comes of sums of features in O((N + M) D); eps / m_i comes off the weights in the stream.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine import strategy
from ..engine.class_sums import ClassSums, square_norms
from ..engine.matrix import Problem

__all__ = ["Smoothing", "smoothing_of"]


@dataclass(slots=True)
class Smoothing:
    """What it adds to the rows of one direction."""

    #: the share that lies on all candidates
    share: float
    #: [N] eps (z_pos - mean_j z_ij), and eps / m_i
    losses: Tensor
    each: Tensor

    def target(self, gain: Tensor) -> Tensor:
        """What comes off the weights of the negatives [2, N]."""
        return (gain * self.each).expand(2, -1).contiguous()

    def of_positives(self, gain: Tensor) -> Tensor:
        """What comes to dL/dz of the positives [N]."""
        return gain * (self.share - self.each)

    def band(self, rows: slice) -> Smoothing:
        """The same of some rows."""
        return Smoothing(self.share, self.losses[rows], self.each[rows])


def smoothing_of(share: float, problem: Problem, scale: Tensor, z_pos: Tensor, *, turned: bool) -> Smoothing:
    """What smoothing adds to the rows (turned: the columns), whose positives have the logits z_pos [N].

    scale: that of their logits, or of each [N].
    """
    strategy.require_panel(problem.backend(), problem.size())
    counts, sums = _candidates(problem, scale, z_pos, turned)
    counts = counts.clamp(min=1)
    each = share / counts
    losses = (share * (z_pos - sums / counts)).masked_fill_(counts == 1, 0.0)  # where the positive is the one candidate
    return Smoothing(share, losses.to(z_pos.dtype), each.to(z_pos.dtype))


def _candidates(problem: Problem, scale: Tensor, z_pos: Tensor, turned: bool) -> tuple[Tensor, Tensor]:
    """How many candidates every row has [N], and the sum of their logits [N], both in float64."""
    x, y = (problem.y, problem.x) if turned else (problem.x, problem.y)
    bias, row_ids, col_ids = problem.pairs.tensors[:3]
    if turned:
        row_ids, col_ids = col_ids, row_ids
    there = torch.ones(y.shape[0], dtype=z_pos.dtype, device=y.device)
    if bias is not None:
        there = (bias != -torch.inf).to(z_pos.dtype)
        bias = bias.masked_fill(bias == -torch.inf, 0.0)

    def of(rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
        sums = ClassSums(rows, cols, problem.workspace_bytes)
        logits = sums.dots(x, y)
        logits *= scale
        return sums.sums(there), logits if bias is None else logits + sums.sums(bias)

    counts, sums = of(*(torch.zeros(len(v), dtype=torch.int64, device=v.device) for v in (x, y)))
    if row_ids is not None and col_ids is not None:
        left_out = of(row_ids, col_ids)
        own = problem.positives.columns(x.shape[0])
        alike = row_ids == col_ids[own]  # the positive counts, whatever its id
        counts += alike.to(counts.dtype) - left_out[0]
        sums += z_pos.masked_fill(~alike, 0.0) - left_out[1]
    elif problem.symmetric:  # no row is its own candidate
        counts -= 1
        sums -= scale * square_norms(x)
    return counts, sums
