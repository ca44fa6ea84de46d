"""What the shape of panels depends on, and what a panel takes; arithmetic on sizes, without tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["PanelBytes", "Size", "score_dtype"]


@dataclass(frozen=True)
class Size:
    """What the shape of a matrix's panels depends on, and by which route a backend computes them."""

    rows: int
    cols: int
    features: int
    dtype: torch.dtype
    device: torch.device
    symmetric: bool
    workspace_bytes: int
    #: of the GPU
    multiprocessors: int
    #: rows of both operands can be copied in pieces of 16 bytes
    pieces: bool = False
    #: panels of weights that are held at a time
    buffers: int = 1
    #: a band of rows, whose scores lie beside the panels and are replaced by the weights
    band: bool = False
    #: of a GPU that is not there (90 for 9.0); None: the device is
    capability: int | None = None


@dataclass(frozen=True)
class PanelBytes:
    """What a panel of R x C scores takes: per_score * R * C + per_row * R + per_col * C bytes."""

    per_score: float
    per_row: float
    per_col: float

    def of(self, rows: int, cols: int) -> int:
        """Bytes of one panel."""
        return -int(-(self.per_score * rows * cols + self.per_row * rows + self.per_col * cols) // 1)


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores, statistics and values for operands of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32
