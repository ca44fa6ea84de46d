"""The CPU: torch's matrix product for the tile, then one pass of C++ over it while it lies in cache."""

from __future__ import annotations

import torch
from torch import Tensor

from ..specs import GUMBEL_MAX, RANK, PairTerm
from .panel import Panel, SearchPanel, Side, present, score_product

try:  # torch is imported first, so that the extension shares its OpenMP runtime
    from contrastive_kernels import _C
except ImportError as error:
    _MISSING: str | None = f"the C++ extension contrastive_kernels._C is not installed ({error})"
else:
    _MISSING = None

__all__ = ["instruction_set", "reduce_panel", "search_panel", "weight_panel", "why_not"]

_WEIGHTS_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why this backend cannot serve, or None."""
    if _MISSING is not None:
        return _MISSING
    if device.type != "cpu":
        return f"it serves tensors on the CPU, not on {device.type}"
    if dtype == torch.float64:
        return "its scores are float32; float64 is the torch backend's"
    return None


def instruction_set() -> str | None:
    """The instruction set that the C++ pass runs with, or None without the extension."""
    return None if _MISSING is not None else _C.instruction_set()


def reduce_panel(term: PairTerm, panel: Panel) -> None:
    """Folds the panel into row.state and col.state."""
    score_product(panel)
    _C.reduce_panel(*_common_arguments(term, panel))


def weight_panel(term: PairTerm, panel: Panel) -> None:
    """Leaves scale * dL/dz in panel.weights and its partial sums in panel.dparams; folds into the states there are."""
    score_product(panel)
    row, col, weights = panel.row, panel.col, panel.weights
    vectors = [_address(vector) for vector in (row.normalizer, row.gain, col.normalizer, col.gain)]
    out = (weights.data_ptr(), _WEIGHTS_DTYPES[weights.dtype], weights.stride(0), _address(panel.dparams))
    arguments = (*_common_arguments(term, panel), *vectors, *out)
    _C.weight_panel(*arguments)


def search_panel(term: PairTerm, panel: SearchPanel) -> None:
    """Folds the panel into the rows' best score and its column, or into their counts."""
    score_product(panel)
    rows, cols = panel.scores.shape
    state = (panel.low, panel.high, panel.below, panel.above) if term is RANK else (panel.best, panel.best_column)
    addresses = [_address(present(vector)) for vector in state]
    _C.search_panel(
        term.code,
        panel.scores.data_ptr(),
        rows,
        cols,
        panel.scores.stride(0),
        panel.params.data_ptr(),
        _address(panel.exclude),
        panel.exclude.shape[1],
        panel.first_row,
        panel.first_column,
        torch.get_num_threads(),
        _address(panel.row_ids),
        _address(panel.col_ids),
        _address(present(panel.seed)) if term is GUMBEL_MAX else 0,
        *([0, 0, *addresses] if term is RANK else [*addresses, 0, 0, 0, 0]),
    )


def _common_arguments(term: PairTerm, panel: Panel) -> tuple[int, ...]:
    """The arguments that both operations begin with."""
    rows, cols = panel.scores.shape
    return (
        term.code,
        panel.scores.data_ptr(),
        rows,
        cols,
        panel.scores.stride(0),
        panel.params.data_ptr(),
        panel.exclude.data_ptr() if panel.exclude.shape[1] else 0,
        panel.exclude.shape[1],
        panel.first_column,
        torch.get_num_threads(),
        *_state_addresses(term, panel.row),
        *_state_addresses(term, panel.col),
    )


def _state_addresses(term: PairTerm, side: Side) -> tuple[int, int]:
    """Addresses of the running maximum and the running sum; a plain sum has no maximum."""
    if side.state is None:
        return 0, 0
    if term.state_rows == 1:
        return 0, side.state[0].data_ptr()
    return side.state[0].data_ptr(), side.state[1].data_ptr()


def _address(vector: Tensor | None) -> int:
    """The address of a dense vector, 0 for None."""
    if vector is None:
        return 0
    if not vector.is_contiguous():
        raise RuntimeError("contrastive_kernels: a vector with gaps reached the C++ pass")
    return vector.data_ptr()
