"""Small matrices on a GPU: plans, made for the first call of a form and found for the next ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.base import Plan
from ..engine import strategy
from .shared import Call

__all__ = ["plan_of"]

#: By all that they depend on; None: there is none.
_plans: dict[tuple[Any, ...], Plan | None] = {}
#: Where shapes never come twice, plans are of no use.
_MOST_PLANS = 1024


def plan_of(call: Call, kind: str, share: float, both: bool = False) -> Plan | None:
    """How a sum of losses is computed by a plan, if it can be.

    Parameters
    ----------
    call : Call
        Of a mean or a sum.
    kind : str
        "softmax", "sigmoid" or "ratio"; see :meth:`contrastive_kernels.backends.Backend.plan`.
    share : float
        What every row's loss is multiplied by beside.
    both : bool
        Columns have losses too.
    """
    problem = call.problem
    x, y, engine = problem.x, problem.y, problem.engine
    if not (x.is_contiguous() and y.is_contiguous()) or (x.data_ptr() | y.data_ptr()) & 15:
        return None
    dtype, extras = x.dtype, tuple([v is not None for v in call.extras])
    key = (
        kind, share, both, x.shape, y.shape, dtype, x.device, _dtype(problem.scale), _dtype(problem.bias), extras,
        problem.offset, problem.index is None, problem.symmetric, problem.col_bias is None, engine, call.needs,
        _float32_setting() if dtype is torch.float32 else None,
    )  # fmt: skip
    try:
        return _plans[key]
    except KeyError:
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        plan = _plans[key] = _new_plan(call, kind, share, both)
        return plan


def _new_plan(call: Call, kind: str, share: float, both: bool) -> Plan | None:
    problem = call.problem
    backend, size = problem.backend(), problem.size()
    if not strategy.fits_plan(backend, size):
        return None
    extras = tuple([v is not None for v in call.extras])
    return backend.plan(kind, problem, size, extras, share, both, call.needs[:4])


def _dtype(value: Tensor | float) -> torch.dtype | None:
    """A tensor's dtype; None of a number."""
    return value.dtype if isinstance(value, Tensor) else None


def _float32_setting() -> Any:
    """How torch multiplies float32 matrices on a GPU."""
    matmul = torch.backends.cuda.matmul
    setting = getattr(matmul, "fp32_precision", None)  # torch 2.9; reading allow_tf32 beside it may raise
    return matmul.allow_tf32 if setting is None else setting
