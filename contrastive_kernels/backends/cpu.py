"""The CPU: torch's matrix product for the tile, then one pass of C++ over it while it lies in cache."""

from __future__ import annotations

import torch

from ..specs import PairTerm
from .native import MISSING, common_fields, search_fields, weight_fields
from .panel import Panel, SearchPanel, score_product

if MISSING is None:
    from contrastive_kernels import _C

__all__ = ["instruction_set", "reduce_panel", "search_panel", "weight_panel", "why_not"]


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


def reduce_panel(term: PairTerm, panel: Panel) -> None:
    """Folds the panel into row.state and col.state."""
    score_product(panel)
    _C.reduce_panel(**common_fields(term, panel), threads=torch.get_num_threads())


def weight_panel(term: PairTerm, panel: Panel) -> None:
    """Leaves scale * dL/dz in panel.weights and its partial sums in panel.dparams; folds into the states there are."""
    score_product(panel)
    _C.weight_panel(**common_fields(term, panel), **weight_fields(panel), threads=torch.get_num_threads())


def search_panel(term: PairTerm, panel: SearchPanel) -> None:
    """Folds the panel into the rows' best score and its column, or into their counts."""
    score_product(panel)
    _C.search_panel(**common_fields(term, panel), **search_fields(panel), threads=torch.get_num_threads())
