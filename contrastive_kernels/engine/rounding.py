"""By how much a score may differ from another product's of the same features."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["lengths", "score_rounding"]

#: Two scores are equal if they differ by less than so many roundings of a sum of D products, each taken as eps sqrt(D).
_ROUNDINGS = 4


#: Rows whose norms are taken at a time.
_ROWS = 4096


def lengths(v: Tensor) -> Tensor:
    """Euclidean norms of the rows [n] in float32, a block of rows at a time: no copy of a 16-bit corpus."""
    return torch.cat([block.to(torch.float32).norm(dim=1) for block in v.split(_ROWS)])


def score_rounding(x: Tensor, dtype: torch.dtype) -> float:
    """What a score of unit vectors in `dtype` may be off by, of features like x [N, D]."""
    return _ROUNDINGS * torch.finfo(dtype).eps * math.sqrt(x.shape[1]) + _operand_rounding(x, dtype)


def _operand_rounding(x: Tensor, dtype: torch.dtype) -> float:
    """By how much a product of unit vectors is off because torch may round float32 operands to TF32 or bfloat16."""
    if dtype == torch.float64 or x.dtype != torch.float32:  # 16-bit operands have no more digits than those
        return 0.0
    owner: Any = torch.backends.cuda if x.device.type == "cuda" else torch.backends.mkldnn
    matmul = getattr(owner, "matmul", None)
    precision = getattr(matmul, "fp32_precision", None)
    if precision is None and getattr(matmul, "allow_tf32", False):  # before torch 2.9
        precision = "tf32"
    return {"tf32": 2.0**-10, "bf16": 2.0**-7}.get(str(precision), 0.0)
