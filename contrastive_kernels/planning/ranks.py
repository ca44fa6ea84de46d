"""What a loss over the ranks of a group costs each of them: what it receives and multiplies, and how long that takes.

A formula, of even shards and with all gradients wanted; the bytes are those that the collective calls receive.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..distributed.grid import grid_rows
from ..distributed.losses import GATHERED_SHARE, bytes_per_gathered_row
from ..distributed.replicated import for_few_messages

__all__ = ["RanksPlan", "plan_ranks"]

#: 16-bit Tflop/s that GPUs sustain in large products, by compute capability: 700 of an H100 (docs/performance.md has
#: 662 to 736 for an H200); the others in proportion to NVIDIA's data sheets (A100 312, H100 989, B200 2250).
SUSTAINED = {80: 220.0, 90: 700.0, 100: 1590.0}

#: Memory of these GPUs, bytes: 80 GB, 80 GB, 180 GB.
MEMORY = {80: 80 * 10**9, 90: 80 * 10**9, 100: 180 * 10**9}


@dataclass(frozen=True)
class RanksPlan:
    """A step of a loss, forward and backward, as one of `ranks` sees it.

    Parameters
    ----------
    ranks : int
        How many there are.
    strategy : {"replicated", "strips", "grid", "ring"}
        How their rows meet.
    shape : tuple of int
        Rows and columns of the grid; (ranks, 1) of a ring and of strips, (1, 1) where every rank computes the whole
        matrix.
    elements : int
        Entries of features and of their gradients that a rank receives.
    bytes : int
        Bytes of all that it receives: the same, vectors and small numbers.
    gathered_bytes : int
        What it holds at a time of other ranks' features, and of the sums of their gradients.
    flop : int
        Of its products.
    products_seconds, communication_seconds : float or None
        At the sustained rate of the GPU, and at the links' speed; None where these are not known.
    """

    ranks: int
    strategy: str
    shape: tuple[int, int]
    elements: int
    bytes: int
    gathered_bytes: int
    flop: int
    products_seconds: float | None = None
    communication_seconds: float | None = None

    def __str__(self) -> str:
        shape = f" of {self.shape[0]} x {self.shape[1]}" if self.strategy == "grid" else ""
        times = [
            f"{name} {1e3 * seconds:.3g} ms"
            for name, seconds in (("products", self.products_seconds), ("communication", self.communication_seconds))
            if seconds is not None
        ]
        return (
            f"{self.ranks} ranks, {self.strategy}{shape}: each receives {self.bytes / 1e6:.4g} MB "
            f"({self.elements:,} elements), holds {self.gathered_bytes / 1e6:.4g} MB of others' features, multiplies "
            f"{self.flop / 1e12:.4g} Tflop" + "".join(f"; {time}" for time in times)
        )


@dataclass(frozen=True)
class _Traffic:
    """What a loss sends, in numbers for each row (of x) and each column (of y), beside features and gradients."""

    #: states of rows and of columns that are merged
    row_state: int
    col_state: int
    #: normalisers and gains that gradients need
    row_side: int
    col_side: int
    #: whether weights are known before, so that columns travel once
    one_trip: bool
    #: whether y is x, whose gradient is the whole one
    mirrored: bool = False
    #: whether scores have a center
    centered: bool = True
    #: bytes and numbers that the loss is told of a row, beside features
    told_bytes: int = 0
    told: int = 0


_TRAFFIC = {
    "info_nce": _Traffic(2, 0, 3, 0, one_trip=False, told_bytes=8),
    "clip_loss": _Traffic(2, 2, 3, 3, one_trip=False),
    "nt_xent": _Traffic(2, 0, 3, 3, one_trip=False, mirrored=True, told_bytes=8),
    "sigmoid": _Traffic(1, 0, 1, 0, one_trip=True, centered=False),
    "decomposable": _Traffic(2, 0, 3, 0, one_trip=True, told_bytes=8, told=2),
}


def plan_ranks(
    loss: str,
    ranks: int,
    rows: int,
    cols: int,
    features: int,
    operand_bytes: int,
    score_bytes: int,
    *,
    strategy: str,
    memory: int,
    processes: int,
    links: float | None,
    rate: float | None,
) -> RanksPlan:
    """The plan of a global matrix of rows x cols, whose shards are even.

    Parameters
    ----------
    loss : str
        Its name.
    ranks, rows, cols, features : int
        Sizes; rows and columns are both views' for ``nt_xent``.
    operand_bytes, score_bytes : int
        Of an entry of the features, and of a score.
    strategy : {"auto", "replicated", "strips", "grid", "ring"}
        As the losses take it.
    memory : int
        Bytes that a device has, which so many `processes` share.
    links : float, optional
        GB/s that a rank receives.
    rate : float, optional
        Tflop/s of its products.
    """
    kind = _TRAFFIC[loss]
    r = grid_rows(ranks, rows, cols)
    c = ranks // r
    gathered = (rows // r + cols // c) * bytes_per_gathered_row(features, operand_bytes, score_bytes)
    if strategy == "auto":
        otherwise = "grid" if gathered * processes <= memory // GATHERED_SHARE else "ring"
        strategy = for_few_messages(ranks, rows, cols, features) or otherwise
    n, m = rows // ranks, cols // ranks
    trips = 1 if kind.one_trip else 2
    per_row = bytes_per_gathered_row(features, operand_bytes, score_bytes)
    # the statistics' product, the weights' one, and those of the gradients; strips have the first ones twice
    products = (1 if kind.one_trip else 2) + (1 if kind.mirrored else 2)
    # the value (8) and the center (16) of every other rank
    shape, share, small = (ranks, 1), ranks, 8 + (16 if kind.centered else 0)
    if strategy in ("replicated", "strips"):
        small, sums = 0, 0
        inputs = (ranks - 1) * features * (n + (0 if kind.mirrored else m))
        line = inputs // (ranks - 1 or 1) * operand_bytes + n * (kind.told_bytes + kind.told * score_bytes)
        vectors = (ranks - 1) * (-(-line // 8) * 8) - inputs * operand_bytes
        held = (ranks - 1) * (n + m) * per_row
        if strategy == "replicated":
            shape, share = (1, 1), 1
        else:
            states = n * kind.row_state + m * kind.col_state
            vectors += (ranks - 1) * (-(-states * score_bytes // 8) * 8)
            held = (ranks - 1) * (n + m) * features * operand_bytes
            products = (1 if kind.one_trip else 2) * (1 if kind.mirrored else 2) + (1 if kind.mirrored else 2)
    elif strategy == "grid":
        shape, others_rows, others_cols = (r, c), (c - 1) * n, (r - 1) * m
        inputs = features * (others_rows + others_cols)
        sums = features * (others_rows + (0 if kind.mirrored else others_cols))
        vectors = others_rows * (kind.row_state + kind.row_side) + others_cols * (kind.col_state + kind.col_side)
        vectors *= score_bytes
        held = gathered - (n + m) * per_row
    else:
        inputs = trips * (ranks - 1) * m * features
        sums = 0 if kind.mirrored else ranks * m * features
        vectors = (ranks * m * kind.col_state + (ranks - 1) * m * kind.col_side) * score_bytes
        held = m * features * (2 * operand_bytes + (0 if kind.mirrored else 2 * score_bytes))
    # sizes (64) and what comes from upstream (8)
    received = inputs * operand_bytes + sums * score_bytes + vectors + (ranks - 1) * (64 + 8 + small)
    flop = 2 * (rows * cols // share) * features * products
    return RanksPlan(
        ranks, strategy, shape, inputs + sums, received, held, flop,
        None if rate is None else flop / (rate * 1e12),
        None if links is None else received / (links * 1e9),
    )  # fmt: skip
