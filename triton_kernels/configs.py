"""The tile table, and the one predicate that says whether a tile can run at all."""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = [
    "PRECISIONS",
    "WORKS",
    "PersistentTile",
    "Tile",
    "family",
    "itemsize",
    "legality",
    "persistent_tile_for",
    "persistent_tiles",
    "rest_of",
    "shared_memory",
    "shipped",
    "tile_for",
    "work_of",
]

#: How operands are multiplied: 16-bit and TF32 on the tensor cores, float32 exactly ("ieee") without them.
PRECISIONS = ("16-bit", "tf32", "ieee")

#: Bytes of shared memory that one program may take (CUDA C++ Programming Guide, table of compute capabilities).
_SHARED_MEMORY = {80: 166_912, 86: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
#: Architectures whose limits are those of another.
_FAMILIES = {87: 80, 89: 86, 103: 100, 110: 100, 121: 120}

#: float32 accumulators that a thread can hold beside what the pair term needs of its 255 registers.
_LARGEST_ACCUMULATOR = 128


@dataclass(frozen=True)
class Tile:
    """The shape of one program's work: a tile of block_m x block_n scores, multiplied block_k features at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    #: row blocks that go through the columns together, so that they find each other's operands in L2
    group: int = 8

    def shared_bytes(self, precision: str) -> int:
        """Bytes of shared memory that the operands in flight take."""
        return self.num_stages * (self.block_m + self.block_n) * self.block_k * itemsize(precision)


@dataclass(frozen=True)
class PersistentTile(Tile):
    """A tile of persistent_kernel, whose programs stay and whose operands the TMA unit copies."""

    #: parts of its columns, which are finished one after the other
    parts: int = 1
    #: programs on a multiprocessor
    programs: int = 1

    def fills(self, rows: int, cols: int, multiprocessors: int) -> bool:
        """Whether a panel has a tile for every program that the GPU holds."""
        return -(-rows // self.block_m) * -(-cols // self.block_n) >= self.programs * multiprocessors

    @property
    def part(self) -> Tile:
        """What is finished at a time: partial results are those of tiles like this."""
        return Tile(self.block_m, self.block_n // self.parts, self.block_k, self.num_warps, self.num_stages, self.group)


def itemsize(precision: str) -> int:
    """Bytes of one operand."""
    return 2 if precision == "16-bit" else 4


def family(capability: int) -> int | None:
    """The member of the table that serves a compute capability (86 for 8.6); None for what is too old or unknown."""
    known = _FAMILIES.get(capability, capability)
    if known in _SHARED_MEMORY:
        return known
    return max((member for member in _SHARED_MEMORY if member <= known), default=None) if known > 80 else None


def shared_memory(capability: int) -> int:
    """Bytes of shared memory that one program may take."""
    return _SHARED_MEMORY[family(capability) or 80]


def legality(tile: Tile, capability: int, precision: str) -> str | None:
    """The reason why a tile cannot run, or None: it can."""
    member = family(capability)
    if member is None:
        return f"compute capability {capability / 10:.1f} is below 8.0"
    for name in ("block_m", "block_n", "block_k", "num_warps"):
        value = getattr(tile, name)
        if value < 1 or value & (value - 1):
            return f"{name}: expected a power of two; got {value}"
    if min(tile.block_m, tile.block_n, tile.block_k) < 16:
        return "the tensor cores take blocks of at least 16"
    accumulator = tile.block_m * tile.block_n // (32 * tile.num_warps)
    if accumulator > _LARGEST_ACCUMULATOR:
        return f"{accumulator} accumulators a thread, of which {_LARGEST_ACCUMULATOR} fit its registers"
    if member == 90 and precision != "ieee" and (tile.num_warps < 4 or tile.block_m < 16 * tile.num_warps):
        return "wgmma takes groups of 4 warps with 64 rows each"
    shared, limit = tile.shared_bytes(precision), _SHARED_MEMORY[member]
    if isinstance(tile, PersistentTile):
        if member != 90 or precision == "ieee":
            return "persistent programs copy 16-bit operands, or those in TF32, on Hopper"
        if tile.parts not in (1, 2, 4) or tile.part.block_n < 64:
            return f"parts: expected 1, 2 or 4 of at least 64 columns; got {tile.parts} of {tile.block_n}"
        shared *= tile.programs
    if shared > limit:
        return f"{shared} bytes of shared memory, of which there are {limit}"
    return None


#: What a kernel does: "reduce" leaves statistics, "weights" the weights of one side, "both" those of two, "fused"
#: weights and statistics.
WORKS = ("reduce", "weights", "both", "fused")

#: Multiplied on the tensor cores. Shapes that compile without spills and, on Hopper, leave room for a second program
#: (tests compile every one of them): a thread holds its part of the tile twice, as scores and as weights, and the gains
#: of its columns.
_WIDE_16, _NARROW_16 = Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 8, 3)
_FLAT_16, _FLAT_TF32 = Tile(64, 128, 64, 4, 3), Tile(64, 128, 32, 4, 3)
_SMALL_TF32 = Tile(64, 64, 32, 4, 3)
_WIDE_TF32, _NARROW_TF32 = Tile(128, 128, 32, 8, 3), Tile(128, 64, 32, 8, 3)
#: ... with less shared memory.
_SMALL_WIDE_16, _SMALL_NARROW_16 = Tile(128, 128, 32, 8, 3), Tile(128, 64, 32, 8, 3)
_SMALL_WIDE_TF32, _SMALL_NARROW_TF32 = Tile(128, 128, 32, 8, 2), Tile(128, 64, 32, 8, 2)
#: Without the tensor cores a thread multiplies by itself.
_IEEE = Tile(64, 64, 16, 4, 2)

#: (family, precision): the tiles of WORKS.
_TABLE: dict[tuple[int, str], tuple[Tile, Tile, Tile, Tile]] = {
    (80, "16-bit"): (_WIDE_16, _WIDE_16, _WIDE_16, _NARROW_16),
    (80, "tf32"): (_WIDE_TF32, _WIDE_TF32, _NARROW_TF32, _NARROW_TF32),
    (86, "16-bit"): (_SMALL_WIDE_16, _SMALL_WIDE_16, _SMALL_NARROW_16, _SMALL_NARROW_16),
    (86, "tf32"): (_SMALL_WIDE_TF32, _SMALL_WIDE_TF32, _SMALL_NARROW_TF32, _SMALL_NARROW_TF32),
    (90, "16-bit"): (_WIDE_16, _FLAT_16, _FLAT_16, _FLAT_16),
    (90, "tf32"): (_WIDE_TF32, _FLAT_TF32, _FLAT_TF32, _SMALL_TF32),
    (100, "16-bit"): (_WIDE_16, _WIDE_16, _NARROW_16, _NARROW_16),
    (100, "tf32"): (_WIDE_TF32, _WIDE_TF32, _NARROW_TF32, _NARROW_TF32),
    (120, "16-bit"): (_SMALL_WIDE_16, _SMALL_WIDE_16, _SMALL_NARROW_16, _SMALL_NARROW_16),
    (120, "tf32"): (_SMALL_WIDE_TF32, _SMALL_WIDE_TF32, _SMALL_NARROW_TF32, _SMALL_NARROW_TF32),
}


#: (family, precision, work, term): persistent tiles, for panels that fill the GPU.
_PERSISTENT: dict[tuple[int, str, str, str], PersistentTile] = {
    (90, "16-bit", "reduce", "exponential"): PersistentTile(128, 128, 64, 4, 3, programs=2),
    (90, "16-bit", "weights", "exponential"): PersistentTile(128, 128, 64, 4, 3, parts=2, programs=2),
    (90, "16-bit", "both", "exponential"): PersistentTile(128, 128, 64, 4, 3, parts=2, programs=2),
    (90, "16-bit", "fused", "exponential"): PersistentTile(128, 128, 64, 4, 3, parts=2, programs=2),
    (90, "16-bit", "fused", "sigmoid"): PersistentTile(128, 128, 64, 4, 3, parts=2, programs=2),
}


def persistent_tile_for(
    capability: int, precision: str, work: str, term: str, capped: bool = False
) -> PersistentTile | None:
    """The persistent tile for a compute capability, a precision, a kind of work and a pair term, if there is one.

    Ceilings of rows and columns take registers: then a tile has two parts, and there is none of two sides' weights.
    """
    tile = _PERSISTENT.get((family(capability) or 80, precision, work, term))
    if not capped or tile is None:
        return tile
    return None if work in ("both", "fused") else replace(tile, parts=2)


def persistent_tiles(capability: int, precision: str, capped: bool = False) -> list[PersistentTile]:
    """All of a compute capability and a precision."""
    keys = [key for key in _PERSISTENT if key[:2] == (family(capability) or 80, precision)]
    found = (persistent_tile_for(*key, capped) for key in keys)
    return [tile for tile in found if tile is not None]


def work_of(weights: bool, statistics: bool, two_sided: bool) -> str:
    """The member of WORKS that a kernel with these outputs belongs to."""
    if not weights:
        return "reduce"
    if statistics:
        return "fused"
    return "both" if two_sided else "weights"


def tile_for(
    capability: int, precision: str, work: str, features: int = 0, capped: bool = False, guided: bool = False
) -> Tile:
    """The tile for a compute capability, a precision and a kind of work.

    Features that are no whole blocks are loaded with masks, which take registers: then the tile is narrow. So do
    ceilings of rows and columns, and more so a guide, whose scores stand beside the others.
    """
    if precision == "ieee":
        return _IEEE
    if capped or guided:
        deep = _SMALL_TF32.block_k if precision == "tf32" else 64
        narrow = work == "fused" or (guided and (work == "both" or family(capability) != 90))
        return Tile(64, 64 if narrow else 128, deep, 4, 2)
    tile = _TABLE[(family(capability) or 80, precision)][WORKS.index(work)]
    odd = work != "reduce" and features % tile.block_k
    return replace(tile, block_m=128, block_n=64, block_k=32, num_warps=8) if odd else tile


def rest_of(tile: Tile) -> Tile:
    """The pieces in which unusual tiles of this shape are worked off."""
    piece = 64 if tile.block_m <= 16 * tile.num_warps else 32
    return replace(tile, block_n=min(tile.block_n, piece), num_stages=min(tile.num_stages, 2))


def shipped() -> list[tuple[int, str, str, Tile]]:
    """Every (family, precision, work, tile) that `tile_for` can answer with."""
    return [
        (member, precision, work, tile_for(member, precision, work))
        for member in _SHARED_MEMORY
        for precision in PRECISIONS
        for work in WORKS
    ]
