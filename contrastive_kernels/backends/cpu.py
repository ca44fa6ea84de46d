"""The CPU: torch's matrix product for the tile, then one pass of C++ over it while it lies in cache."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..panels.pairs import EVERY_PAIR
from ..panels.panel import Panel, Route, SearchPanel, Side
from ..panels.size import Size, number
from ..panels.terms import EXPONENTIAL, SEARCHES, SIGMOID, PairTerm
from .base import Backend, Entries, WholeMatrix
from .native import DTYPES, MISSING, common_fields, pair_fields, score_fields, search_fields, weight_fields
from .products import default_weights_dtype, on_amx_units, score_product

if MISSING is None:
    from contrastive_kernels import _C

__all__ = ["CpuBackend", "instruction_set"]

_NO_ENTRIES = (None, None, 0, False)


class CpuBackend(Backend):
    """Serves float32 scores in the machine's memory."""

    name = "cpu"
    terms = (EXPONENTIAL, SIGMOID, *SEARCHES)
    whole_matrix = True
    scales_by_row = True

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if MISSING is not None:
            return MISSING
        if device.type != "cpu":
            return f"it serves tensors on the CPU, not on {device.type}"
        if dtype == torch.float64:
            return "its scores are float32; float64 is the torch backend's"
        return None

    def weights_dtype(self, device: torch.device, dtype: torch.dtype) -> torch.dtype:
        return default_weights_dtype(device, dtype)

    def multiplies(self, dtype: torch.dtype) -> bool:
        return dtype == torch.bfloat16 and _multiplies_bfloat16()

    def multiply(self, x: Tensor, y: Tensor, out: Tensor, add: bool = False, entries: Entries | None = None) -> None:
        _multiply(x, y, out, add, entries)

    def route(self, size: Size) -> Route:
        own = self.multiplies(size.dtype)
        return _route("a matrix product in bfloat16" if own else "torch's matrix product", instruction_set())

    def reduce_panel(self, term: PairTerm, panel: Panel) -> None:
        _C.reduce_panel(**_fields(term, panel))

    def weight_panel(self, term: PairTerm, panel: Panel) -> None:
        factor = {} if panel.factor is None else {"factor": panel.factor.data_ptr()}
        _C.weight_panel(**_fields(term, panel), **weight_fields(panel), **factor)

    def search_panel(self, term: PairTerm, panel: SearchPanel) -> None:
        _C.search_panel(**_fields(term, panel), **search_fields(panel))

    def softmax_matrix(
        self,
        scores: Tensor,
        problem: WholeMatrix,
        gain: Tensor | None,
        share: float,
        both: bool,
        include: bool,
        unscaled: bool = False,
        lift: tuple[Tensor, Tensor] | None = None,
        guide: Tensor | None = None,
        positive_weights: Tensor | None = None,
    ) -> tuple[Tensor, float, float]:
        value, dscale, dbias = _C.softmax_matrix(
            *_matrix_fields(scores, problem, positive_weights, guide), _address(gain), share, both,
            problem.symmetric, include, unscaled, *((0, 0) if lift is None else map(_address, lift)),
            torch.get_num_threads(),
        )  # fmt: skip
        return number(scores, value), dscale, dbias

    def label_matrix(
        self, scores: Tensor, problem: WholeMatrix, gain: Tensor, share: Tensor, positive_weights: Tensor | None = None
    ) -> tuple[Tensor, float, float]:
        value, dscale, dbias = _C.label_matrix(
            *_matrix_fields(scores, problem, positive_weights), _address(gain), _address(share), problem.symmetric,
            torch.get_num_threads(),
        )  # fmt: skip
        return number(scores, value), dscale, dbias

    def sigmoid_matrix(
        self,
        scores: Tensor,
        problem: WholeMatrix,
        gain: Tensor | None,
        share: float,
        positive_weights: Tensor | None = None,
    ) -> tuple[Tensor, float, float]:
        value, dscale, dbias = _C.weighted_matrix(
            SIGMOID.code, *_matrix_fields(scores, problem, positive_weights), 0, _address(gain), 0, 0, share, False,
            0, 0, 0, torch.get_num_threads(),
        )  # fmt: skip
        return number(scores, value), dscale, dbias

    def weighted_matrix(
        self,
        scores: Tensor,
        problem: WholeMatrix,
        row: Side,
        col: Side,
        share: float,
        relative: bool,
        positive_weights: Tensor | None = None,
    ) -> tuple[Tensor, float, float, list[Tensor], Tensor]:
        sides = [row] if col.normalizer is None else [row, col]
        found = [scores.new_empty(2, n) for n, _ in zip(scores.shape, sides)]
        dots = scores.new_empty(len(scores))
        value, dscale, dbias = _C.weighted_matrix(
            EXPONENTIAL.code, *_matrix_fields(scores, problem, positive_weights), _address(row.normalizer),
            _address(row.gain), _address(col.normalizer), _address(col.gain), share, relative, found[0].data_ptr(),
            found[1].data_ptr() if len(found) == 2 else 0, dots.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return number(scores, value), dscale, dbias, found, dots


def _matrix_fields(
    scores: Tensor, problem: WholeMatrix, positive_weights: Tensor | None, guide: Tensor | None = None
) -> Any:
    """A whole matrix, whose weights take the place of the scores, and what is left out of it; a guide's scores."""
    rows, cols = scores.shape
    address, index, scale, bias = scores.data_ptr(), problem.index, problem.scale, problem.bias
    return (
        address, address, _address(positive_weights), rows, cols,
        None if problem.pairs is EVERY_PAIR else pair_fields(problem.pairs, guide), 0 if problem.symmetric else None,
        _address(index), problem.offset, scale.item() if isinstance(scale, Tensor) else scale,
        bias.item() if isinstance(bias, Tensor) else bias,
    )  # fmt: skip


def _address(tensor: Tensor | None) -> int:
    """The address of a dense tensor; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def _multiplies_bfloat16() -> bool:
    """Whether the extension multiplies bfloat16 here. AMX units, which torch knows, do that faster."""
    return MISSING is None and not on_amx_units() and _C.multiplies_bfloat16()


def instruction_set() -> str | None:
    """The instruction set that the C++ pass runs with, or None without the extension."""
    return None if MISSING is not None else _C.instruction_set()


@functools.cache
def _route(product: str, isa: str | None) -> Route:
    return Route(f"{product} + one pass in {isa}")


def _strides(operand: Tensor) -> list[int]:
    """Of its lines and depths; 1 of what there is but one."""
    return [1 if size == 1 else stride for size, stride in zip(operand.shape, operand.stride())]


def _multiply(x: Tensor, y: Tensor, out: Tensor, add: bool = False, entries: Entries | None = None) -> None:
    (rows, depth), cols = x.shape, y.shape[1]
    if entries is not None and y.stride(1) != 1:
        y = y.contiguous()
    x, y = (v if 1 in _strides(v) else v.contiguous() for v in (x, y.T))
    values, places, entry_offset, turned = _NO_ENTRIES if entries is None else entries
    _C.multiply_bfloat16(
        x.data_ptr(), DTYPES[x.dtype], *_strides(x), y.data_ptr(), DTYPES[y.dtype], *_strides(y),
        out.data_ptr(), DTYPES[out.dtype], rows, cols, depth, out.stride(0), add,
        _address(values), _address(places), entry_offset, turned, torch.get_num_threads(),
    )  # fmt: skip


def _fields(term: PairTerm, panel: Panel) -> dict[str, int]:
    """Makes the scores; what every operation is told."""
    score_product(panel, _multiply if _multiplies_bfloat16() else None)
    return common_fields(term, panel) | score_fields(panel.scores) | {"threads": torch.get_num_threads()}
