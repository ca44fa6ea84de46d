"""Options of the commands: numbers that refuse nonsense, files that can be written, and mistakes told in one line."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from files import Mistake

__all__ = ["COUNT", "FRACTION", "NOT_NEGATIVE", "POSITIVE", "SEED", "SHARE", "SIZE", "THREADS", "Distinct", "Number",
           "at_least", "check_folder", "device_name", "output_file", "run"]  # fmt: skip


@dataclass(frozen=True)
class Number:
    """Numbers of a range, as a type of argparse.

    Parameters
    ----------
    words : str
        The range, as an error names it.
    kind : type
        int or float.
    least, most : float
        Both are in the range, ...
    without_least, without_most : bool
        ... unless these say otherwise.

    Examples
    --------
    >>> SIZE("64"), FRACTION("0.5")
    (64, 0.5)
    >>> SIZE.check("batch", 0)
    Traceback (most recent call last):
    ...
    ValueError: batch: expected a whole number of at least 1, got 0
    """

    words: str
    kind: type[int] | type[float]
    least: float
    most: float = math.inf
    without_least: bool = False
    without_most: bool = False

    def __call__(self, text: str) -> int | float:
        """The number that a text is."""
        try:
            value = self.kind(text)
        except ValueError:  # no number, or one of more digits than int() reads
            value = math.nan
        if not self.has(value):
            raise argparse.ArgumentTypeError(f"expected {self.words}, got {text!r}")
        return value

    def has(self, value: Any) -> bool:
        """Whether a value is such a number; an int is also a float, and nothing else is another."""
        if isinstance(value, bool) or not isinstance(value, (int, self.kind)):
            return False
        above = value > self.least if self.without_least else value >= self.least
        below = value < self.most if self.without_most else value <= self.most
        return above and below and value != math.inf

    def check(self, name: str, value: Any) -> None:
        """A ValueError that names a wrong value."""
        if not self.has(value):
            raise ValueError(f"{name}: expected {self.words}, got {value!r}")


def at_least(least: int, most: float = math.inf) -> Number:
    """Whole numbers from ``least`` on."""
    words = f"a whole number of at least {least}" if most == math.inf else f"a whole number, {least} to {most}"
    return Number(words, int, least, most)


SIZE, COUNT = at_least(1), at_least(0)
SEED = Number("a seed, 0 to 2^63 - 1", int, 0, 2**63 - 1)  # what both torch and numpy take
THREADS = at_least(1, 1024)
POSITIVE = Number("a positive number", float, 0, without_least=True)
NOT_NEGATIVE = Number("a number of at least 0", float, 0)
FRACTION = Number("a number, 0 to 1", float, 0, 1)
SHARE = Number("a number in [0, 1)", float, 0, 1, without_most=True)


class Distinct(argparse.Action):
    """A list in which nothing stands twice: what is asked for twice would be counted twice."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Stores each value once."""
        setattr(namespace, self.dest, list(dict.fromkeys(values)))


def device_name(text: str) -> str:
    """A device that torch knows and that is there."""
    try:
        torch.zeros(1, device=text).cpu()  # which "meta" cannot
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        raise argparse.ArgumentTypeError(f"expected a device of this machine, got {text!r} ({error})") from None
    return text


def _problem(folder: Path) -> str | None:
    """Why nothing can be written below a folder, there or still to be made; told before the work, not after it."""
    while not os.path.exists(folder) and folder != folder.parent:  # (Path.exists raises where there is no access)
        folder = folder.parent
    if not folder.is_dir():
        return f"{folder} is no folder"
    return None if os.access(folder, os.W_OK | os.X_OK) else f"{folder} cannot be written to"


def output_file(text: str) -> Path:
    """A file that can be written."""
    path = Path(text)
    problem = f"{path} is a folder" if os.path.isdir(path) else _problem(path.absolute().parent)
    if problem:
        raise argparse.ArgumentTypeError(f"expected a file that can be written: {problem}")
    return path


def check_folder(folder: Path) -> None:
    """A Mistake where --out cannot be written to."""
    problem = _problem(folder.absolute())
    if problem:
        raise Mistake(f"--out: expected a folder that can be written to: {problem}")


def run(main: Callable[[], None]) -> None:
    """Runs a command; a mistake, and what the system refuses, end it with one line and status 1."""
    try:
        main()
    except (Mistake, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
