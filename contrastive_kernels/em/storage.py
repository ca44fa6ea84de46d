"""A folder that holds a memory: its tables as .npy files, memory.json that says what they are, and a writer's lock.

One process writes, any number of them map the tables without that right. Whenever a process dies, the folder can be
opened again and holds the memory at its old size or at its new one: a change of size is announced in memory.json,
then made, then entered there, and whoever finds it announced only takes it back.
"""

from __future__ import annotations

import contextlib
import errno
import math
import mmap
import os
import weakref
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from . import files
from .manifest import MANIFEST, TABLES, Manifest
from .npy import HEADER_BYTES, npy_header, read_npy_header

__all__ = ["Folder", "peek"]


_LOCK = "lock"


def peek(path: Path) -> Manifest:
    """What a folder's memory.json says, without a lock."""
    folder = files.open_folder(path)
    try:
        held = _read_manifest(folder, path)
        return held if held is not None and held.num_samples > 0 else _nothing(path)
    finally:
        os.close(folder)


class Folder:
    """An open folder and its tables, mapped: {name: [samples, directions]}.

    Parameters
    ----------
    path : Path
        Where it is, or shall be.
    wanted : Manifest
        What the caller expects; where nothing is held yet, that is made.
    read_only : bool
        Without a lock; nothing is made, and what is written to the tables stays in this process.

    Raises
    ------
    OSError
        For files that are missing, links, locked by another writer, or do not find their space.
    ValueError
        For files that do not agree with one another or with what was wanted.
    """

    def __init__(self, path: Path, wanted: Manifest, read_only: bool) -> None:
        self.path, self.read_only, self.process = path, read_only, os.getpid()
        self.tables: dict[str, Tensor] = {}
        self.manifest = wanted
        #: whether the tables are made here, of zeros
        self.new = False
        #: whether another rank writes it, and this one maps it
        self.beside = False
        self._mapped: list[mmap.mmap] = []
        self._files: dict[str, int] = {}
        self._open: list[int] = []
        made = [] if read_only else files.make_folders(path)
        try:
            self._open.append(files.open_folder(path))
            self._finalizer = weakref.finalize(self, _close, self._open, self._files, self.process)
            if read_only:
                self._read(wanted)
            else:
                self._take(wanted)
        except BaseException:
            if self._open:
                self._finalizer()
            files.remove_folders(made)
            raise

    @property
    def closed(self) -> bool:
        """Whether the lock is given back."""
        return not self._finalizer.alive

    @property
    def foreign(self) -> bool:
        """Whether this is a forked child's copy of a writer, which would write beside its parent."""
        return not self.read_only and os.getpid() != self.process

    def close(self) -> None:
        """Gives the lock back and lets go of the tables; they are unmapped once nobody holds them."""
        self._finalizer()
        self.tables, self._mapped = {}, []

    def flush(self) -> None:
        """Returns once the tables are on the disk, safe from a power failure."""
        for mapped in self._mapped:
            mapped.flush()

    def grow(self, num_samples: int) -> None:
        """Extends the tables by zeros and maps them anew; whatever fails, the old size stays."""
        held = self.manifest
        grown = replace(held, num_samples=num_samples)
        tables: dict[str, Tensor] = {}
        mapped: list[mmap.mmap] = []
        self._write(replace(held, growing_to=num_samples))
        try:
            for name in TABLES:
                self._extend(name, held, grown)
            tables, mapped = self._map(grown)
            self._write(grown)
        except BaseException:
            tables, mapped = {}, []  # unmapped before the files shrink
            self._shrink(held, num_samples)
            raise
        self.manifest, self.tables, self._mapped = grown, tables, mapped

    def follow(self, num_samples: int) -> None:
        """Maps tables anew that their writer has extended."""
        _close_all(self._files)
        self._read(replace(self.manifest, num_samples=num_samples))

    # ---- taking a folder ----

    def _take(self, wanted: Manifest) -> None:
        """As the only writer: makes what is not there yet, or takes up what is."""
        lock, new = files.lock_file(self._open[0], _LOCK, self.path)
        self._open.append(lock)
        try:
            held = self._recover()
            if held is None:
                self._make(wanted)
                self.new = True
            else:
                _agree(held, wanted, self.path)
                self._open_tables(held, os.O_RDWR)
                if held != wanted:  # another rule from now on
                    self._write(wanted)
                self.tables, self._mapped = self._map(wanted)
        except BaseException:
            if new and not self._has(MANIFEST):
                os.unlink(_LOCK, dir_fd=self._open[0])
            raise

    def _read(self, wanted: Manifest) -> None:
        """Maps what is there; a writer may change its size meanwhile."""
        while True:
            held = _read_manifest(self._open[0], self.path) or _nothing(self.path)
            try:
                _agree(held, wanted, self.path)
                self._open_tables(held, os.O_RDONLY)
                self.tables, self._mapped = self._map(held)
                self.manifest = held
                return
            except (OSError, ValueError):
                _close_all(self._files)
                if _read_manifest(self._open[0], self.path) == held:
                    raise

    def _recover(self) -> Manifest | None:
        """What the folder holds, if anything; what a process that died left half done is taken back."""
        held = _read_manifest(self._open[0], self.path)
        if held is None or held.growing_to is None:
            return held
        if held.num_samples == 0:
            self._discard()
            return None
        self._open_tables(held, os.O_RDWR)
        self._shrink(replace(held, growing_to=None), held.growing_to)
        _close_all(self._files)
        return replace(held, growing_to=None)

    def _make(self, wanted: Manifest) -> None:
        """Tables of zeros where there are none; if that fails, nothing is left of them."""
        for name in (f"{table}{ending}" for ending in (".npy", ".bin") for table in TABLES):
            if self._has(name):
                advice = _ADVICE[name[-3:]]
                raise ValueError(f"storage: expected {MANIFEST} beside {name}; got none in {self.path}. {advice}")
        try:
            self._write(replace(wanted, num_samples=0, growing_to=wanted.num_samples))
            for name in TABLES:
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
                self._files[name] = files.open_file(self._open[0], f"{name}.npy", flags, self.path)
                self._extend(name, None, wanted)
            self.tables, self._mapped = self._map(wanted)
            self._write(wanted)
        except BaseException:
            self._discard()
            raise

    def _discard(self) -> None:
        """Removes tables that were never finished."""
        _close_all(self._files)
        for name in (*(f"{name}.npy" for name in TABLES), MANIFEST):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self._open[0])

    # ---- tables ----

    def _open_tables(self, held: Manifest, flags: int) -> None:
        """Opens the tables, which must be what memory.json says."""
        for name in TABLES:
            try:
                self._files[name] = files.open_file(self._open[0], f"{name}.npy", flags, self.path)
            except FileNotFoundError:
                raise FileNotFoundError(
                    errno.ENOENT, f"storage: expected {name}.npy beside {MANIFEST}; it is missing", str(self.path)
                ) from None
            self._check_table(name, held)

    def _check_table(self, name: str, held: Manifest) -> None:
        """Header and length of a file; both may be ahead while it grows."""
        file, where = self._files[name], f"in {self.path / name}.npy"
        dtype, sizes = TABLES[name], {held.num_samples, held.growing_to or held.num_samples}
        header = os.pread(file, HEADER_BYTES, 0)
        if header not in [npy_header(dtype, (size, held.directions)) for size in sizes]:
            expected = read_npy_header(npy_header(dtype, (held.num_samples, held.directions)))
            raise ValueError(f"storage: expected {expected}, as {MANIFEST} says; got {read_npy_header(header)} {where}")
        size, expected_size = os.fstat(file).st_size, _bytes(name, held)
        if size < expected_size or (size > expected_size and held.growing_to is None):
            raise ValueError(f"storage: expected {expected_size} bytes, as {MANIFEST} says; got {size} {where}")

    def _extend(self, name: str, held: Manifest | None, wanted: Manifest) -> None:
        """Space for a file's new rows, then its header."""
        file, start, stop = self._files[name], 0 if held is None else _bytes(name, held), _bytes(name, wanted)
        try:
            files.allocate(file, start, stop)
        except OSError as error:
            message = f"storage: expected room for {stop - start} bytes; {error.strerror}"
            raise OSError(error.errno, message, str(self.path / f"{name}.npy")) from None
        os.pwrite(file, npy_header(TABLES[name], (wanted.num_samples, wanted.directions)), 0)
        os.fsync(file)

    def _shrink(self, held: Manifest, announced: int) -> None:
        """Takes a change of size back, which may have come to any point; so may this."""
        with contextlib.suppress(OSError):  # it may be entered already
            self._write(replace(held, growing_to=announced))
        for name, file in self._files.items():
            os.ftruncate(file, _bytes(name, held))
            os.pwrite(file, npy_header(TABLES[name], (held.num_samples, held.directions)), 0)
        self._write(held)

    def _map(self, held: Manifest) -> tuple[dict[str, Tensor], list[mmap.mmap]]:
        tables, mapped = {}, []
        for name, dtype in TABLES.items():
            shape = (held.num_samples, held.directions)
            mapping, tables[name] = files.map_table(self._files[name], dtype, shape, self.read_only)
            mapped.append(mapping)
        return tables, mapped

    def _write(self, manifest: Manifest) -> None:
        files.replace_file(self._open[0], MANIFEST, manifest.encode(), self.path)

    def _has(self, name: str) -> bool:
        return files.file_exists(self._open[0], name)


_ADVICE = {
    "npy": "The tables cannot be trusted without it; remove them, or write it anew.",
    "bin": "That is an earlier release's memory, which says neither samples nor directions: docs/decomposable.md shows "
    "how to take it over into a new folder.",
}


def _agree(held: Manifest, wanted: Manifest, path: Path) -> None:
    """Whether a folder holds a memory of the size that is wanted."""
    if (held.num_samples, held.directions) == (wanted.num_samples, wanted.directions):
        return
    if held.num_samples == 0:
        _nothing(path)
    hint = ""
    if held.directions == wanted.directions and held.num_samples < wanted.num_samples:
        hint = f". For a data set that grew: NormalizerMemory.open(folder).grow({wanted.num_samples})"
    raise ValueError(
        f"storage: expected {wanted.num_samples} samples in {wanted.directions} directions; "
        f"got {held.num_samples} in {held.directions} in {path}{hint}"
    )


def _nothing(path: Path) -> Manifest:
    raise FileNotFoundError(errno.ENOENT, f"storage: expected a memory; got no finished {MANIFEST}", str(path))


def _read_manifest(folder: int, path: Path) -> Manifest | None:
    try:
        file = files.open_file(folder, MANIFEST, os.O_RDONLY, path)
    except FileNotFoundError:
        return None
    with open(file, "rb") as stream:
        return Manifest.decode(stream.read(), path / MANIFEST)


def _bytes(name: str, held: Manifest) -> int:
    """Length of a table's file."""
    return HEADER_BYTES + math.prod((held.num_samples, held.directions, TABLES[name].itemsize))


def _close_all(opened: dict[str, int]) -> None:
    while opened:
        os.close(opened.popitem()[1])


def _close(opened: list[int], tables: dict[str, int], process: int) -> None:
    """Closes what is open; the lock ends with its owner, not with a forked child's copy."""
    _close_all(tables)
    if len(opened) == 2 and os.getpid() == process:
        files.unlock(opened[1])
    while opened:
        os.close(opened.pop())
