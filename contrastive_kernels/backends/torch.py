"""The panel operations in plain torch: any device, any floating dtype. The readable version."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..draws.philox import gumbel
from ..panels.pairs import ALIKE_ALONE
from ..panels.panel import Panel, Route, SearchPanel, Side, present
from ..panels.size import Size
from ..panels.terms import EXPONENTIAL, GUMBEL_MAX, MAXIMUM, RANK, SEARCHES, SIGMOID, PairTerm
from .base import Backend
from .products import default_weights_dtype, score_product

__all__ = ["TorchBackend", "search_scores"]


class TorchBackend(Backend):
    """Serves everything that torch does."""

    name = "torch"
    terms = (EXPONENTIAL, SIGMOID, *SEARCHES)
    scales_by_row = True
    temporaries = 3
    search_temporaries = 8

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None

    def weights_dtype(self, device: torch.device, dtype: torch.dtype) -> torch.dtype:
        return default_weights_dtype(device, dtype)

    def route(self, size: Size) -> Route:
        return Route("operations of torch")

    def reduce_panel(self, term: PairTerm, panel: Panel) -> None:
        score_product(panel)
        if panel.pairs.row_scale is not None:
            _fold_side(panel, panel.row, _logits(panel, term, dim=1), 1)
            _fold_side(panel, panel.col, _logits(panel, term, dim=0), 0)
            return
        _FOLD[term](panel, _logits(panel, term))

    def weight_panel(self, term: PairTerm, panel: Panel) -> None:
        score_product(panel)
        if panel.pairs.row_scale is not None:
            _weigh_scaled(panel)
            return
        z = _logits(panel, term)
        _FOLD[term](panel, z)
        w = _weights(term, panel, z)
        if panel.dparams is not None:
            centered = panel.scores - panel.params[2]
            panel.dparams[0] += centered.mul_(w).sum(dtype=panel.dparams.dtype)
            panel.dparams[1] += w.sum(dtype=panel.dparams.dtype)
        torch.mul(w, panel.params[0] if panel.factor is None else panel.factor, out=w)
        panel.weights.copy_(w)

    def search_panel(self, term: PairTerm, panel: SearchPanel) -> None:
        score_product(panel)
        if term is RANK:
            z = _logits(panel, term, excluded=torch.nan)
            present(panel.below).add_((z < present(panel.low)[:, None]).sum(1))
            present(panel.above).add_((z > present(panel.high)[:, None]).sum(1))
            return
        z = _logits(panel, term)
        rows, columns = z.shape
        if term is GUMBEL_MAX:
            first_row, first = panel.pairs.first_row, panel.pairs.first_column
            z += gumbel(present(panel.seed), slice(first_row, first_row + rows), slice(first, first + columns))
        best, column = present(panel.best), present(panel.best_column)
        highest, where = z.masked_fill_(z.isnan(), -torch.inf).max(1)
        better = highest > best
        best.copy_(torch.where(better, highest, best))
        column.copy_(torch.where(better, where + panel.pairs.first_column, column))


def _scale(panel: Panel, dim: int) -> Tensor:
    """What scores are multiplied by for their logits among their rows' (dim 1), or their columns' (0)."""
    by_row, by_col = panel.pairs.row_scale, panel.pairs.col_scale
    if by_row is None or by_col is None:
        return panel.params[0]
    return by_row[:, None] if dim else by_col


def _logits(panel: Panel, term: PairTerm, excluded: float = -torch.inf, dim: int = 1) -> Tensor:
    """z = scale * scores + bias with what the pairs say [R, C]: excluded ones at -inf, or another value.

    The sigmoid term's positives have -z, which makes their loss that of a negative. dim: as for `_scale`.
    """
    z, pairs = panel.scores * _scale(panel, dim), panel.pairs
    z += panel.params[1]
    if pairs.col_bias is not None:
        z += pairs.col_bias
    alike = pairs.alike(slice(None))
    if alike is not None and term is SIGMOID:
        counts = alike if pairs.col_bias is None else alike & (pairs.col_bias != excluded)
        z = torch.where(counts, -z, z)
    elif alike is not None and not pairs.equal_ids:
        z.masked_fill_(alike, excluded)
    if alike is not None and pairs.equal_ids == ALIKE_ALONE:
        z.masked_fill_(~alike, excluded)
    rows, columns = z.shape
    if pairs.diagonal is not None:
        shift = pairs.first_row + pairs.diagonal - pairs.first_column
        if -rows < shift < columns:
            z.diagonal(shift).fill_(excluded)
    if pairs.columns is not None:
        for k in range(pairs.columns.shape[1]):
            local = pairs.columns[:, k : k + 1] - pairs.first_column
            inside = (local >= 0) & (local < columns)
            local = local.clamp(0, columns - 1)
            z.scatter_(1, local, z.gather(1, local).masked_fill_(inside, excluded))
    return z


def search_scores(panel: SearchPanel) -> Tensor:
    """The logits of a panel [R, C], those that are left out and NaN at -inf."""
    score_product(panel)
    z = _logits(panel, MAXIMUM)
    return z.masked_fill_(z.isnan(), -torch.inf)


def _softplus(z: Tensor) -> Tensor:
    """log(1 + e^z) without a threshold."""
    return z.clamp(min=0) + torch.log1p(torch.exp(-z.abs()))


def _fold_sigmoid(panel: Panel, z: Tensor) -> None:
    """Adds the rows' sums of softplus(z)."""
    if panel.row.state is not None:
        panel.row.state[0].add_(_softplus(z).sum(1))


def _fold_exponential(panel: Panel, z: Tensor) -> None:
    """Merges the panel's (shift, sum) into the states that there are."""
    _fold_side(panel, panel.row, z, 1)
    _fold_side(panel, panel.col, z, 0)


def _below(panel: Panel, z: Tensor, dim: int) -> Tensor:
    """z with -inf above the ceilings of rows (dim 1) or of columns [R, C], and where a guide's are above thresholds.

    z itself where there are neither.
    """
    pairs = panel.pairs
    ceiling, threshold = (pairs.row_ceiling, pairs.row_threshold) if dim else (pairs.col_ceiling, pairs.col_threshold)
    out = None
    if threshold is not None:
        out = present(panel.guide) > threshold.unsqueeze(dim)
    if ceiling is not None:
        too_high = panel.scores * _scale(panel, dim) > ceiling.unsqueeze(dim)
        out = too_high if out is None else out.logical_or_(too_high)
    return z if out is None else z.masked_fill(out, -torch.inf)


def _fold_side(panel: Panel, side: Side, z: Tensor, dim: int) -> None:
    """Merges the panel's (shift, sum) along `dim` into side.state [2, n]."""
    if side.state is None:
        return
    below = _below(panel, z, dim)
    highest = torch.maximum(side.state[0], below.amax(dim))
    shift = highest.masked_fill(highest == -torch.inf, 0.0)
    spread = below - shift.unsqueeze(dim) if below is z else below.sub_(shift.unsqueeze(dim))
    sums = torch.exp(spread).sum(dim)
    side.state[1] = side.state[1] * torch.exp(side.state[0] - shift) + sums
    side.state[0] = highest


def _weights(term: PairTerm, panel: Panel, z: Tensor) -> Tensor:
    """The term's weights less the targets [R, C]; z is overwritten."""
    targets = [(side.target, dim) for side, dim in ((panel.row, 2), (panel.col, 1)) if side.target is not None]
    if not targets:
        return _WEIGHTS[term](panel, z)
    left_out, alike = z == -torch.inf, panel.pairs.alike(slice(None))
    w = _WEIGHTS[term](panel, z)
    for target, dim in targets:
        of_others, of_alike = target.unsqueeze(dim)
        w -= of_others if alike is None else torch.where(alike, of_alike, of_others)
    return w.masked_fill_(left_out, 0.0)


def _weigh_scaled(panel: Panel) -> None:
    """Leaves factor * (row_scale w_row + col_scale w_col) in the weights, and the parts of the scales' gradients."""
    total = None
    for dim, one in ((1, replace(panel, col=Side())), (0, replace(panel, row=Side()))):
        side = one.row if dim else one.col
        w = _weights(EXPONENTIAL, one, _logits(one, EXPONENTIAL, dim=dim))
        if side.dscale is not None:
            side.dscale += (panel.scores - panel.params[2]).mul_(w).sum(dim)
        w *= _scale(panel, dim)
        total = w if total is None else total.add_(w)
    panel.weights.copy_(present(total).mul_(panel.params[0] if panel.factor is None else panel.factor))


def _sigmoid_weights(panel: Panel, z: Tensor) -> Tensor:
    """w = r_i sigmoid(z) [R, C]; z is overwritten."""
    w = z.sigmoid_().mul_(present(panel.row.gain)[:, None])
    alike = panel.pairs.alike(slice(None))
    return w if alike is None else torch.where(alike, -w, w)


def _exponential_weights(panel: Panel, z: Tensor) -> Tensor:
    """w = r_i exp(z - a_i) + c_j exp(z - b_j) [R, C]; z is overwritten where it serves only one side."""
    row, col = panel.row, panel.col
    w = None
    if col.gain is not None:
        shift, rest = present(col.normalizer)
        below = _below(panel, z, 0)
        spread = z - shift if below is z else below.sub_(shift)
        w = _finite_exp_(spread.sub_(rest)).mul_(col.gain)
        if row.gain is None:
            return w
    shift, rest = present(row.normalizer)[:, :, None]
    by_row = _finite_exp_(_below(panel, z, 1).sub_(shift).sub_(rest)).mul_(present(row.gain)[:, None])
    return by_row if w is None else by_row.add_(w)


def _finite_exp_(exponent: Tensor) -> Tensor:
    """exp in place, saturating below infinity: a stale normaliser times a gain of 0 must stay 0. NaN stays NaN."""
    return exponent.clamp_(max=math.log(torch.finfo(exponent.dtype).max) - 0.01).exp_()


#: What the terms fold into states, and their weights; in place of a question in every operation.
_FOLD = {EXPONENTIAL: _fold_exponential, SIGMOID: _fold_sigmoid}
_WEIGHTS = {EXPONENTIAL: _exponential_weights, SIGMOID: _sigmoid_weights}
