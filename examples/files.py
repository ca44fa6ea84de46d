"""Files that survive: written whole or not at all, sealed with a checksum, and never read as what they are not."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "Mistake",
    "RowFile",
    "read_json",
    "read_sealed",
    "reason",
    "write",
    "write_figure",
    "write_json",
    "write_sealed",
]

_MARK = b"\nblake2b "
_SEAL = len(_MARK) + 2 * hashlib.blake2b().digest_size + 1


class Mistake(ValueError):
    """What whoever started a command can mend: it ends with this one line (``options.run``)."""


def reason(error: OSError) -> str:
    """What the system said, without the number and the name of a file."""
    return error.strerror or str(error)


def write(path: Path, content: bytes) -> None:
    """Writes beside ``path`` and renames: whoever reads, and a kill at any moment, finds a whole file, old or new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with part.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:  # also Ctrl-C
        with contextlib.suppress(OSError):
            part.unlink()
        if isinstance(error, OSError) and error.filename is None:  # of an open file
            error.filename = str(path)
        raise


def _seal(content: bytes) -> bytes:
    """The checksum as a line. torch.load and numpy.load read zip files, and pass over what follows their end."""
    return _MARK + hashlib.blake2b(content).hexdigest().encode() + b"\n"


def write_sealed(path: Path, content: bytes) -> None:
    """``write``, with a checksum at the end."""
    write(path, content + _seal(content))


def read_sealed(path: Path) -> bytes:
    """What ``write_sealed`` wrote; a Mistake if any byte is another."""
    whole = path.read_bytes()
    content, seal = whole[:-_SEAL], whole[-_SEAL:]
    if seal != _seal(content):
        raise Mistake(f"{path} is damaged: its content and its checksum differ")
    return content


def write_json(path: Path, value: Any) -> None:
    """JSON, one value a line."""
    write(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> Any:
    """What a file of JSON holds; a Mistake if it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # neither UTF-8 nor JSON
        raise Mistake(f"{path} is damaged, or no JSON: {error}; move it away to begin anew") from None


class RowFile:
    """Rows of finished runs in a file of JSON, written as they come; without a file, kept nowhere.

    Several processes may share a file: each waits for the other, and none loses a row. What cannot be written is tried
    again with the next rows and at last: a run is worth more than its place on the disk.

    Parameters
    ----------
    path : Path or None
    names : set of str
        What a row has.
    """

    def __init__(self, path: Path | None, names: set[str]) -> None:
        self.path, self.names = path, names
        self._waiting: list[dict[str, Any]] = []

    def read(self) -> list[dict[str, Any]]:
        """The file's rows; none if there is no file."""
        if self.path is None or not self.path.exists():
            return []
        rows = read_json(self.path)
        if not isinstance(rows, list) or not all(isinstance(row, dict) and set(row) == self.names for row in rows):
            raise Mistake(f"{self.path}: expected rows of {sorted(self.names)}; move it away to begin anew")
        return rows

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Adds rows now, or later."""
        self._waiting += rows
        with contextlib.suppress(OSError, Mistake):
            self.finish()

    def finish(self) -> None:
        """Adds what could not be added before, or raises what is in the way."""
        if self.path is None or not self._waiting:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _alone_in(self.path.parent):
            write_json(self.path, [*self.read(), *self._waiting])
        self._waiting.clear()


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """One writer at a time, where the system and its file system can lock a folder."""
    with contextlib.ExitStack() as held:
        if fcntl is not None:
            with contextlib.suppress(OSError):
                handle = os.open(folder, os.O_RDONLY)
                held.callback(os.close, handle)
                fcntl.flock(handle, fcntl.LOCK_EX)  # given back at the close, also by a kill
        yield


def write_figure(path: Path, figure: Figure, dpi: int) -> None:
    """A picture, of the kind that its name ends in; PNG by default."""
    content = io.BytesIO()
    figure.savefig(content, dpi=dpi, format=path.suffix[1:] or "png")
    write(path, content.getvalue())
