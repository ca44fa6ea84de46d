"""What a folder says of the memory that it holds: memory.json."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..arguments.checks import check_count, check_number, shown

__all__ = ["MANIFEST", "TABLES", "Manifest", "check_rule", "check_samples"]


MANIFEST = "memory.json"
#: The tables of a memory, [samples, directions] each, and how they are kept.
TABLES = {"log_mean": torch.float64, "visits": torch.int32}

_FORMAT = "contrastive-kernels normalizer memory"
_VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """Sizes and rule of a stored memory.

    ``growing_to`` is there only while its tables are made or grow: they hold ``num_samples`` samples and nothing or
    zeros behind them. 0 samples are a memory that was never finished.
    """

    num_samples: int
    directions: int
    step: float
    floor: float
    growing_to: int | None = None

    def encode(self) -> bytes:
        """As JSON."""
        names = {f"{name}.npy": str(dtype).removeprefix("torch.") for name, dtype in TABLES.items()}
        own = {name: value for name, value in asdict(self).items() if value is not None}
        return (json.dumps({"format": _FORMAT, "version": _VERSION, "tables": names, **own}, indent=1) + "\n").encode()

    @classmethod
    def decode(cls, data: bytes, path: Path) -> Manifest:
        """From JSON; a ValueError says what does not fit."""
        try:
            found: Any = json.loads(data)
        except ValueError as error:  # neither UTF-8 nor JSON
            raise ValueError(f"storage: expected JSON; got {data[:40]!r} in {path} ({error})") from None
        if not isinstance(found, dict) or found.get("format") != _FORMAT:
            raise ValueError(f"storage: expected the format {_FORMAT!r}; got {str(found)[:80]} in {path}")
        if found.get("version") != _VERSION:
            raise ValueError(f"storage: expected version {_VERSION}; got {found.get('version')!r} in {path}")
        read: dict[str, Any] = {
            name: found.get(name) for name in ("num_samples", "directions", "step", "floor", "growing_to")
        }
        try:
            manifest = cls(**read)
            check_samples(manifest.num_samples, 0 if manifest.growing_to else 1)
            if manifest.growing_to is not None:
                check_samples(manifest.growing_to, manifest.num_samples, "growing_to")
            check_rule(manifest.directions, manifest.step, manifest.floor)
        except (TypeError, ValueError) as error:
            raise ValueError(f"storage: {error} in {path}") from None
        tables = json.loads(manifest.encode())["tables"]
        if found.get("tables") != tables:
            raise ValueError(f"storage: expected the tables {tables}; got {found.get('tables')} in {path}")
        return manifest


def check_samples(num_samples: Any, least: int, name: str = "num_samples") -> int:
    """A number of samples whose tables have an address."""
    if check_count(num_samples, name, least) >= 2**58:
        raise ValueError(f"{name}: expected less than 2**58; got {num_samples}")
    return num_samples


def check_rule(directions: Any, step: Any, floor: Any) -> tuple[float, float]:
    """Step and floor, where both and the directions fit."""
    step, floor = check_number(step, "step", positive=True), check_number(floor, "floor", positive=False)
    if step > 1 or floor > 1:
        raise ValueError(f"step, floor: expected at most 1; got {step} and {floor}")
    if type(directions) is not int or directions not in (1, 2):
        raise ValueError(f"directions: expected 1 or 2; got {shown(directions)}")
    return step, floor
