"""Small matrices on a GPU: prepared for the first call of a form, and found for the next ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.base import Prepared
from ..engine import strategy
from ..panels.pairs import EVERY_PAIR
from .shared import Call

__all__ = ["prepared_for"]

#: By all that they depend on; None: it cannot be prepared.
_prepared: dict[tuple[Any, ...], Prepared | None] = {}
#: Where shapes never come twice, this is of no use.
_MOST = 1024


def prepared_for(
    call: Call, kind: str, share: float, both: bool = False, rule: tuple[float, ...] = ()
) -> Prepared | None:
    """A sum of losses, prepared, if it can be.

    Parameters
    ----------
    call : Call
        Of a mean or a sum.
    kind : str
        "softmax", "sigmoid" or "ratio"; see :meth:`contrastive_kernels.backends.Backend.prepare`.
    share : float
        What every row's loss is multiplied by beside.
    both : bool
        Columns have losses too.
    rule : tuple of float
        Further numbers of a "ratio": c, log k and the excess.
    """
    problem = call.problem
    x, y, engine = problem.x, problem.y, problem.engine
    if not (x.is_contiguous() and y.is_contiguous()) or (x.data_ptr() | y.data_ptr()) & 15:
        return None
    dtype, extras = x.dtype, tuple([v is not None for v in call.extras])
    key = (
        kind, share, both, rule, x.shape, y.shape, dtype, x.device, _dtype(problem.scale), _dtype(problem.bias), extras,
        problem.offset, problem.index is None, problem.symmetric, problem.pairs is EVERY_PAIR, engine, call.needs,
        _float32_setting() if dtype is torch.float32 else None,
    )  # fmt: skip
    try:
        return _prepared[key]
    except KeyError:
        if len(_prepared) >= _MOST:
            _prepared.clear()
        made = _prepared[key] = _prepare(call, kind, share, both, rule)
        return made


def _prepare(call: Call, kind: str, share: float, both: bool, rule: tuple[float, ...]) -> Prepared | None:
    problem = call.problem
    backend, size = problem.backend(), problem.size()
    if not strategy.can_be_prepared(backend, size):
        return None
    extras = tuple([v is not None for v in call.extras])
    return backend.prepare(kind, problem, size, extras, share, both, call.needs[:4], rule)


def _dtype(value: Tensor | float) -> torch.dtype | None:
    """A tensor's dtype; None of a number."""
    return value.dtype if isinstance(value, Tensor) else None


def _float32_setting() -> Any:
    """How torch multiplies float32 matrices on a GPU."""
    matmul = torch.backends.cuda.matmul
    setting = getattr(matmul, "fp32_precision", None)  # torch 2.9; reading allow_tf32 beside it may raise
    return matmul.allow_tf32 if setting is None else setting
