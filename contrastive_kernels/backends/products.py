"""The product of a panel's operands, and the switch for AMX units."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import torch

from ..panels.panel import Panel

__all__ = ["default_weights_dtype", "score_product"]


def default_weights_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """bfloat16 where the CPU multiplies it faster than float32, else the dtype of the scores."""
    onednn = dtype == torch.bfloat16 and device.type == "cpu" and torch.backends.mkldnn.is_available()
    if onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    return torch.float64 if dtype == torch.float64 else torch.float32


def _multiplies_bfloat16_exactly() -> bool:
    """Whether float32 products can run on AMX units, and torch (2.9 or later) has the switch for it."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is not None and bool(supported()) and hasattr(torch.backends.mkldnn, "matmul")


class _AmxProducts:
    """Within it, float32 products on the CPU run in bfloat16 on the AMX units.

    The switch is the process's: the first thread in sets it, the last one out restores it. Another thread's own float32
    products meanwhile run in bfloat16 too, which is why it is held for one product at a time.
    """

    available = _multiplies_bfloat16_exactly()

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before = "none"

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                mkldnn: Any = torch.backends.mkldnn
                before = mkldnn.matmul.fp32_precision
                # What inherits its setting reads as what it inherits; written back, it would inherit no more.
                self._before = "none" if before == mkldnn.fp32_precision else before
                mkldnn.matmul.fp32_precision = "bf16"
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                torch.backends.mkldnn.matmul.fp32_precision = self._before  # type: ignore[attr-defined]


_amx_products = _AmxProducts()


def score_product(panel: Panel) -> None:
    """scores = x yT in full precision [R, C], unless they are there already.

    float32 copies of bfloat16 values are multiplied on the AMX units where there are some: products of bfloat16 values
    are exact in float32.
    """
    if panel.scores_ready:
        return
    exact = panel.bfloat16_values and panel.scores.device.type == "cpu" and _AmxProducts.available
    with _amx_products if exact else contextlib.nullcontext():
        torch.mm(panel.x, panel.y.T, out=panel.scores)
