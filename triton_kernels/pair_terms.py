"""The pair terms: what happens to one tile of logits, in registers. They know neither pointers nor the tile's place.

Logits z are [M, N]; a side (shift, rest, gain) holds its log-normalisers as two numbers, and its gains. Statistics are
pairs (shift, sum): for rows [M] and for columns [N]. ROW and COL say which sides take part, WEIGHTS and STATISTICS what
is wanted; the rest is zero and vanishes in the compiler. A term is a file: exponential.py, sigmoid.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

__all__ = ["PairTerm", "exp"]

#: Exponents saturate below infinity: a stale normaliser times a gain of 0 must stay 0.
_LARGEST_EXPONENT = tl.constexpr(88.37)


class PairTerm(NamedTuple):
    """The members that the kernels call; each a function under triton.jit."""

    #: (z, row side, col side, ROW, COL, WEIGHTS, STATISTICS) -> (whether one shift serves all of a tile in which every
    #: pair counts, that shift)
    common_shift: Any
    #: (z, shift, row side, col side, flags) -> w, row shift, row sum, col shift, col sum: a tile that one shift serves
    common_tile: Any
    #: the same without a shift: any tile, with z = -inf where a pair does not count
    tile: Any
    #: (shift, sum, shift, sum) -> shift, sum
    merge: Any

    @property
    def cache_key(self) -> str:
        """What a compiled kernel depends on; without it Triton's disk cache outlives an edit of a member."""
        return "-".join(member.cache_key for member in self)


@triton.jit
def exp(x):
    """e^x, saturating below infinity; NaN stays NaN."""
    return tl.exp(tl.minimum(x, _LARGEST_EXPONENT, propagate_nan=tl.PropagateNan.ALL))
