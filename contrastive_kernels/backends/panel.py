"""One panel, a block of the score matrix: what the driver hands to a backend's two operations."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Panel", "Side", "present", "score_product"]


@dataclass(slots=True)
class Side:
    """The vectors that go with a panel's rows (or columns); None where this side takes no part."""

    #: [state_rows, n] running state, updated in place
    state: Tensor | None = None
    #: [n] a_i (rows) or b_j (columns)
    normalizer: Tensor | None = None
    #: [n] r_i (rows) or c_j (columns)
    gain: Tensor | None = None


@dataclass(slots=True)
class Panel:
    """A block of R rows and C columns of the score matrix."""

    #: [R, D], [C, D] blocks of the operands, in the dtype of the scores
    x: Tensor
    y: Tensor
    #: [R, C] workspace for the dot products, in float32 or float64
    scores: Tensor
    #: [R, C] where a weight panel leaves scale * dL/dz; it may be `scores` itself
    weights: Tensor
    #: [2] scale and bias, on the device
    params: Tensor
    #: [R, K] columns of the whole matrix that the stream leaves out
    exclude: Tensor
    #: this panel's first column in the whole matrix
    first_column: int
    #: the scores were kept from an earlier pass
    scores_ready: bool = False
    #: the operands hold bfloat16 values
    bfloat16_values: bool = False
    row: Side = field(default_factory=Side)
    col: Side = field(default_factory=Side)
    #: [2] += sum of w * score, sum of w (float64)
    dparams: Tensor | None = None


def present(vector: Tensor | None) -> Tensor:
    """A side's vector without which the pair term has no weights."""
    if vector is None:
        raise RuntimeError("contrastive_kernels: a panel came without a vector that its pair term needs")
    return vector


def _amx() -> bool:
    """Whether this CPU multiplies bfloat16 on AMX units."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is not None and bool(supported())


_HAS_AMX = _amx()


def score_product(panel: Panel) -> None:
    """scores = x yT in full precision [R, C].

    float32 copies of bfloat16 values are multiplied on the AMX units, where products of bfloat16 values are exact. The
    switch is process-wide, so it is set for this one product alone.
    """
    if panel.scores_ready:
        return
    if not (panel.bfloat16_values and _HAS_AMX and panel.scores.device.type == "cpu"):
        torch.mm(panel.x, panel.y.T, out=panel.scores)
        return
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        torch.mm(panel.x, panel.y.T, out=panel.scores)
    finally:
        setting.fp32_precision = before
