"""The pair terms: what happens to one tile of scores, in registers. They know neither pointers nor the tile's place.

A side (shift, rest, gain) holds its log-normalisers as two numbers, and its gains. Statistics are pairs (shift, sum):
for rows [M] and for columns [N]. ROW and COL say which sides take part, WEIGHTS and STATISTICS what is wanted; the rest
is zero and vanishes in the compiler. A term is a file: exponential.py, sigmoid.py.

Nearly all tiles are usual: a few instructions a score do for them. What those cannot do they notice, and leave to
`tile`, which always can, in a kernel of its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

__all__ = ["INTERPRETED", "LOG2_E", "NEVER", "PairTerm", "exp", "exp2", "multiply_add", "reciprocal"]

LOG2_E = tl.constexpr(1.4426950408889634)
#: A score that does not count, far below all others.
NEVER = tl.constexpr(-1e30)
#: Exponents saturate below infinity: a stale normaliser times a gain of 0 must stay 0.
_LARGEST_EXPONENT = tl.constexpr(88.37)


class PairTerm(NamedTuple):
    """The members that the kernels call; each a function under triton.jit."""

    #: (row side, col side, scale, bias, factor, ROW, COL) -> whether a tile with weights is usual, and what
    #: `usual` needs of it, before there are scores: (line, row gain * factor, col gain * factor)
    refer: Any
    #: (scale, bias, shift) -> the line (slope, offset, unit) of exponentials taken against a shift
    line: Any
    #: (a side's vectors, shift) -> its gains referred to the shift, infinite where they cannot be
    refer_gain: Any
    #: (scores, pairs, what is loaded of the columns, ids, limits, referred, scale, bias, flags) -> w * factor, row
    #: shift, row sum, col shift, col sum, which are right if they are fair
    usual: Any
    #: (z as rows have it, as columns do, row side, col side, flags) -> w, row shift, row sum, col shift, col sum: any
    #: tile, with z = -inf where a pair does not count
    tile: Any
    #: (a tile's z, or its w; z; what is loaded of the columns, pairs, ids; whether these are weights) -> the same as
    #: the pairs of equal ids have it
    alike: Any
    #: (shift, sum, shift, sum) -> shift, sum
    merge: Any
    #: (shifts, sums) [parts, n] -> shift, sum
    merge_all: Any
    #: (row sum, col sum, which rows count, which columns, ROW, COL) -> whether a usual tile's sums are fair
    fair: Any

    @property
    def cache_key(self) -> str:
        """What a compiled kernel depends on; without it Triton's disk cache outlives an edit of a member."""
        return "-".join(member.cache_key for member in self)

    def __hash__(self) -> int:
        """Every launch hashes it, and a kernel's own hash is its source's."""
        return id(self.tile)


@triton.jit
def exp(x):
    """e^x, saturating below infinity; NaN stays NaN."""
    return tl.exp(tl.minimum(x, _LARGEST_EXPONENT, propagate_nan=tl.PropagateNan.ALL))


#: The kernels run in Triton's interpreter, which knows no instruction by its name.
INTERPRETED = tl.constexpr(not isinstance(exp, triton.JITFunction))


@triton.jit
def exp2(x):
    """2^x in one instruction; below the smallest normal number, 0."""
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def multiply_add(x, y, z):
    """x * y + z, rounded once."""
    if INTERPRETED:
        return (x.to(tl.float64) * y.to(tl.float64) + z.to(tl.float64)).to(tl.float32)
    return tl.fma(x, y, z)


@triton.jit
def reciprocal(x):
    """1 / x in one instruction, to 1 unit in the last place."""
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
