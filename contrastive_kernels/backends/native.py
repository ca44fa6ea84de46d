"""How a panel is handed to the C++ extension: addresses, under the names of csrc/include/members.h."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from ..panels.pairs import Pairs
from ..panels.panel import Panel, SearchPanel
from ..panels.terms import PairTerm
from .sources import complaint_about

try:  # torch is imported first, so that the extension shares its OpenMP runtime
    import contrastive_kernels._C as extension  # (`from contrastive_kernels import` would blame a circular import)
except ImportError as error:
    MISSING: str | None = f"the C++ extension contrastive_kernels._C is not installed ({error})"
else:
    MISSING = None

__all__ = [
    "DTYPES",
    "MISSING",
    "common_fields",
    "pair_fields",
    "require_fresh",
    "score_fields",
    "search_fields",
    "weight_fields",
]

#: Numbers of the dtypes in csrc/include/api.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

#: (A guide's features are multiplied before.)
_PAIRS = tuple(name for name in Pairs._fields if name not in ("row_guide", "col_guide"))
_SEARCH = tuple(field.name for field in fields(SearchPanel) if field.name not in {f.name for f in fields(Panel)})


def require_fresh(version: str) -> None:
    """ImportError if the compiled extension is not that of the package of this version, or of this checkout."""
    complaint = None if MISSING is not None else complaint_about(extension, version, Path(__file__).parents[2])
    if complaint is not None:
        raise ImportError(complaint)


def common_fields(term: PairTerm, panel: Panel) -> dict[str, int]:
    """What every operation needs beside the scores: the parameters, which pairs count, and the states."""
    values = {"term": term.code, "params": panel.params.data_ptr(), **pair_fields(panel.pairs, panel.guide)}
    for name, side in (("row", panel.row), ("col", panel.col)):
        if side.state is not None:  # a plain sum has no shift
            if term.state_rows == 2:
                values[f"{name}_shift"] = _address(side.state[0])
            values[f"{name}_sum"] = _address(side.state[-1])
    return values


def pair_fields(pairs: Pairs, guide: Tensor | None = None) -> dict[str, int]:
    """What is said of pairs; guide: its scores [R, C], in rows without gaps."""
    fields = _members(pairs, _PAIRS)
    if guide is not None:
        fields |= {"guide": guide.data_ptr(), "guide_stride": guide.stride(0)}
    return fields


def score_fields(scores: Tensor) -> dict[str, int]:
    """The dot products [R, C], in rows without gaps."""
    rows, cols = scores.shape
    return {"scores": scores.data_ptr(), "rows": rows, "cols": cols, "stride": scores.stride(0)}


def weight_fields(panel: Panel) -> dict[str, int]:
    """What a weight panel needs beside."""
    values = {
        "weights": panel.weights.data_ptr(),
        "weights_dtype": DTYPES[panel.weights.dtype],
        "weights_stride": panel.weights.stride(0),
    }
    if panel.dparams is not None:
        values["dparams"] = panel.dparams.data_ptr()
    for name, side in (("row", panel.row), ("col", panel.col)):
        if side.normalizer is not None:
            values[f"{name}_normalizer_shift"] = _address(side.normalizer[0])
            values[f"{name}_normalizer_rest"] = _address(side.normalizer[1])
        if side.gain is not None:
            values[f"{name}_gain"] = _address(side.gain)
        if side.target is not None:
            values[f"{name}_target"] = _address(side.target[0])
            values[f"{name}_target_alike"] = _address(side.target[1])
        if side.dscale is not None:
            values[f"{name}_dscale"] = _address(side.dscale)
    return values


def search_fields(panel: SearchPanel) -> dict[str, int]:
    """What a search needs beside: its noise, and the rows' best or bounds and counts."""
    return _members(panel, _SEARCH)


def _members(owner: Pairs | SearchPanel, names: tuple[str, ...]) -> dict[str, int]:
    """The members of these names that are not None: numbers, and addresses of tensors; of a matrix also its width."""
    values = {}
    for name in names:
        value = getattr(owner, name)
        if isinstance(value, Tensor):
            values[name] = _address(value)
            if value.dim() == 2:
                values[f"{name}_count"] = value.shape[1]
        elif value is not None:
            values[name] = value
    return values


def _address(vector: Tensor) -> int:
    """The address of a dense vector."""
    if not vector.is_contiguous():
        raise RuntimeError("contrastive_kernels: a vector with gaps reached the C++ pass")
    return vector.data_ptr()
