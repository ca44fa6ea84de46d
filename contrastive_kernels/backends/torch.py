"""The panel operations in plain torch: any device, any floating dtype. The readable version."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..draws.philox import gumbel
from ..panels.panel import Panel, Route, SearchPanel, Side, present
from ..panels.size import Size
from ..panels.terms import GUMBEL_MAX, RANK, SIGMOID, PairTerm
from .products import score_product

__all__ = ["reduce_panel", "route", "search_panel", "weight_panel", "why_not"]


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """It runs everywhere."""
    return None


def route(size: Size) -> Route:
    """Its only one."""
    return Route("operations of torch")


def reduce_panel(term: PairTerm, panel: Panel) -> None:
    """Folds the panel into row.state and col.state."""
    score_product(panel)
    z = _logits(panel)
    if term is SIGMOID:
        _fold_sum(panel.row, _softplus(z).sum(1))
    else:
        _fold_exponential(panel.row, z, 1)
        _fold_exponential(panel.col, z, 0)


def weight_panel(term: PairTerm, panel: Panel) -> None:
    """Leaves scale * dL/dz in panel.weights and its partial sums in panel.dparams; folds into the states there are."""
    score_product(panel)
    z = _logits(panel)
    if term is SIGMOID:
        if panel.row.state is not None:
            _fold_sum(panel.row, _softplus(z).sum(1))
        w = z.sigmoid_().mul_(present(panel.row.gain)[:, None])
    else:
        _fold_exponential(panel.row, z, 1)
        _fold_exponential(panel.col, z, 0)
        w = _exponential_weights(panel, z)
    if panel.dparams is not None:
        panel.dparams[0] += (w * panel.scores).sum(dtype=panel.dparams.dtype)
        panel.dparams[1] += w.sum(dtype=panel.dparams.dtype)
    torch.mul(w, panel.params[0], out=w)
    panel.weights.copy_(w)


def search_panel(term: PairTerm, panel: SearchPanel) -> None:
    """Folds the panel into the rows' best score and its column, or into their counts."""
    score_product(panel)
    if term is RANK:
        z = _logits(panel, excluded=torch.nan)
        present(panel.below).add_((z < present(panel.low)[:, None]).sum(1))
        present(panel.above).add_((z > present(panel.high)[:, None]).sum(1))
        return
    z = _logits(panel)
    rows, columns = z.shape
    if term is GUMBEL_MAX:
        first_row, first = panel.first_row, panel.first_column
        z += gumbel(present(panel.seed), slice(first_row, first_row + rows), slice(first, first + columns))
    if panel.row_ids is not None:
        z.masked_fill_(panel.row_ids[:, None] == present(panel.col_ids), -torch.inf)
    best, column = present(panel.best), present(panel.best_column)
    highest, where = z.masked_fill_(z.isnan(), -torch.inf).max(1)
    better = highest > best
    best.copy_(torch.where(better, highest, best))
    column.copy_(torch.where(better, where + panel.first_column, column))


def _logits(panel: Panel, excluded: float = -torch.inf) -> Tensor:
    """z = scale * scores + bias with the excluded pairs at -inf, or another value [R, C]."""
    z = panel.scores * panel.params[0]
    z += panel.params[1]
    columns = z.shape[1]
    for k in range(panel.exclude.shape[1]):
        local = panel.exclude[:, k : k + 1] - panel.first_column
        inside = (local >= 0) & (local < columns)
        local = local.clamp(0, columns - 1)
        z.scatter_(1, local, z.gather(1, local).masked_fill_(inside, excluded))
    return z


def _softplus(z: Tensor) -> Tensor:
    """log(1 + e^z) without a threshold."""
    return z.clamp(min=0) + torch.log1p(torch.exp(-z.abs()))


def _fold_sum(side: Side, sums: Tensor) -> None:
    present(side.state)[0].add_(sums)


def _fold_exponential(side: Side, z: Tensor, dim: int) -> None:
    """Merges the panel's (maximum, sum) along `dim` into side.state [2, n]."""
    if side.state is None:
        return
    highest = torch.maximum(side.state[0], z.amax(dim))
    reference = highest.masked_fill(highest == -torch.inf, 0.0)
    sums = torch.exp(z - reference.unsqueeze(dim)).sum(dim)
    side.state[1] = side.state[1] * torch.exp(side.state[0] - reference) + sums
    side.state[0] = highest


def _exponential_weights(panel: Panel, z: Tensor) -> Tensor:
    """w = r_i exp(z - a_i) + c_j exp(z - b_j) [R, C]; z is overwritten where it serves only one side."""
    row, col = panel.row, panel.col
    w = None
    if col.gain is not None:
        w = _finite_exp_(z - present(col.normalizer)).mul_(col.gain)
        if row.gain is None:
            return w
    by_row = _finite_exp_(z.sub_(present(row.normalizer)[:, None])).mul_(present(row.gain)[:, None])
    return by_row if w is None else by_row.add_(w)


def _finite_exp_(exponent: Tensor) -> Tensor:
    """exp in place, saturating below infinity: a stale normaliser times a gain of 0 must stay 0. NaN stays NaN."""
    return exponent.clamp_(max=math.log(torch.finfo(exponent.dtype).max) - 0.01).exp_()
