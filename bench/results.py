"""Rows of results, keyed by what was measured, with what, where and at which state of the code."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from .cases import Case
from .providers import Provider

__all__ = [
    "KEY",
    "Row",
    "case_of",
    "commit",
    "cpu_flags",
    "describe_machine",
    "key_of",
    "load",
    "new_row",
    "save",
    "upsert",
]

Row = dict[str, Any]

#: What makes two measurements the same one.
KEY = (
    *("loss", "provider", "backend", "mode", "n", "m", "d", "dtype", "device", "learnable_scale", "frozen_y"),
    *("processes", "machine", "threads", "versions", "commit"),
)
ROOT = Path(__file__).resolve().parent.parent


def new_row(case: Case, provider: Provider, **measured: Any) -> Row:
    """A row's key, then what was measured."""
    name = "ours" if provider.is_ours else provider.name
    versions = f"torch {torch.__version__}"
    if provider.package != "torch":
        versions += f", {provider.package} {provider.version}"
    return {
        **dataclasses.asdict(case),
        "provider": name,
        "backend": provider.backend,
        "processes": None,  # of a group
        "machine": describe_machine(case.device),
        "measured": True,
        "threads": torch.get_num_threads(),
        "versions": versions,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **measured,
    }


def case_of(row: Row) -> Case:
    """The case that a row is about."""
    return Case(**{field.name: row[field.name] for field in dataclasses.fields(Case)})


def load(path: Path) -> list[Row]:
    """The stored rows; none where there is no file."""
    return json.loads(path.read_text()) if path.exists() else []


def upsert(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """Old rows with the new ones: time and memory of one key share a row, a later figure replaces an earlier one.

    A wrong result takes the row's figures away.
    """
    rows = {key_of(row): row for row in old}
    for row in new:
        key = key_of(row)
        rows[key] = {**rows.get(key, {}), **row} if row.get("status") == "ok" else row
    return [rows[key] for key in sorted(rows, key=str)]


def save(path: Path, new: Iterable[Row]) -> int:
    """Adds or updates rows in a file, one row a line, atomically; returns how many it holds."""
    rows = upsert(load(path), new)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.part")
    partial.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    partial.replace(path)
    return len(rows)


def key_of(row: Row) -> tuple[Any, ...]:
    """What makes a row the same measurement as another."""
    return tuple(row.get(name) for name in KEY)


@lru_cache(maxsize=1)
def commit() -> str:
    """The checkout's commit, with "+" where tracked files differ from it.

    Outside a checkout it is what the environment's BENCH_COMMIT says, or "unknown".
    """
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + (
            "+" if _git("status", "--porcelain", "--untracked-files=no", "--", ":!bench/results", ":!*.png") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("BENCH_COMMIT", "unknown")


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


@lru_cache(maxsize=4)
def describe_machine(device: str) -> str:
    """The processor's name, its cores and what matters of its instruction set; or the GPU's name."""
    if torch.device(device).type == "cuda":
        return str(torch.cuda.get_device_name(device))
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in cpu_flags()]
    name = _cpu_line("model name") or platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores ({' '.join(wide)})"


@lru_cache(maxsize=1)
def cpu_flags() -> frozenset[str]:
    """Instruction-set flags of the processor, as Linux names them."""
    return frozenset(_cpu_line("flags").split())


def _cpu_line(name: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")
