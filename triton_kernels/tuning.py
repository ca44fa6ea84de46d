"""Tiles by measurement: tried on request, kept in a file of the user's cache, and looked up at every launch."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path

from .configs import Tile, legality, tile_for

__all__ = ["TunedTiles", "bucket", "candidates", "fastest", "key", "tiles"]

_FILE = Path(".cache", "contrastive_kernels", "tiles.json")
_NUMBERS = {field.name for field in dataclasses.fields(Tile)}


def bucket(features: int) -> int:
    """The power of two that stands for a number of features, 64 to 4096."""
    return min(max(1 << (features - 1).bit_length(), 64), 4096)


def key(gpu: str, triton_version: str, precision: str, work: str, features: int) -> str:
    """What a measured tile holds for."""
    return " | ".join((gpu, f"triton {triton_version}", precision, work, f"D {bucket(features)}"))


def candidates(capability: int, precision: str, work: str) -> list[Tile]:
    """Legal tiles worth a try, the table's own first."""
    own = tile_for(capability, precision, work)
    if precision == "ieee":
        shapes = [(64, 64, 16), (64, 128, 16), (128, 64, 16), (128, 128, 16)]
    else:
        deep = 64 if precision == "16-bit" else 32
        shapes = [(m, n, k) for m in (64, 128) for n in (64, 128, 256) for k in (deep // 2, deep)]
    tried = [Tile(*shape, warps, stages) for shape in shapes for warps in (4, 8) for stages in (2, 3, 4)]
    return [own, *(tile for tile in tried if tile != own and legality(tile, capability, precision) is None)]


def fastest(tried: list[Tile], seconds: Callable[[Tile], float | None]) -> tuple[Tile, float]:
    """The tile of the least time and that time; None says that a tile cannot run, and of equals the first wins."""
    times = {tile: time for tile in tried if (time := seconds(tile)) is not None}
    if not times:
        raise RuntimeError("contrastive_kernels: no tile ran; the first is the one that is used without tuning")
    best = min(times, key=times.__getitem__)
    return best, times[best]


class TunedTiles:
    """Measured tiles by key, in a file; read once, when the first is asked for.

    Parameters
    ----------
    path : Path, optional
        The file; by default one in the user's cache folder.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = Path.home() / _FILE if path is None else path
        self._tiles: dict[str, Tile] | None = None

    def get(self, name: str) -> Tile | None:
        """The tile of this key, or None."""
        if self._tiles is None:
            self._tiles = self._read()
        return self._tiles.get(name)

    def put(self, measured: dict[str, Tile]) -> None:
        """Adds tiles to the file, in one step: a reader sees the old file or the new one."""
        self._tiles = {**self._read(), **measured}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".new")
        fresh.write_text(json.dumps({name: dataclasses.asdict(tile) for name, tile in self._tiles.items()}, indent=1))
        fresh.replace(self.path)

    def _read(self) -> dict[str, Tile]:
        if not self.path.exists():
            return {}
        try:
            read = json.loads(self.path.read_text())
            if not all(
                set(entry) == _NUMBERS and all(type(v) is int for v in entry.values()) for entry in read.values()
            ):
                raise ValueError("an entry is no tile")
            return {name: Tile(**entry) for name, entry in read.items()}
        except (ValueError, AttributeError, TypeError, OSError) as error:
            warnings.warn(
                f"contrastive_kernels: {self.path} is left aside ({error}); remove it, or run autotune again",
                RuntimeWarning,
                stacklevel=2,
            )
            return {}


#: Those of this user.
tiles = TunedTiles()
