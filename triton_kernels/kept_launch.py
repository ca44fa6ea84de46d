"""From tensors to the launch of the kernel that weighs kept exponentials; see kept.py."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .configs import Tile
from .kept import weigh_kept_kernel
from .start import Arguments, start

__all__ = ["weigh_kept_tiles"]


def weigh_kept_tiles(
    term: Any, tile: Tile, params: Tensor, row: Any, col: Any, weights: Tensor, factor: Tensor | None, partials: Any
) -> None:
    """Starts it for all tiles of a panel.

    partials: of rows, of columns; moments of rows, of columns; partials of params or None; which tiles are unusual.
    """
    n, m = weights.shape
    has_col = col.gain is not None
    row_partials, col_partials, row_moments, col_moments, params_partials, unusual = partials
    start(
        weigh_kept_kernel, -(-n // tile.block_m) * -(-m // tile.block_n),
        Arguments(
            params, row.normalizer, row.gain, col.normalizer, col.gain, weights, factor,
            row_partials, col_partials if has_col else None, row_moments, col_moments if has_col else None,
            params_partials, unusual, n, m, weights.stride(0),
            *(0 if v.normalizer is None else v.normalizer.stride(0) for v in (row, col)),
        ),
        {
            "TERM": term, "COL": has_col, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
            "num_warps": tile.num_warps, "num_stages": 1,
        },
    )  # fmt: skip
