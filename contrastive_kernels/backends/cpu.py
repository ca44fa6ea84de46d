"""The CPU: torch's matrix product for the tile, then one pass of C++ over it while it lies in cache."""

from __future__ import annotations

import functools

import torch

from ..panels.panel import Panel, Route, SearchPanel
from ..panels.size import Size
from ..panels.terms import EXPONENTIAL, SEARCHES, SIGMOID, PairTerm
from .base import Backend
from .native import MISSING, common_fields, score_fields, search_fields, weight_fields
from .products import score_product

if MISSING is None:
    from contrastive_kernels import _C

__all__ = ["CpuBackend", "instruction_set"]


class CpuBackend(Backend):
    """Serves float32 scores in the machine's memory."""

    name = "cpu"
    terms = (EXPONENTIAL, SIGMOID, *SEARCHES)

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if MISSING is not None:
            return MISSING
        if device.type != "cpu":
            return f"it serves tensors on the CPU, not on {device.type}"
        if dtype == torch.float64:
            return "its scores are float32; float64 is the torch backend's"
        return None

    def route(self, size: Size) -> Route:
        return _route(instruction_set())

    def reduce_panel(self, term: PairTerm, panel: Panel) -> None:
        _C.reduce_panel(**_fields(term, panel))

    def weight_panel(self, term: PairTerm, panel: Panel) -> None:
        _C.weight_panel(**_fields(term, panel), **weight_fields(panel))

    def search_panel(self, term: PairTerm, panel: SearchPanel) -> None:
        _C.search_panel(**_fields(term, panel), **search_fields(panel))


def instruction_set() -> str | None:
    """The instruction set that the C++ pass runs with, or None without the extension."""
    return None if MISSING is not None else _C.instruction_set()


@functools.cache
def _route(isa: str | None) -> Route:
    return Route(f"torch's matrix product + one pass in {isa}")


def _fields(term: PairTerm, panel: Panel) -> dict[str, int]:
    """Makes the scores; what every operation is told."""
    score_product(panel)
    return common_fields(term, panel) | score_fields(panel.scores) | {"threads": torch.get_num_threads()}
