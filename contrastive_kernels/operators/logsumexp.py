"""The log-sum-exp over a row's negatives, of rows and of columns; differentiable."""

from __future__ import annotations

from torch import Tensor

from ..engine.driver import gradient_pass, log_sums, normalizer_of, softmax_side, statistics_pass
from ..engine.matrix import Problem, ScoreMatrix
from ..panels.panel import Side
from ..panels.size import score_dtype
from ..panels.terms import EXPONENTIAL
from .parts import bounded_ceilings, gradients_of, wanted_of
from .registration import register
from .second import dense_logits, dense_normalizer
from .shared import Call, Outputs, Primitive

__all__ = ["logsumexp", "normalizers"]


def logsumexp(problem: Problem) -> Tensor:
    """log sum_j exp(z_ij) over the pairs of row i that count [N]; -inf where there are none."""
    rows: Tensor = log_sum_exps(problem, (), (False,))[0]
    return rows


def normalizers(problem: Problem, *, cols: bool = False) -> tuple[Tensor, Tensor | None]:
    """The same of rows [2, N] and, if wanted, of columns [2, M], as two numbers (shift, rest); not differentiable."""
    _, _, row, col = log_sum_exps(problem, (), (cols,))
    return row, col if cols else None


def _matrix(problem: Problem) -> ScoreMatrix:
    return ScoreMatrix.of(problem, EXPONENTIAL, problem.backend())


def _forward(call: Call) -> Outputs:
    """Log-sum-exps of rows, and of columns; the same as two numbers each."""
    row_state, col_state = statistics_pass(_matrix(call.problem), cols=call.settings[0])
    row, col = normalizer_of(row_state), None if col_state is None else normalizer_of(col_state)
    return log_sums(row), None if col is None else log_sums(col), row, col


def _fake(call: Call) -> Outputs:
    x, y, cols, dtype = call.problem.x, call.problem.y, call.settings[0], score_dtype(call.problem.x.dtype)
    return (
        x.new_empty(x.shape[0], dtype=dtype),
        x.new_empty(y.shape[0], dtype=dtype) if cols else None,
        x.new_empty((2, x.shape[0]), dtype=dtype),
        x.new_empty((2, y.shape[0]), dtype=dtype) if cols else None,
    )


def _gradients(call: Call, kept: Outputs, upstream: Outputs) -> Outputs:
    """The weights are upstream times the softmax."""
    row, col = kept
    matrix = _matrix(bounded_ceilings(call.problem, row, col))
    row_side = Side() if upstream[0] is None else softmax_side(row, upstream[0])
    col_side = row_side if matrix.symmetric else Side() if upstream[1] is None else softmax_side(col, upstream[1])
    return gradients_of(call, gradient_pass(matrix, row_side, col_side, wanted_of(call)))


def _dense(call: Call, rows: slice, turned: bool) -> Outputs:
    z, _ = dense_logits(call.problem, rows, turned)
    shift, rest = dense_normalizer(z)
    return (None, shift + rest) if turned else (shift + rest, None)


log_sum_exps = register(
    Primitive(
        "logsumexp",
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
