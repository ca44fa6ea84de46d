"""How a panel is handed to the C++ extension: the addresses of its vectors, under the names of csrc/include/api.h."""

from __future__ import annotations

import torch
from torch import Tensor

from ..panels.panel import Panel, SearchPanel, Side
from ..panels.terms import PairTerm

try:  # torch is imported first, so that the extension shares its OpenMP runtime
    import contrastive_kernels._C  # noqa: F401  (`from contrastive_kernels import` would blame a circular import)
except ImportError as error:
    MISSING: str | None = f"the C++ extension contrastive_kernels._C is not installed ({error})"
else:
    MISSING = None

__all__ = ["DTYPES", "MISSING", "common_fields", "score_fields", "search_fields", "weight_fields"]

#: Numbers of the dtypes in csrc/include/api.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def common_fields(term: PairTerm, panel: Panel) -> dict[str, int]:
    """What every operation needs beside the scores: the parameters, what is left out, and the states."""
    excluded = panel.exclude.shape[1]
    fields = {
        "term": term.code,
        "params": panel.params.data_ptr(),
        "exclude": _address(panel.exclude) if excluded else 0,
        "exclude_count": excluded,
        "first_column": panel.first_column,
    }
    for name, side in (("row", panel.row), ("col", panel.col)):
        if side.state is not None:  # a plain sum has no maximum
            if term.state_rows == 2:
                fields[f"{name}_reference"] = _address(side.state[0])
            fields[f"{name}_sum"] = _address(side.state[-1])
    return fields


def score_fields(scores: Tensor) -> dict[str, int]:
    """The dot products [R, C], in rows without gaps."""
    rows, cols = scores.shape
    return {"scores": scores.data_ptr(), "rows": rows, "cols": cols, "stride": scores.stride(0)}


def weight_fields(panel: Panel) -> dict[str, int]:
    """What a weight panel needs beside."""
    fields = {
        "weights": panel.weights.data_ptr(),
        "weights_dtype": DTYPES[panel.weights.dtype],
        "weights_stride": panel.weights.stride(0),
    }
    if panel.dparams is not None:
        fields["dparams"] = panel.dparams.data_ptr()
    for name, side in (("row", panel.row), ("col", panel.col)):
        for vector, tensor in _vectors(side):
            fields[f"{name}_{vector}"] = _address(tensor)
    return fields


def search_fields(panel: SearchPanel) -> dict[str, int]:
    """What a search needs beside: what it leaves out, its noise, and the rows' best or bounds and counts."""
    vectors = {
        "row_ids": panel.row_ids,
        "col_ids": panel.col_ids,
        "seed": panel.seed,
        "best": panel.best,
        "best_column": panel.best_column,
        "low": panel.low,
        "high": panel.high,
        "below": panel.below,
        "above": panel.above,
    }
    addresses = {name: _address(vector) for name, vector in vectors.items() if vector is not None}
    return {"first_row": panel.first_row, **addresses}


def _vectors(side: Side) -> list[tuple[str, Tensor]]:
    """The vectors that a side has, by name."""
    both = (("normalizer", side.normalizer), ("gain", side.gain))
    return [(name, tensor) for name, tensor in both if tensor is not None]


def _address(vector: Tensor) -> int:
    """The address of a dense vector."""
    if not vector.is_contiguous():
        raise RuntimeError("contrastive_kernels: a vector with gaps reached the C++ pass")
    return vector.data_ptr()
