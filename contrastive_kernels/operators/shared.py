"""The two primitives as torch.library operators: schema, fake and implementation, opaque to torch.compile.

The operators know nothing of autograd (``_autograd.py`` does). Positives are given as ``index`` [N] (checked before, -1
for none), or as ``offset``, or not at all (both None). An output that is not wanted is an empty tensor. ``backend`` ""
lets the registry choose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from .._library import define
from ..engine.driver import keeps_scores, log_sums, positive_dots, reduce, weigh
from ..engine.gradients import Gradients
from ..engine.matrix import Stream
from ..engine.positives import Positives
from ..panels.panel import Side
from ..panels.size import score_dtype
from ..panels.terms import EXPONENTIAL, SIGMOID, PairTerm

__all__ = [
    "add_positive_params",
    "empty",
    "given",
    "gradient_outputs",
    "log_sum",
    "log_sum_backward",
    "make_stream",
    "or_empty",
    "pair_sum",
    "saved_dtype",
    "softmax_side",
]


_TERMS: dict[str, PairTerm] = {EXPONENTIAL.name: EXPONENTIAL, SIGMOID.name: SIGMOID}


def make_stream(
    term: PairTerm,
    x: Tensor,
    y: Tensor,
    params: Tensor,
    index: Tensor | None,
    offset: int | None,
    backend: str,
    workspace_bytes: int,
    symmetric: bool = False,
    gradient_dtype: torch.dtype | None = None,
    scores: Tensor | None = None,
) -> Stream:
    chosen = backends.choose(backend or None, x.device, x.dtype)
    x, y = x.contiguous(), x if symmetric else y.contiguous()
    positives = Positives(offset, index)
    return Stream(
        term, x, x if symmetric else y, params, positives, chosen, workspace_bytes, gradient_dtype, scores, symmetric
    )


def empty(like: Tensor) -> Tensor:
    """The empty tensor that stands for an output that is not wanted."""
    return like.new_empty(0, dtype=score_dtype(like.dtype))


def or_empty(value: Tensor | None, like: Tensor) -> Tensor:
    return empty(like) if value is None else value


def _keeps_scores(x: Tensor, y: Tensor, backend: str, workspace_bytes: int) -> bool:
    chosen = backends.choose(backend or None, x.device, x.dtype)
    return keeps_scores(x.shape[0], y.shape[0], x.dtype, chosen, workspace_bytes)


def _log_sum(
    x: Tensor,
    y: Tensor,
    params: Tensor,
    index: Tensor | None,
    offset: int | None,
    rows: bool,
    cols: bool,
    symmetric: bool,
    keep: bool,
    backend: str,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kept = None
    if keep and _keeps_scores(x, y, backend, workspace_bytes):
        kept = x.new_empty(len(x), len(y), dtype=score_dtype(x.dtype))
    stream = make_stream(
        EXPONENTIAL, x, y, params, index, offset, backend, workspace_bytes, symmetric=symmetric, scores=kept
    )
    row, col = reduce(stream, rows, cols)
    return (
        empty(x) if row is None else log_sums(row),
        empty(x) if col is None or symmetric else log_sums(col),
        positive_dots(stream) if stream.positives.exist else empty(x),
        or_empty(kept, x),
    )


def _log_sum_fake(x, y, params, index, offset, rows, cols, symmetric, keep, backend, workspace_bytes):  # type: ignore[no-untyped-def]
    dtype = score_dtype(x.dtype)
    held = index is not None or offset is not None
    kept = keep and _keeps_scores(x, y, backend, workspace_bytes)
    return (
        x.new_empty(x.shape[0] if rows else 0, dtype=dtype),
        x.new_empty(y.shape[0] if cols and not symmetric else 0, dtype=dtype),
        x.new_empty(x.shape[0] if held else 0, dtype=dtype),
        x.new_empty((x.shape[0], y.shape[0]) if kept else (0,), dtype=dtype),
    )


def _log_sum_backward(
    x: Tensor,
    y: Tensor,
    params: Tensor,
    index: Tensor | None,
    offset: int | None,
    symmetric: bool,
    row_log_sum: Tensor,
    col_log_sum: Tensor,
    scores: Tensor,
    row_gradient: Tensor | None,
    col_gradient: Tensor | None,
    dot_gradient: Tensor | None,
    need_x: bool,
    need_y: bool,
    need_params: bool,
    backend: str,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    kept = scores if scores.dim() == 2 else None
    stream = make_stream(
        EXPONENTIAL, x, y, params, index, offset, backend, workspace_bytes, symmetric=symmetric, scores=kept
    )
    row = softmax_side(row_log_sum, row_gradient)
    col = row if symmetric else softmax_side(col_log_sum, col_gradient)
    gradients = weigh(stream, row, col, (need_x, need_y, need_params), dot_gradient)
    return gradient_outputs(gradients, x, params, x.dtype)


def gradient_outputs(
    gradients: Gradients, x: Tensor, params: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dy (of this dtype) and dparams as an operator returns them: empty where they are not wanted."""
    dx, dy, dparams = gradients.dx, gradients.dy, gradients.dparams
    return (
        x.new_empty(0, dtype=dtype) if dx is None else dx,
        x.new_empty(0, dtype=dtype) if dy is None else dy,
        or_empty(None if dparams is None else dparams.to(params.dtype), x),
    )


def softmax_side(log_sum: Tensor, gradient: Tensor | None) -> Side:
    """The side whose weights are gradient * softmax; a log-sum of nothing (-inf) gives no weight."""
    if gradient is None:
        return Side()
    return Side(normalizer=log_sum.masked_fill(log_sum == -torch.inf, torch.inf), gain=gradient.contiguous())


def _log_sum_backward_fake(  # type: ignore[no-untyped-def]
    x, y, params, index, offset, symmetric, row_log_sum, col_log_sum, scores, row_gradient, col_gradient, dot_gradient,
    need_x, need_y, need_params, backend, workspace_bytes,
):  # fmt: skip
    return (
        x.new_empty(x.shape if need_x else (0,)),
        y.new_empty(y.shape if need_y and not symmetric else (0,)),
        params.new_empty(params.shape if need_params else (0,)),
    )


def _pair_sum(
    x: Tensor,
    y: Tensor,
    params: Tensor,
    index: Tensor | None,
    offset: int | None,
    term: str,
    row_normalizer: Tensor | None,
    row_gain: Tensor,
    col_normalizer: Tensor | None,
    col_gain: Tensor | None,
    relative: bool,
    need_x: bool,
    need_y: bool,
    need_params: bool,
    backend: str,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    gradient_dtype = saved_dtype(x.dtype)
    stream = make_stream(
        _TERMS[term], x, y, params, index, offset, backend, workspace_bytes, gradient_dtype=gradient_dtype
    )
    dots = positive_dots(stream) if stream.positives.exist else empty(x)
    wanted = (need_x, need_y, need_params)
    if stream.term is SIGMOID:
        row, gradients = _sigmoid_sum(stream, dots, row_gain, wanted)
        col = None
    else:
        sides = [(given(row_normalizer), row_gain)]
        if col_gain is not None:
            sides.append((given(col_normalizer), col_gain))
        row, col, gradients = _exponential_sum(stream, dots, sides, relative, wanted)
    return (row, or_empty(col, x), dots, *gradient_outputs(gradients, x, params, gradient_dtype))


def given(vector: Tensor | None) -> Tensor:
    """A vector that must be there."""
    if vector is None:
        raise RuntimeError("contrastive_kernels: an operator came without a vector that its term needs")
    return vector


def _sigmoid_sum(
    stream: Stream, dots: Tensor, gain: Tensor, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, Gradients]:
    """Row sums of softplus(z) over negatives and softplus(-z) of the positive; gradients weighted by the gains."""
    z_pos = stream.params[0] * dots + stream.params[1]
    positive_loss = -torch.nn.functional.logsigmoid(z_pos)
    if not any(wanted):
        state, _ = reduce(stream, True, False)
        return given(state)[0] + positive_loss, Gradients()
    state = torch.zeros(1, len(dots), dtype=dots.dtype, device=dots.device)
    dz_pos = -torch.sigmoid(-z_pos) * gain
    gradients = weigh(stream, Side(state, None, gain), Side(), wanted, dz_pos * stream.params[0])
    add_positive_params(gradients, dz_pos, dots)
    return state[0] + positive_loss, gradients


def _exponential_sum(
    stream: Stream,
    dots: Tensor,
    sides: list[tuple[Tensor, Tensor]],
    relative: bool,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor | None, Gradients]:
    """Log-sums of rows and columns; gradients of sum_i r_i sum_j exp(z_ij - a_i), and the same of the columns.

    `sides` holds (a, r) and perhaps (b, c). Relative normalisers are counted from the positive's logit, which then
    takes part in the gradients.
    """
    if not any(wanted):
        row, col = reduce(stream, True, len(sides) == 2)
        return log_sums(given(row)), None if col is None else log_sums(col), Gradients()
    if relative:
        z_pos = stream.params[0] * dots + stream.params[1]
        sides = [(z_pos + normalizer, gain) for normalizer, gain in sides]
    states = [_exponential_state(gain) for _, gain in sides]
    row_side, col_side = [Side(state, *side) for state, side in zip(states, sides)] + [Side()] * (2 - len(sides))

    def positive_weights() -> Tensor:
        """dL/dz_pos [N] = -(the weights' sums over the row, and over the column)."""
        sums = [gain * torch.exp(log_sums(state) - n) for state, (n, gain) in zip(states, sides)]
        return -torch.stack(sums).sum(0)

    late = (lambda: positive_weights() * stream.params[0]) if relative else None
    gradients = weigh(stream, row_side, col_side, wanted, late_positive=late)
    if relative:
        add_positive_params(gradients, positive_weights(), dots)
    return log_sums(states[0]), log_sums(states[1]) if len(states) == 2 else None, gradients


def add_positive_params(gradients: Gradients, dz_pos: Tensor, dots: Tensor) -> None:
    """The positive pairs' part of the gradients of scale and bias."""
    if gradients.dparams is not None:
        gradients.dparams[0] += (dz_pos * dots).sum(dtype=gradients.dparams.dtype)
        gradients.dparams[1] += dz_pos.sum(dtype=gradients.dparams.dtype)


def _exponential_state(like: Tensor) -> Tensor:
    state = like.new_zeros(2, len(like))
    state[0] = -torch.inf
    return state


def saved_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of gradients that wait for the upstream factor: float16 would lose small ones to underflow."""
    return torch.float32 if dtype == torch.float16 else dtype


def _pair_sum_fake(  # type: ignore[no-untyped-def]
    x, y, params, index, offset, term, row_normalizer, row_gain, col_normalizer, col_gain, relative,
    need_x, need_y, need_params, backend, workspace_bytes,
):  # fmt: skip
    dtype, saved = score_dtype(x.dtype), saved_dtype(x.dtype)
    held = index is not None or offset is not None
    return (
        x.new_empty(x.shape[0], dtype=dtype),
        x.new_empty(0 if col_gain is None else y.shape[0], dtype=dtype),
        x.new_empty(x.shape[0] if held else 0, dtype=dtype),
        x.new_empty(x.shape if need_x else (0,), dtype=saved),
        y.new_empty(y.shape if need_y else (0,), dtype=saved),
        params.new_empty(params.shape if need_params else (0,)),
    )


log_sum = define(
    "log_sum(Tensor x, Tensor y, Tensor params, Tensor? index, SymInt? offset, bool rows, bool cols, bool symmetric, "
    "bool keep, str backend, int workspace_bytes) -> (Tensor, Tensor, Tensor, Tensor)",
    _log_sum_fake,
    _log_sum,
)


log_sum_backward = define(
    "log_sum_backward(Tensor x, Tensor y, Tensor params, Tensor? index, SymInt? offset, bool symmetric, "
    "Tensor row_log_sum, Tensor col_log_sum, Tensor scores, Tensor? row_gradient, Tensor? col_gradient, "
    "Tensor? dot_gradient, bool need_x, bool need_y, bool need_params, str backend, "
    "int workspace_bytes) -> (Tensor, Tensor, Tensor)",
    _log_sum_backward_fake,
    _log_sum_backward,
)


pair_sum = define(
    "pair_sum(Tensor x, Tensor y, Tensor params, Tensor? index, SymInt? offset, str term, Tensor? row_normalizer, "
    "Tensor row_gain, Tensor? col_normalizer, Tensor? col_gain, bool relative, bool need_x, bool need_y, "
    "bool need_params, str backend, int workspace_bytes) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _pair_sum_fake,
    _pair_sum,
)
