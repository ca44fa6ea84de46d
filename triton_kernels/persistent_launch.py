"""From tensors to launches of the persistent kernel; see persistent.py."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .configs import PersistentTile
from .persistent import LINE, persistent_kernel, refer_kernel
from .start import INTERPRETED, Arguments, start

__all__ = ["REFERRED_ROWS", "REFERRED_SAMPLE", "copies_by_tma", "multiprocessors", "start_tiles"]

#: Rows of a program of refer_kernel, and normalisers that it takes the mean of.
REFERRED_ROWS, REFERRED_SAMPLE = 1024, 1024


def copies_by_tma(*operands: Tensor) -> bool:
    """Whether the TMA unit can copy blocks of these matrices, whose rows follow each other at multiples of 16 bytes."""
    return all(
        t.stride(1) == 1
        and t.stride(0) >= t.shape[1]  # a matrix of one row may be a part of an expanded one
        and t.stride(0) * t.element_size() % 16 == 0
        and t.data_ptr() % 16 == 0
        for t in operands
    )


@cache
def multiprocessors(device: torch.device) -> int:
    """Those of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def start_tiles(
    tile: PersistentTile,
    x: Tensor,
    y: Tensor,
    weights: Tensor | None,
    referred: Tensor,
    score_arguments: tuple[Any, ...],
    constants: dict[str, Any],
) -> None:
    """What score_kernel would do with these arguments and constants.

    referred: float32 for the line and the gains of rows and columns.
    """
    params, *pairs, row_normalizer, row_gain, col_normalizer, col_gain = score_arguments[:-7]
    factor, *partials = score_arguments[-7:]
    (n, d), m = x.shape, y.shape[0]
    term, has_row, has_col = constants["TERM"], constants["ROW"], constants["COL"]
    line = row_referred = col_referred = None
    weighs = weights is not None and factor is not None  # else exponentials are kept, or nothing
    if weighs:
        line, row_referred, col_referred = referred.split_with_sizes((LINE, -(-n // 4) * 4, -(-m // 4) * 4))
        start(
            refer_kernel, has_row * -(-n // REFERRED_ROWS) + has_col * -(-m // REFERRED_ROWS),
            Arguments(
                params, factor, row_normalizer, row_gain, col_normalizer, col_gain, line, row_referred, col_referred,
                n, m, *(0 if v is None else v.stride(0) for v in (row_normalizer, col_normalizer)),
            ),
            {
                "TERM": term, "ROW": has_row, "COL": has_col, "BLOCK": REFERRED_ROWS, "SAMPLE": REFERRED_SAMPLE,
                "num_warps": 4,
            },
        )  # fmt: skip
    blocks = -(-n // tile.block_m) * -(-m // tile.block_n)
    programs = 2 if INTERPRETED else tile.programs * multiprocessors(x.device)
    start(
        persistent_kernel, min(blocks, programs),
        Arguments(
            _blocks_of(x, tile.block_m, tile.block_k), _blocks_of(y, tile.block_n, tile.block_k),
            None if weights is None else _blocks_of(weights, tile.block_m, tile.part.block_n),
            params, *pairs, line,
            row_referred if has_row else None, col_referred if has_col else None, factor, *partials, n, m, d,
        ),
        {
            "TERM": term, "ROW": has_row, "COL": has_col, "COLUMNS": constants["COLUMNS"],
            "EQUAL_IDS": constants["EQUAL_IDS"],
            "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP": tile.group,
            "PARTS": tile.parts, "UPCAST": constants["UPCAST"],
            "num_warps": tile.num_warps, "num_stages": tile.num_stages,
        },
    )  # fmt: skip


def _blocks_of(matrix: Tensor, rows: int, cols: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], [rows, cols])
