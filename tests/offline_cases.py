"""The kernels that offline.py compiles: every shipped configuration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from contrastive_kernels._triton import configs
from contrastive_kernels._triton.configs import PersistentTile, Tile, shipped, work_of

_POINTERS = {"16-bit": ("bf16", "fp16"), "tf32": ("fp32",), "ieee": ("fp32",)}


@dataclass(frozen=True)
class Case:
    """One kernel: what it leaves, for which sides, in which dtype, for which architecture."""

    capability: int
    precision: str
    dtype: str
    term: str
    weights: bool
    statistics: bool
    two_sided: bool
    tile: Tile
    #: a number of features that is a multiple of the tile's, and rows of whole vectors
    even: bool = True
    #: pairs of equal ids count like others and have targets of their own
    labels: bool = False
    #: rows, and columns where they take part, leave out what lies above ceilings of theirs
    ceilings: bool = False
    #: with the statistics, exponentials are kept in the weights' place
    keeps: bool = False
    #: ... and what a guide's features of this dtype make alike, beside ceilings
    guide: str | None = None

    @property
    def name(self) -> str:
        """Its term, its outputs and its sides."""
        outputs = "+".join(name for name in ("weights", "statistics") if getattr(self, name))
        outputs = "kept+statistics" if self.keeps else outputs
        return f"{self.term}-{outputs}-{'both' if self.two_sided else 'rows'}"

    def __str__(self) -> str:
        return (
            f"sm{self.capability}-{self.dtype}-{self.precision}-{self.name}"
            + "-ragged" * (not self.even)
            + "-labels" * self.labels
            + "-ceilings" * self.ceilings
            + (f"-guide-{self.guide}" if self.guide else "")
        )


def cases(capability: int) -> Iterator[Case]:
    """Every shipped configuration of an architecture x pair term x outputs x dtype."""
    outputs = [(False, True, False), (False, True, True), (True, False, False), (True, False, True)]
    outputs += [(True, True, False), (True, True, True)]
    tiles = {(precision, work): tile for member, precision, work, tile in shipped() if member == capability}
    for precision, dtypes in _POINTERS.items():
        for dtype in dtypes:
            for term in ("exponential", "sigmoid"):
                for weights, statistics, two_sided in outputs:
                    if term == "sigmoid" and two_sided:
                        continue  # its columns have no part
                    tile = tiles[precision, work_of(weights, statistics, two_sided)]
                    yield Case(capability, precision, dtype, term, weights, statistics, two_sided, tile)


def persistent_cases(capability: int) -> Iterator[Case]:
    """The same of persistent tiles."""
    for (member, precision, work, term), tile in configs._PERSISTENT.items():
        weights, statistics = work != "reduce", work in ("reduce", "fused")
        two_sided = term == "exponential" and work != "weights"
        if member == capability:
            for dtype in _POINTERS[precision]:
                yield Case(capability, precision, dtype, term, weights, statistics, two_sided, tile)


def kept_cases(capability: int) -> Iterator[Case]:
    """Statistics, and exponentials kept in 16 bits, of rows and of both sides; persistent where there is a tile."""
    tiles: list[Tile | None] = [configs.tile_for(capability, "16-bit", "fused")]
    tiles.append(configs.persistent_tile_for(capability, "16-bit", "fused", "exponential"))
    for tile in filter(None, tiles):
        for two_sided in (False, True):
            yield Case(capability, "16-bit", "bf16", "exponential", True, True, two_sided, tile, keeps=True)


def capped_cases(capability: int) -> Iterator[Case]:
    """Those of the exponential term in bfloat16, with ceilings of rows and columns and the tiles that they have."""
    for case in (*cases(capability), *persistent_cases(capability)):
        if case.dtype != "bf16" or case.term != "exponential":
            continue
        work = work_of(case.weights, case.statistics, case.two_sided)
        tile: Tile | None = configs.tile_for(capability, "16-bit", work, capped=True)
        if isinstance(case.tile, PersistentTile):
            tile = configs.persistent_tile_for(capability, "16-bit", work, case.term, capped=True)
        if tile is not None:
            yield replace(case, tile=tile, ceilings=True)


def guided_cases(capability: int) -> Iterator[Case]:
    """The same with a guide, of bfloat16 or, with weights of both sides, of float32; none is persistent."""
    for case in cases(capability):
        if case.dtype != "bf16" or case.term != "exponential":
            continue
        work = work_of(case.weights, case.statistics, case.two_sided)
        tile = configs.tile_for(capability, "16-bit", work, guided=True)
        for guide in ("bf16", "fp32") if work == "both" else ("bf16",):
            yield replace(case, tile=tile, ceilings=case.weights, guide=guide)


def all_cases(capability: int) -> Iterator[Case]:
    """All of them."""
    yield from cases(capability)
    yield from persistent_cases(capability)
    yield from kept_cases(capability)
    yield from capped_cases(capability)
    yield from guided_cases(capability)
