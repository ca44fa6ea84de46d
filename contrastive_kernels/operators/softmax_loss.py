"""A softmax loss summed up, as an operator: its gradients come with it where scores need to be made only once."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from .. import backends
from .._library import define
from ..backends import Backend
from ..engine.driver import log_sums, positive_dots, reduce, weigh_bands
from ..engine.gradients import Gradients
from ..engine.matrix import Stream
from ..engine.workspace import band_rows, multiprocessors
from ..panels.panel import Side
from ..panels.size import Size, score_dtype
from ..panels.terms import EXPONENTIAL
from .shared import add_positive_params, given, gradient_outputs, make_stream, or_empty, saved_dtype, softmax_side

__all__ = ["loss_sum"]


def _loss_sum(
    x: Tensor,
    y: Tensor,
    params: Tensor,
    index: Tensor | None,
    offset: int | None,
    gain: Tensor,
    cols: bool,
    symmetric: bool,
    need_x: bool,
    need_y: bool,
    need_params: bool,
    backend: str,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    saved = saved_dtype(x.dtype)
    stream = make_stream(
        EXPONENTIAL, x, y, params, index, offset, backend, workspace_bytes, symmetric=symmetric, gradient_dtype=saved
    )
    dots, wanted = positive_dots(stream), (need_x, need_y, need_params)
    rows = None
    if any(wanted):
        rows = _band_rows(x, y, cols or symmetric, backend, workspace_bytes, _remembered_band_rows)
    if rows is None:
        row, col = (None if state is None else log_sums(state) for state in reduce(stream, True, cols))
        gradients = Gradients()
    else:
        row, col, gradients = _sum_by_bands(stream, dots, rows, gain, cols, wanted)
    col = col if cols and not symmetric else None
    return (given(row), or_empty(col, x), dots, *gradient_outputs(gradients, x, params, saved))


def _sum_by_bands(
    stream: Stream, dots: Tensor, rows: int, gain: Tensor, cols: bool, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor | None, Gradients]:
    """Log-sums, and the gradients of sum_i gain_i softplus(log-sum_i - z_i,p(i)) over rows, and over columns."""
    z_pos = stream.params[0] * dots + stream.params[1]
    dz_pos, row, col = torch.zeros_like(z_pos), torch.empty_like(z_pos), torch.empty_like(z_pos) if cols else None

    def side(i: slice, state: Tensor | None, found: Tensor) -> Side:
        log_sum = log_sums(given(state))
        softmax = gain[i] * torch.sigmoid(log_sum - z_pos[i])
        found[i] = log_sum
        dz_pos[i] -= softmax
        return softmax_side(log_sum, softmax)

    def sides(i: slice, row_state: Tensor | None, col_state: Tensor | None) -> tuple[Side, Side, Tensor]:
        of_rows = side(i, row_state, row)
        of_cols = of_rows if stream.symmetric else Side() if col is None else side(i, col_state, col)
        return of_rows, of_cols, dz_pos[i] * stream.params[0]

    gradients = weigh_bands(stream, rows, cols, sides, wanted)
    add_positive_params(gradients, dz_pos, dots)
    return row, col, gradients


#: A small batch is made of what comes beside its products. (Not in the fake, whose sizes may be symbols.)
_remembered_band_rows = lru_cache(maxsize=256)(band_rows)


def _band_rows(
    x: Tensor, y: Tensor, whole: bool, backend: str, workspace_bytes: int,
    find: Callable[[Backend, Size, bool], int | None] = band_rows,
) -> int | None:  # fmt: skip
    """Rows of a band, by what the operands are; None: scores are made twice, and gradients in backward."""
    chosen = backends.choose(backend or None, x.device, x.dtype)
    shape = x.shape[0], y.shape[0], x.shape[1]
    size = Size(*shape, x.dtype, x.device, False, workspace_bytes, multiprocessors(x.device), False)
    return find(chosen, size, whole)


def _loss_sum_fake(  # type: ignore[no-untyped-def]
    x, y, params, index, offset, gain, cols, symmetric, need_x, need_y, need_params, backend, workspace_bytes
):
    dtype, saved = score_dtype(x.dtype), saved_dtype(x.dtype)
    wanted = need_x or need_y or need_params
    made = wanted and _band_rows(x, y, cols or symmetric, backend, workspace_bytes) is not None
    return (
        x.new_empty(x.shape[0], dtype=dtype),
        x.new_empty(y.shape[0] if cols and not symmetric else 0, dtype=dtype),
        x.new_empty(x.shape[0], dtype=dtype),
        x.new_empty(x.shape if made and need_x else (0,), dtype=saved),
        x.new_empty(y.shape if made and need_y and not symmetric else (0,), dtype=saved),
        params.new_empty(params.shape if made and need_params else (0,)),
    )


loss_sum = define(
    "loss_sum(Tensor x, Tensor y, Tensor params, Tensor? index, SymInt? offset, Tensor gain, bool cols, "
    "bool symmetric, bool need_x, bool need_y, bool need_params, str backend, int workspace_bytes) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _loss_sum_fake,
    _loss_sum,
)
