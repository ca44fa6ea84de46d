"""Files that are opened without following links, locked, given their space at once, replaced whole, and mapped."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
from pathlib import Path

import torch
from torch import Tensor

from .npy import HEADER_BYTES

__all__ = [
    "allocate",
    "file_exists",
    "lock_file",
    "make_folders",
    "map_table",
    "open_file",
    "open_folder",
    "remove_folders",
    "replace_file",
    "unlock",
]


#: Zeros that are written at a time where space cannot be reserved.
_BLOCK = 2**20
#: What a file system says that cannot reserve space.
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
#: mmap has a name for it from Python 3.12 on; the number is Linux's.
_NO_RESERVE = (
    getattr(mmap, "MAP_NORESERVE", 0x4000 if os.uname().sysname == "Linux" else 0) if os.name == "posix" else 0
)


def make_folders(path: Path) -> list[Path]:
    """Makes a folder and those above it; which ones it made, outermost first."""
    made: list[Path] = []
    try:
        for folder in reversed((path, *path.parents)):
            if not folder.exists():
                with contextlib.suppress(FileExistsError):  # another process was faster, or a link leads nowhere
                    folder.mkdir()
                    made.append(folder)
    except BaseException:
        remove_folders(made)
        raise
    return made


def remove_folders(made: list[Path]) -> None:
    """Takes back :func:`make_folders`; folders that hold something stay."""
    for folder in reversed(made):
        with contextlib.suppress(OSError):
            folder.rmdir()


def open_folder(path: Path) -> int:
    """A descriptor of a folder, which is no link."""
    if os.name != "posix":
        raise OSError(errno.ENOTSUP, f"storage: expected a POSIX system, to map and lock files; got {os.name}")
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        if path.is_symlink():
            raise _link(path) from None
        raise


def open_file(folder: int, name: str, flags: int, where: Path) -> int:
    """A descriptor of a regular file of the folder, which is no link."""
    try:
        # without O_NONBLOCK a named pipe would wait for its other end
        file = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise _link(where / name) from None
        raise
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "storage: expected a regular file", str(where / name))
    return file


def _link(path: Path) -> OSError:
    return OSError(errno.ELOOP, "storage: symbolic links are not followed; name the place itself", str(path))


def lock_file(folder: int, name: str, where: Path) -> tuple[int, bool]:
    """Locks a file of the folder, for as long as it is open; whether it is new. Who comes second gets an error."""
    import fcntl  # POSIX only

    while True:
        new = not file_exists(folder, name)
        file = open_file(folder, name, os.O_RDWR | os.O_CREAT, where)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # a constructor that failed may have removed the file since it was opened
            current = _is(folder, name, file)
        except BlockingIOError:
            owner = os.pread(file, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(file)
            raise BlockingIOError(
                errno.EWOULDBLOCK,
                f"storage: expected no other writer; got one in process {owner}. Close it, or map the memory without "
                "the right to write: NormalizerMemory.open(folder, read_only=True)",
                str(where),
            ) from None
        except BaseException:
            os.close(file)
            raise
        if current:
            with contextlib.suppress(OSError):  # on a full disk nobody learns who holds it
                os.ftruncate(file, 0)
                os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
            return file, new
        os.close(file)


def unlock(file: int) -> None:
    """Gives a lock back, though a child process may still have the file open."""
    import fcntl

    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_UN)


def file_exists(folder: int, name: str) -> bool:
    """Whether the folder has such an entry, a link that leads nowhere included."""
    return _is(folder, name, None)


def _is(folder: int, name: str, file: int | None) -> bool:
    """Whether the folder's entry is that open file; without one, whether there is an entry."""
    try:
        entry = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return file is None or os.path.samestat(entry, os.fstat(file))


def allocate(file: int, start: int, stop: int) -> None:
    """Extends a file by zeros that have their place on the disk, so that no later write finds it full."""
    reserve = getattr(os, "posix_fallocate", None)  # macOS has none
    if reserve is not None:
        try:
            reserve(file, start, stop - start)
            return
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
    while start < stop:
        start += os.pwrite(file, bytes(min(_BLOCK, stop - start)), start)


def replace_file(folder: int, name: str, data: bytes, where: Path) -> None:
    """Writes a small file whole: whoever looks, and whenever the process dies, there is the old one or the new one."""
    draft = f"{name}.new"
    try:
        file = open_file(folder, draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, where)
        try:
            if os.write(file, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(where / draft))
            os.fsync(file)
        finally:
            os.close(file)
        os.replace(draft, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(draft, dir_fd=folder)
        raise
    with contextlib.suppress(OSError):  # not every file system can
        os.fsync(folder)


def map_table(file: int, dtype: torch.dtype, shape: tuple[int, int], read_only: bool) -> tuple[mmap.mmap, Tensor]:
    """The table [samples, directions] behind a file's header, and the mapping it lies in."""
    count = shape[0] * shape[1]
    # a reader sees what the writer writes; what it writes itself goes to pages of its own and never to the file
    flags = mmap.MAP_PRIVATE | _NO_RESERVE if read_only else mmap.MAP_SHARED
    mapped = mmap.mmap(file, HEADER_BYTES + count * dtype.itemsize, flags, mmap.PROT_READ | mmap.PROT_WRITE)
    return mapped, torch.frombuffer(mapped, dtype=dtype, count=count, offset=HEADER_BYTES).view(shape)
