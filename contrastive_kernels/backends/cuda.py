"""NVIDIA GPUs, in CUDA.

16-bit operands are multiplied on the tensor cores, with the pass over the tile in the product's epilogue. Others
(float32; widths that are no multiple of 8; GPUs older than Ampere) take the portable route: torch's matrix product
(cuBLAS) for the tile, then one pass over it.
"""

from __future__ import annotations

import functools
import re

import torch
from torch import Tensor

from ..panels.panel import Panel, Route, in_pieces
from ..panels.size import Size
from ..panels.terms import PairTerm
from .base import Backend
from .native import DTYPES, MISSING, common_fields, score_fields, weight_fields

if MISSING is None:
    from contrastive_kernels import _C

__all__ = ["PORTABLE", "TENSOR_CORES", "CudaBackend", "build"]

#: Bytes of the blocks' partial results: a maximum and a sum per row and column of a tile of 128 x 128, and two doubles;
#: those of the last, ragged tiles are counted by row and column.
_PARTIALS_PER_SCORE, _PARTIALS_PER_ROW = 16 / 128 + 16 / 128**2, 16.0

#: The kernel of a tile and the one that merges; on the portable route after cuBLAS's (without the casts of 16-bit
#: operands that it takes before torch 2.8).
TENSOR_CORES = Route("tensor cores", (2, 2), _PARTIALS_PER_SCORE, _PARTIALS_PER_ROW)
PORTABLE = Route("cuBLAS + one pass", (3, 3), 4 + _PARTIALS_PER_SCORE, _PARTIALS_PER_ROW, scores_in_scratch=True)

_SIXTEEN_BITS = (torch.bfloat16, torch.float16)


class CudaBackend(Backend):
    """Serves CUDA tensors of 16 and 32 bits."""

    name = "cuda"
    score_tile = False
    native_operands = True
    wants_scratch = True

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if (reason := _missing()) is not None:
            return reason
        if device.type != "cuda":
            return f"it serves tensors on CUDA devices, not on {device.type}"
        if torch.version.hip is not None:
            return "this torch is built for ROCm"
        if not torch.cuda.is_available():
            return "this torch sees no NVIDIA GPU"
        index = _index(device)
        major, minor = torch.cuda.get_device_capability(index)
        reason = _dtype_reason(10 * major + minor, dtype)
        if reason is None and _device_reason(index):
            return f"it is built for {build()}: {_device_reason(index)}"
        return reason

    def why_not_capability(self, capability: int, dtype: torch.dtype) -> str | None:
        reason = _missing() or _dtype_reason(capability, dtype)
        if reason is not None:
            return reason
        if _built_for(capability):
            return None
        return f"it is built for {build()}, and this GPU has compute capability {capability / 10:.1f}"

    def route(self, size: Size) -> Route:
        """The tensor cores for 16-bit operands that can be copied in pieces of 16 bytes, where there is the kernel."""
        if size.dtype not in _SIXTEEN_BITS or not size.pieces:
            return PORTABLE
        if size.capability is None:
            there = _has_tensor_cores(_index(size.device))
        else:
            there = max(_built_for(size.capability), default=0) >= 80
        return TENSOR_CORES if there else PORTABLE

    def weights_dtype(self, device: torch.device, dtype: torch.dtype) -> torch.dtype:
        """Weights are multiplied with the operands, in their dtype."""
        return dtype

    def launches(self, size: Size, rows: int, cols: int) -> tuple[int, int] | None:
        """The weights of a band have no product of their own; a guide's scores have one."""
        first, second = (3, 2) if size.band else self.route(size).launches or (0, 0)
        return first + (size.guide > 0), second + (size.guide > 0)

    def keeps(self, dtype: torch.dtype, features: int) -> bool:
        """The scores, of operands that never go to the tensor cores' kernel; float16 weights want one factor."""
        return dtype == torch.float32 or (dtype == torch.bfloat16 and features % 8 > 0)

    def scratch(self, rows: int, cols: int, size: Size) -> int:
        """float32 that a panel wants: partial results and, on the portable route, the scores."""
        return _partial_floats(rows, cols) + (rows * cols if self.route(size).scores_in_scratch else 0)

    def reduce_panel(self, term: PairTerm, panel: Panel) -> None:
        memory = _memory(panel)
        _C.cuda_reduce_panel(**_fields(term, panel, memory))

    def weight_panel(self, term: PairTerm, panel: Panel) -> None:
        memory = _memory(panel)
        factor = {} if panel.factor is None else {"factor": panel.factor.data_ptr()}
        _C.cuda_weight_panel(**_fields(term, panel, memory, panel.keeps), **weight_fields(panel), **factor)


def _built_for(capability: int) -> list[int]:
    """The architectures of the build whose code a GPU of this compute capability runs."""
    found = []
    for arch in _C.cuda_architectures().split("_"):
        number = int(re.sub(r"\D", "", arch))
        same_generation = number // 10 == capability // 10
        if number <= capability and (same_generation or arch.endswith("PTX")):
            found.append(number)
    return found


def _index(device: torch.device) -> int:
    """A GPU's number, by default the current one's; 0 for what the kernels' emulator takes for one."""
    if device.type != "cuda":
        return 0
    return torch.cuda.current_device() if device.index is None else device.index


def _missing() -> str | None:
    """Why there are no kernels to run anywhere."""
    if MISSING is not None:
        return MISSING
    if _C.cuda_version() == 0:
        return "the extension was built without CUDA (CK_CUDA=1 installs it with CUDA, where there is nvcc)"
    return None


def _dtype_reason(capability: int, dtype: torch.dtype) -> str | None:
    """Why a dtype is not served on a GPU."""
    if dtype == torch.float64:
        return "its scores are float32; float64 is the torch backend's"
    if dtype == torch.bfloat16 and capability < 80:
        return "bfloat16 needs compute capability 8.0"
    return None


def build() -> str | None:
    """What the extension was built with and for, as in "CUDA 13.0, sm_80, sm_90, PTX 90"; None: without CUDA."""
    if MISSING is not None or _C.cuda_version() == 0:
        return None
    version, archs = _C.cuda_version(), _C.cuda_architectures().split("_")
    names = [re.sub(r"(.*)PTX", r"PTX \1", arch) if arch.endswith("PTX") else f"sm_{arch}" for arch in archs]
    return ", ".join([f"CUDA {version // 1000}.{version % 1000 // 10}", *names])


@functools.cache
def _device_reason(index: int) -> str:
    """The CUDA runtime's reason why the kernels do not run on a device; empty: they do."""
    return _C.cuda_why_not(index)


@functools.cache
def _has_tensor_cores(index: int) -> bool:
    """Whether the kernel that multiplies is there for a device."""
    return _C.cuda_has_tensor_cores(index)


def _partial_floats(rows: int, cols: int) -> int:
    """float32 of the blocks' partial results, a multiple of 16 bytes."""
    return -(-_C.cuda_scratch_bytes(rows, cols) // 16) * 4


def _suits_tensor_cores(operand: Tensor) -> bool:
    """Whether rows of 16-bit elements can be copied in pieces of 16 bytes, and there is the kernel that does it."""
    suits = operand.dtype in _SIXTEEN_BITS and in_pieces(operand)
    return suits and _has_tensor_cores(max(operand.get_device(), 0))


def _memory(panel: Panel) -> Tensor:
    """The panel's scratch; memory of its own where that is too small, which torch hands on in the stream's order."""
    rows, cols = _shape(panel)
    needed = _partial_floats(rows, cols) + (0 if panel.scores_ready or _on_tensor_cores(panel) else rows * cols)
    if panel.scratch is not None and len(panel.scratch) >= needed:
        return panel.scratch
    return torch.empty(needed, dtype=torch.float32, device=panel.params.device)


def _shape(panel: Panel) -> tuple[int, int]:
    """Rows and columns [R, C]."""
    x, y = (panel.scores, panel.scores.T) if panel.scores_ready else (panel.x, panel.y)
    return len(x), len(y)


def _on_tensor_cores(panel: Panel) -> bool:
    """Whether the kernel that multiplies serves."""
    return not panel.scores_ready and _suits_tensor_cores(panel.x) and _suits_tensor_cores(panel.y)


def _fields(term: PairTerm, panel: Panel, memory: Tensor, made: bool = False) -> dict[str, int]:
    """What both operations are told: the scores or what makes them, where to run, the scratch.

    made: the other operation has left the scores in the scratch.
    """
    rows, cols = _shape(panel)
    _make_guide(panel)
    partial = _partial_floats(rows, cols)
    fields = {"scratch": memory.data_ptr(), "scratch_bytes": 4 * partial}
    if _on_tensor_cores(panel):
        fields |= _operand_fields(panel)
    elif panel.scores_ready:
        fields |= score_fields(panel.scores)
    else:
        scores = memory[partial : partial + rows * cols].view(rows, cols)
        fields |= score_fields(scores if made else _product(panel.x, panel.y, scores))
    if memory.is_cuda:
        stream = torch.cuda.current_stream(memory.device)
        fields |= {"device": memory.get_device(), "stream": stream.cuda_stream}
    return common_fields(term, panel) | fields


def _operand_fields(panel: Panel) -> dict[str, int]:
    """x [R, D] and y [C, D], in 16 bits."""
    x, y = panel.x, panel.y
    return {
        "rows": len(x),
        "cols": len(y),
        "depth": x.shape[1],
        "operands": DTYPES[x.dtype],
        "x": x.data_ptr(),
        "x_stride": x.stride(0),
        "y": y.data_ptr(),
        "y_stride": y.stride(0),
    }


def _make_guide(panel: Panel) -> None:
    """A guide's scores, by the vendor's product; if there is one, and they are not there."""
    of_rows, of_cols = panel.pairs.row_guide, panel.pairs.col_guide
    if panel.guide is not None and of_rows is not None and of_cols is not None and not panel.scores_ready:
        _product(of_rows, of_cols, panel.guide)


def _product(x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """x yT in float32 [R, C], unrounded where the operands have 16 bits."""
    if x.dtype == torch.float32:
        return torch.mm(x, y.T, out=out)
    if x.is_cuda and hasattr(torch.ops.aten.mm, "dtype_out"):  # torch 2.8
        return torch.mm(x, y.T, out_dtype=torch.float32, out=out)
    return torch.mm(x.float(), y.T.float(), out=out)
