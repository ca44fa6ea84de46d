"""NVIDIA GPUs, in CUDA: torch's matrix product (cuBLAS) for the tile, then one pass over it."""

from __future__ import annotations

import functools
import re

import torch
from torch import Tensor

from ..specs import PairTerm
from .native import MISSING, common_fields, weight_fields
from .panel import Panel, score_product

if MISSING is None:
    from contrastive_kernels import _C

__all__ = ["build", "reduce_panel", "weight_panel", "why_not"]


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why this backend cannot serve, or None."""
    if MISSING is not None:
        return MISSING
    if _C.cuda_version() == 0:
        return "the extension was built without CUDA (CK_CUDA=1 installs it with CUDA, where there is nvcc)"
    if device.type != "cuda":
        return f"it serves tensors on CUDA devices, not on {device.type}"
    if torch.version.hip is not None:
        return "this torch is built for ROCm"
    if dtype == torch.float64:
        return "its scores are float32; float64 is the torch backend's"
    reason = _device_reason(torch.cuda.current_device() if device.index is None else device.index)
    return f"it is built for {build()}: {reason}" if reason else None


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


def reduce_panel(term: PairTerm, panel: Panel) -> None:
    """Folds the panel into row.state and col.state."""
    score_product(panel)
    scratch = _scratch(panel)
    _C.cuda_reduce_panel(**common_fields(term, panel), **_launch_fields(scratch))


def weight_panel(term: PairTerm, panel: Panel) -> None:
    """Leaves scale * dL/dz in panel.weights and its partial sums in panel.dparams; folds into the states there are."""
    score_product(panel)
    scratch = _scratch(panel)
    _C.cuda_weight_panel(**common_fields(term, panel), **weight_fields(panel), **_launch_fields(scratch))


def _scratch(panel: Panel) -> Tensor:
    """Memory for the blocks' partial results. torch's allocator hands it on in the order of the stream."""
    rows, cols = panel.scores.shape
    return torch.empty(_C.cuda_scratch_bytes(rows, cols), dtype=torch.uint8, device=panel.scores.device)


def _launch_fields(scratch: Tensor) -> dict[str, int]:
    """Where to run, and the scratch."""
    fields = {"scratch": scratch.data_ptr(), "scratch_bytes": len(scratch)}
    if scratch.is_cuda:
        stream = torch.cuda.current_stream(scratch.device)
        fields |= {"device": scratch.get_device(), "stream": stream.cuda_stream}
    return fields
