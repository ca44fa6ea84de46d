"""What scripts/gpu.py reads in its stages' results: a table of rows, a sanitizer's findings; and their one file."""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from pathlib import Path

__all__ = ["KERNELS", "findings", "pack_results", "table"]

#: Names of our kernels, as debuggers show them.
KERNELS = (
    "score_kernel",
    "persistent_kernel",
    "rest_kernel",
    "refer_kernel",
    "weigh_kept_kernel",
    "merge_kernel",
    "panel_pass_kernel",
    "tensor_core_kernel",
)


def findings(tool: str, log: str, status: int) -> tuple[str, int]:
    """What a sanitizer says in a line; 1 where it names a kernel of ours, or comes to no end."""
    places = Counter(re.findall(r"^=+ .*\bat ([^\n(+]+)[^\n+]*\+0x", log, flags=re.MULTILINE))
    summary = re.findall(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)$", log, flags=re.MULTILINE)
    words = "; ".join(f"{count} at {place}" for place, count in places.most_common(5))
    text = f"{tool}: {summary[-1] if summary else f'no summary, status {status}'}" + (f" ({words})" if words else "")
    return text, int(not summary or any(name in place for place in places for name in KERNELS))


def table(out: Path, seconds: float) -> int:
    """The rows in short: the best milliseconds, the fraction of the bare products' rate, the error, peak memory."""
    path = out / "rows.json"
    if not path.exists():
        print(f"gpu: no rows in {path}: run the stage goals or bench first", flush=True)
        return 1
    rows = json.loads(path.read_text())
    print(f"{'case':<56} {'provider':<12} {'best ms':>9} {'of floor':>9} {'error':>8} {'peak MB':>8}")
    for row in rows:
        case = f"{row['loss']} {row['mode']} N={row['n']} D={row['d']} {row['dtype']}"
        case += " fixed scale" * (not row["learnable_scale"]) + " frozen y" * row["frozen_y"]
        name = f"{row['provider']}-{row['backend']}" if row["backend"] else row["provider"]
        if row["status"] != "ok":
            print(f"{case:<56} {name:<12} {row['status']}: {row['reason'][:60]}")
            continue
        figures = f"{'':28}"
        if "best_s" in row:
            figures = f"{row['best_s'] * 1e3:9.3f} {row['floor_ratio']:9.2f} {row['error']:8.0e}"
        peak = f"{row['peak_bytes'] / 1e6:8.0f}" if "peak_bytes" in row else ""
        print(f"{case:<56} {name:<12} {figures} {peak}".rstrip())
    machines = {f"{row['machine']}; {row['versions'].split(',')[0]}; commit {row['commit']}" for row in rows}
    print("\n".join(sorted(machines)))
    return 0


def pack_results(out: Path) -> None:
    """One file beside DIR of what is there so far; whole at any time."""
    target = out.with_name(f"{out.name}.tar.gz")
    partial_target = target.with_suffix(".part")
    with tarfile.open(partial_target, "w:gz") as archive:
        for path in sorted(out.iterdir()):
            if path.is_file() and path.suffix not in (".so", ".part"):
                archive.add(path, f"{out.name}/{path.name}")
    partial_target.replace(target)
