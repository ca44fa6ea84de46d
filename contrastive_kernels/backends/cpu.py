"""The CPU: torch's matrix product for the tile, then one pass of C++ over it while it lies in cache."""

from __future__ import annotations

import functools

import torch

from ..panels.panel import Panel, Route, SearchPanel
from ..panels.size import Size
from ..panels.terms import PairTerm
from .native import MISSING, common_fields, score_fields, search_fields, weight_fields
from .products import score_product

if MISSING is None:
    from contrastive_kernels import _C

__all__ = ["instruction_set", "reduce_panel", "route", "search_panel", "weight_panel", "why_not"]


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why this backend cannot serve, or None."""
    if MISSING is not None:
        return MISSING
    if device.type != "cpu":
        return f"it serves tensors on the CPU, not on {device.type}"
    if dtype == torch.float64:
        return "its scores are float32; float64 is the torch backend's"
    return None


def instruction_set() -> str | None:
    """The instruction set that the C++ pass runs with, or None without the extension."""
    return None if MISSING is not None else _C.instruction_set()


def route(size: Size) -> Route:
    """Its only one."""
    return _route(instruction_set())


@functools.cache
def _route(isa: str | None) -> Route:
    return Route(f"torch's matrix product + one pass in {isa}")


def reduce_panel(term: PairTerm, panel: Panel) -> None:
    """Folds the panel into row.state and col.state."""
    _C.reduce_panel(**_fields(term, panel))


def weight_panel(term: PairTerm, panel: Panel) -> None:
    """Leaves scale * dL/dz in panel.weights and its partial sums in panel.dparams; folds into the states there are."""
    _C.weight_panel(**_fields(term, panel), **weight_fields(panel))


def search_panel(term: PairTerm, panel: SearchPanel) -> None:
    """Folds the panel into the rows' best score and its column, or into their counts."""
    _C.search_panel(**_fields(term, panel), **search_fields(panel))


def _fields(term: PairTerm, panel: Panel) -> dict[str, int]:
    """Makes the scores; what every operation is told."""
    score_product(panel)
    return common_fields(term, panel) | score_fields(panel.scores) | {"threads": torch.get_num_threads()}
