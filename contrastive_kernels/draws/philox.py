"""Random numbers that depend on nothing but (seed, row, column), so that every backend and every panel draws the same.

The generator is Philox4x32 with 10 rounds [1]_ on 32-bit words:

    key      (seed mod 2^32, seed div 2^32)              the seed's 64 bits as an unsigned number
    counter  (column div 4, row, 0, 0)
    word     the output's word number (column mod 4)

From the word, in float32, rounded to nearest at every step:

    v = min((word + 0.5) * 2^-32, 1 - 2^-24)             uniform in (0, 1); word is converted before 0.5 is added
    noise = -log(-log(1 - v))                            Gumbel(0, 1), with -log(1 - v) as -log1p(-v)

A small v is a large noise, and float32 has as many digits there as anywhere: noise reaches 22.9, and its largest values
are 2^-32 apart in probability. Words and v are the same everywhere; the two logarithms may differ in the last place.

References
----------
.. [1] J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gumbel", "philox", "uniform", "words"]


_MASK = 0xFFFFFFFF


#: Multipliers and key increments of the paper.
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57


_INCREMENTS = 0x9E3779B9, 0xBB67AE85


_ROUNDS = 10


Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Philox4x32-10: four words from a counter of four and a key of two, all int64 tensors that hold 32-bit numbers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap around, which leaves their 64 bits right
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = (p1 >> 32 & _MASK) ^ c1 ^ k0, (p0 >> 32 & _MASK) ^ c3 ^ k1
        c1, c3 = p1 & _MASK, p0 & _MASK
        k0, k1 = k0 + _INCREMENTS[0] & _MASK, k1 + _INCREMENTS[1] & _MASK
    return c0, c1, c2, c3


def words(seed: Tensor, rows: slice, columns: slice) -> Tensor:
    """The words of a block of rows and columns [R, C] int64, from a seed [1] int64."""
    first = columns.start // 4
    groups = torch.arange(first, -(-columns.stop // 4), dtype=torch.int64, device=seed.device)
    row = torch.arange(rows.start, rows.stop, dtype=torch.int64, device=seed.device)[:, None]
    zero = torch.zeros_like(seed)
    quadruples = philox((groups, row, zero, zero), (seed & _MASK, seed >> 32 & _MASK))
    shape = (rows.stop - rows.start, len(groups))
    every = torch.stack([word.expand(shape) for word in quadruples], 2).flatten(1)
    return every[:, columns.start - 4 * first : columns.stop - 4 * first]


def uniform(word: Tensor) -> Tensor:
    """v in (0, 1), float32."""
    return (word.to(torch.float32) + 0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)


def gumbel(seed: Tensor, rows: slice, columns: slice) -> Tensor:
    """The noise of a block of rows and columns [R, C], float32."""
    return uniform(words(seed, rows, columns)).neg_().log1p_().neg_().log_().neg_()
