"""System calls that fail, or that the process does not survive, one after the other."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

#: Everything by which a memory changes a folder or takes from the machine.
CALLS = [
    (os, name) for name in ("open", "write", "pwrite", "fsync", "replace", "ftruncate", "posix_fallocate", "unlink")
]
CALLS = [*((module, name) for module, name in CALLS if hasattr(module, name)), (mmap, "mmap")]


class _Watched:
    """A call that is counted, and may fail before it does anything."""

    def __init__(self, real: Any, before: Callable[[], None]) -> None:
        self.real, self.before = real, before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.before()
        return self.real(*args, **kwargs)


@contextmanager
def before_calls(before: Callable[[], None], calls: list[tuple[Any, str]] = CALLS) -> Iterator[None]:
    """Within, ``before`` runs before every one of the calls."""
    real = [getattr(module, name) for module, name in calls]
    for (module, name), call in zip(calls, real):
        setattr(module, name, _Watched(call, before))
    try:
        yield
    finally:
        for (module, name), call in zip(calls, real):
            setattr(module, name, call)


def at_call(number: int, action: Callable[[], None], from_then_on: bool = False) -> Callable[[], None]:
    """Runs the action before the call of that number, counted from 0, or before that one and all later ones."""
    count = -1

    def before() -> None:
        nonlocal count
        count += 1
        if count == number or (from_then_on and count > number):
            action()

    return before


def count(action: Callable[[], Any]) -> int:
    """How many of CALLS an action makes."""
    made = 0

    def before() -> None:
        nonlocal made
        made += 1

    with before_calls(before):
        action()
    return made


def disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fork(action: Callable[[], Any]) -> int:
    """Runs an action in a forked process, whose id is returned."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # OpenMP's other threads are not there, and would be waited for
            action()
            code = 0
        finally:
            if code:
                traceback.print_exc()
            os._exit(code)
    return child


def wait(child: int) -> int:
    """How a forked process ended: minus the signal that killed it, 0, or 1 if it raised."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def in_child(action: Callable[[], Any]) -> int:
    """Runs an action in a forked process to its end."""
    return wait(fork(action))
