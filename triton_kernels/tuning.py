"""Tiles by measurement: tried on request, kept in a file of the user's cache, and looked up at every launch."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.hub

from .configs import PersistentTile, Tile, legality, persistent_tile_for, tile_for

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "TunedTiles",
    "bucket",
    "candidates",
    "default_path",
    "fastest",
    "key",
    "persistent_candidates",
    "persistently",
    "tiles",
]

#: The kinds of tiles, by their numbers.
_KINDS = {frozenset(field.name for field in dataclasses.fields(kind)): kind for kind in (Tile, PersistentTile)}


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


def persistently(work: str) -> str:
    """A kind of work, done by persistent programs."""
    return f"{work}, persistent"


def persistent_candidates(capability: int, precision: str, work: str) -> list[Tile]:
    """The same of persistent tiles for the exponential term; none where there is none in the table."""
    own = persistent_tile_for(capability, precision, work, "exponential")
    if own is None:
        return []
    shapes = [(128, cols, own.block_k, warps) for cols in (128, 256) for warps in (4, 8)]
    kinds = [(stages, parts, programs) for stages in (3, 4) for parts in (1, 2, 4) for programs in (2, 1)]
    tried = [PersistentTile(*s, stages, parts=parts, programs=p) for s in shapes for stages, parts, p in kinds]
    return [own, *(tile for tile in tried if tile != own and legality(tile, capability, precision) is None)]


def fastest(tried: list[Tile], seconds: Callable[[Tile], float | None]) -> tuple[Tile, float]:
    """The tile of the least time and that time; None says that a tile cannot run, and of equals the first wins."""
    times = {tile: time for tile in tried if (time := seconds(tile)) is not None}
    if not times:
        raise RuntimeError("contrastive_kernels: no tile ran; the first is the one that is used without tuning")
    best = min(times, key=times.__getitem__)
    return best, times[best]


def default_path() -> Path | None:
    """A file in torch's own cache folder, wherever torch has been told to keep it; None for a user without a home."""
    path = Path(torch.hub.get_dir(), "contrastive_kernels", "tiles.json")
    return path if path.is_absolute() else None  # "~" stays where there is neither HOME nor an entry in passwd


class TunedTiles:
    """Measured tiles by key, in a file; read once, when the first is asked for.

    The file only saves measuring again, so nothing depends on it: where it cannot be read or written, a warning says so
    once, and what this process has measured holds for this process.

    Parameters
    ----------
    path : Path, optional
        The file; by default ``default_path()``.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = default_path() if path is None else path
        self._tiles: dict[str, Tile] | None = None
        self._warned: set[str] = set()

    def get(self, name: str) -> Tile | None:
        """The tile of this key, or None."""
        if self._tiles is None:
            self._tiles = self._read()
        return self._tiles.get(name)

    def put(self, measured: dict[str, Tile]) -> None:
        """Adds tiles to the file in one step: a reader sees the old or the new one, and of two writers both count."""
        held = self._tiles or {}
        if self.path is None:
            self._warn("measured tiles hold for this process only: this user has no cache folder (set XDG_CACHE_HOME)")
            self._tiles = {**held, **measured}
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path):
                entries = self._entries()
                entries |= {name: dataclasses.asdict(tile) for name, tile in measured.items()}
                _replace(self.path, json.dumps(entries, indent=1))
        except OSError as error:
            self._warn(f"measured tiles hold for this process only: {self.path} cannot be written ({error})")
            self._tiles = {**held, **measured}
        else:
            self._tiles = {**held, **_tiles_in(entries)}

    def _read(self) -> dict[str, Tile]:
        """The file's tiles; none, with a warning, where it cannot be read."""
        try:
            entries = self._entries()
        except OSError as error:
            self._warn(f"{self.path} cannot be read, so that tiles measured earlier are not used ({error})")
            return {}
        found = _tiles_in(entries)
        if len(found) < len(entries):
            wrong = next(name for name in entries if name not in found)
            self._warn(f"{self.path} is left aside where an entry is no tile, as {wrong!r}; run autotune again")
        return found

    def _entries(self) -> dict[str, Any]:
        """What the file holds, also entries of another version's; none, with a warning, if it is damaged."""
        if self.path is None:
            return {}
        try:
            entries = json.loads(self.path.read_bytes())
            if not isinstance(entries, dict):
                raise ValueError(f"expected an object, got {type(entries).__name__}")
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError) as error:  # neither UTF-8 nor JSON
            self._warn(f"{self.path} is left aside, for it is damaged ({error}); remove it, or run autotune again")
            return {}
        return entries

    def _warn(self, message: str) -> None:
        """A warning, the first time."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(f"contrastive_kernels: {message}", RuntimeWarning, stacklevel=4)


def _tiles_in(entries: dict[str, Any]) -> dict[str, Tile]:
    """Those entries that are tiles."""
    return {
        name: _KINDS[frozenset(entry)](**entry)
        for name, entry in entries.items()
        if isinstance(entry, dict)
        and frozenset(entry) in _KINDS
        and all(type(number) is int and number > 0 for number in entry.values())
    }


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time, where the system and its file system have locks; elsewhere the last of two at once wins."""
    with contextlib.ExitStack() as held:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # some network file systems have no locks
                file = held.enter_context(path.with_suffix(".lock").open("a"))
                fcntl.flock(file, fcntl.LOCK_EX)  # given back when the file closes, also by a kill
        yield


def _replace(path: Path, text: str) -> None:
    """Writes beside ``path`` and renames."""
    fresh = path.with_name(f"{path.name}.{uuid.uuid4().hex}.new")
    try:
        with fresh.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


#: Those of this user.
tiles = TunedTiles()
