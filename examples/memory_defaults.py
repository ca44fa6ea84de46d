"""Which options the decomposable loss should have by default, and what a temperature that moves does to its memory.

    python examples/memory_defaults.py --json memory_defaults.json      three seeds, some five minutes on two cores

The experiment of ``half_batch.py`` (same towers, data, optimiser and initial weights) at one small batch size, with one
option changed at a time: how u is drawn, the memory's step and floor, the bound of u Z; and the scale fixed, warmed up
from 5, or learnable, each with the memory left alone and with its logarithms moved (``NormalizerMemory.rescale``).
Reported: recall@1 among the held-out characters, with 95 % confidence intervals over seeds, and the difference to the
first line of the same loss, paired by seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from typing import Any

from files import RowFile
from half_batch import FIXED, Run, Temperature, interval, run, train_all
from options import SIZE, at_least, output_file
from options import run as run_command
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

__all__ = ["SETTINGS", "Row", "Setting"]

BATCH, SEEDS, SAMPLES = 32, 3, 30_000


@dataclasses.dataclass(frozen=True)
class Setting:
    """A line of a table: a loss of ``half_batch.METHODS``, what differs from its options, and the temperature."""

    table: str
    method: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    temperature: Temperature = FIXED

    @property
    def name(self) -> str:
        """What differs, in words."""
        kind = "learnable" if self.temperature.learnable else "warmed up" if self.temperature != FIXED else "fixed"
        words = [f"{key}={value!r}" for key, value in self.options.items()]
        if self.table == "temperature":
            words.append(kind + (", rescale" if self.temperature.rescale else ""))
        return ", ".join(words) or "as it is"

    def same_run(self, other: Setting) -> bool:
        """Whether both are the same training run, in two tables."""
        return dataclasses.replace(self, table=other.table) == other


def _temperatures(method: str, **options: Any) -> list[Setting]:
    """One loss with the scale fixed, warmed up or learnable; what has a memory, also with that rescaled."""
    moving = [Temperature(start=5.0), Temperature(learnable=True)]
    if method != "conventional":
        moving += [dataclasses.replace(t, rescale=True) for t in moving]
    return [Setting("temperature", method, options, t) for t in (FIXED, *moving)]


SETTINGS = [
    Setting("options", "stored"),
    *(
        Setting("options", "stored", options)
        for options in (
            {"shape": 1.0}, {"step": 0.6}, {"floor": 0.5},
            {"max_ratio": "partial sum"}, {"max_ratio": 10.0}, {"max_ratio": 3.0},
        )
    ),
    Setting("options", "updated"),
    *(
        Setting("options", "updated", options)
        for options in (
            {"shape": 1.0}, {"step": 0.6}, {"floor": 0.1}, {"floor": 0.3}, {"floor": 0.9},
        )
    ),
    *_temperatures("stored", max_ratio=3.0),
    *_temperatures("updated"),
    *_temperatures("conventional"),
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """One run of a setting."""

    table: str
    setting: str
    run: Run


def measure(setting: Setting, batch: int, seed: int, samples: int) -> list[Row]:
    """Trains and scores one model, for every table that it stands in."""
    scores = run(setting.method, batch, seed, samples, setting.temperature, **setting.options)
    return [Row(s.table, s.name, scores) for s in SETTINGS if setting.same_run(s)]


def paired(rows: Sequence[Row], row: Row) -> list[float]:
    """By seed, the recall of a row's setting less that of the first setting of the same table and loss."""
    group = [r for r in rows if (r.table, r.run.method) == (row.table, row.run.method)]
    first = {r.run.seed: r.run.recall for r in group if r.setting == group[0].setting}
    return [r.run.recall - first[r.run.seed] for r in group if r.setting == row.setting and r.run.seed in first]


def summary(rows: Sequence[Row], title: str) -> Table:
    """A line per setting of one of the two tables."""
    table = Table(
        "loss", "setting", "seeds", "recall@1, %", "difference", "effective rows", "std of log r", "last scale",
        title=title, title_justify="left",
    )  # fmt: skip
    rows = [r for r in rows if r.table == title]
    for row in {(r.run.method, r.setting): r for r in rows}.values():
        runs = [r.run for r in rows if (r.run.method, r.setting) == (row.run.method, row.setting)]
        mean, width = interval([100 * r.recall for r in runs])
        change, change_width = interval([100 * d for d in paired(rows, row)] or [math.nan])
        table.add_row(
            row.run.method, row.setting, str(len(runs)), f"{mean:.1f} ± {width:.1f}",
            f"{change:+.1f} ± {change_width:.1f}", _mean(runs, "effective_rows", ".0%"), _mean(runs, "scatter", ".2f"),
            _mean(runs, "logit_scale", ".1f"),
        )  # fmt: skip
    return table


def _mean(runs: Sequence[Run], name: str, form: str) -> str:
    """Printed; nothing where there is nothing, as the conventional loss has no memory."""
    known = [value for value in (getattr(r, name) for r in runs) if value is not None]
    return format(sum(known) / len(known), form) if known else ""


def main() -> None:
    """The command: all settings and seeds, two tables, JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=at_least(2), default=BATCH)
    parser.add_argument("--seeds", type=SIZE, default=SEEDS)
    parser.add_argument("--samples", type=SIZE, default=SAMPLES, help="pictures that every run sees")
    parser.add_argument("--processes", type=SIZE, default=2)
    parser.add_argument("--json", type=output_file, help="write a row per run; runs that it holds are not repeated")
    arguments = parser.parse_args()
    if arguments.samples < arguments.batch:
        parser.error(f"--samples: expected at least a batch of {arguments.batch}, got {arguments.samples}")
    kept = RowFile(arguments.json, {field.name for field in dataclasses.fields(Row)})
    rows = [Row(r["table"], r["setting"], Run(**r["run"])) for r in kept.read()]
    held = {(r.table, r.setting, r.run.method, r.run.batch, r.run.seed, r.run.samples) for r in rows}
    distinct = [s for k, s in enumerate(SETTINGS) if not any(s.same_run(other) for other in SETTINGS[:k])]
    seeds = range(arguments.seeds)
    wanted = [(s, arguments.batch, seed, arguments.samples) for seed in seeds for s in distinct]
    jobs = [(s, *how) for s, *how in wanted if (s.table, s.name, s.method, *how) not in held]
    console = Console(width=None if sys.stdout.isatty() else 140)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("training", total=len(wanted), completed=len(wanted) - len(jobs))
        for new in train_all(measure, jobs, arguments.processes):
            rows += new
            progress.update(task, advance=1, description=f"{new[0].run.method}, {new[0].setting}")
            kept.add([dataclasses.asdict(r) for r in new])
    order = {(s.table, s.method, s.name): k for k, s in enumerate(SETTINGS)}
    rows.sort(key=lambda r: (order[r.table, r.run.method, r.setting], r.run.seed))
    for title in dict.fromkeys(s.table for s in SETTINGS):
        console.print(summary(rows, title))
    kept.finish()


if __name__ == "__main__":
    run_command(main)
