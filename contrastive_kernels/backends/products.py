"""The product of a panel's operands, and the switch for AMX units."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..panels.panel import Panel

__all__ = ["ADDS_IN_FLOAT32", "default_weights_dtype", "on_amx_units", "score_product"]

#: torch 2.10 adds 16-bit products to float32 sums without rounding them in between (on CUDA). 2.8 and 2.9 have the
#: overload too, but want sums of the operands' dtype (pytorch#167931).
ADDS_IN_FLOAT32 = torch.__version__ >= "2.10"


def default_weights_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """bfloat16 where the CPU multiplies it faster than float32, else the dtype of the scores."""
    onednn = dtype == torch.bfloat16 and device.type == "cpu" and torch.backends.mkldnn.is_available()
    if onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    return torch.float64 if dtype == torch.float64 else torch.float32


def _multiplies_bfloat16_exactly() -> bool:
    """Whether float32 products can run on AMX units, and torch (2.9 or later) has the switch for it."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is not None and bool(supported()) and hasattr(torch._C, "_set_fp32_precision_setter")


class _AmxProducts:
    """float32 products on the CPU, in bfloat16 on the AMX units.

    The switch is the process's: the first product in sets it, the last one out restores it. Another thread's own
    float32 products meanwhile run in bfloat16 too, which is why it is held for one product at a time.

    Ctrl-C raises KeyboardInterrupt between any two bytecodes, also those of a ``with`` or ``finally``, and would leave
    the whole process at 8 bits. So setting, product and restoring are one call of functions written in C, where it
    waits; under the interpreter's lock nothing but the product itself lets another thread in between.
    """

    available = _multiplies_bfloat16_exactly()

    def __init__(self) -> None:
        #: a token for each product that runs now
        self._running: set[object] = set()
        #: the process's own setting, and the one while products run
        self._settings = ["none", "bf16"]

    def multiply(self, x: Tensor, y: Tensor, out: Tensor) -> None:
        """out = x y."""
        token = object()
        leave = (partial(self._running.discard, token), self._switching())
        steps = (
            partial(self._settings.__setitem__, 0, self._own_setting()),
            partial(self._running.add, token),
            self._switching(),
            partial(torch.mm, x, y, out=out),
            *leave,
        )
        try:
            _run(steps)
        except BaseException:
            if token in self._running:  # the product failed, or a mode of torch's runs Python within it
                _run(leave)
            raise

    def _switching(self) -> partial[Any]:
        """A step that sets the switch by whether products run when the step is done."""
        found = map(self._settings.__getitem__, map(bool, (self._running,)))
        return partial(_exhaust, map(_precision("set"), ("mkldnn",), ("matmul",), found))

    def _own_setting(self) -> str:
        """The process's own setting, read at one moment."""
        questions = (
            partial(_precision("get"), "mkldnn", "matmul"),
            partial(_precision("get"), "mkldnn", "all"),
            partial(len, self._running),
            partial(self._settings.__getitem__, 0),
        )
        setting, inherited, running, known = list(map(partial.__call__, questions))
        if running:
            return str(known)
        # What inherits its setting reads as what it inherits; written back, it would inherit no more.
        return "none" if setting == inherited else str(setting)


def _precision(what: str) -> Any:
    """torch's function in C that gets or sets a precision."""
    return getattr(torch._C, f"_{what}_fp32_precision_{what}ter")


#: Takes all of an iterator, in C.
_exhaust: partial[deque[Any]] = partial(deque, maxlen=0)


def _run(steps: tuple[partial[Any], ...]) -> None:
    """Calls one after the other without a bytecode in between."""
    _exhaust(map(partial.__call__, steps))


_amx_products = _AmxProducts()


def on_amx_units() -> bool:
    """Whether float32 products of bfloat16 values run on AMX units."""
    return _AmxProducts.available


def score_product(panel: Panel, own: Callable[[Tensor, Tensor, Tensor], None] | None = None) -> None:
    """scores = x yT in full precision [R, C], and a guide's if there is one, unless they are there already.

    `own`: what writes x y of bfloat16 operands, in place of torch's float32 product of copies of them.
    """
    if panel.scores_ready:
        return
    _multiply(panel.x, panel.y, panel.bfloat16_values, panel.scores, own)
    of_rows, of_cols = panel.pairs.row_guide, panel.pairs.col_guide
    if panel.guide is not None and of_rows is not None and of_cols is not None:
        rounded, dtype = of_rows.dtype == torch.bfloat16, panel.guide.dtype
        _multiply(of_rows.to(dtype), of_cols.to(dtype), rounded, panel.guide, own)


def _multiply(
    x: Tensor, y: Tensor, bfloat16_values: bool, out: Tensor, own: Callable[[Tensor, Tensor, Tensor], None] | None
) -> None:
    """out = x yT.

    float32 copies of bfloat16 values are multiplied on the AMX units where there are some: products of bfloat16 values
    are exact in float32.
    """
    if own is not None and bfloat16_values:
        own(x, y.T, out)
    elif on_amx_units() and bfloat16_values and out.device.type == "cpu":
        _amx_products.multiply(x, y.T, out)
    else:
        torch.mm(x, y.T, out=out)
