"""The command line: ``python -m bench --help``."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from contrastive_kernels.planning.costs import LOSSES

from . import distributed, family, integrations, memory, plot, report, results
from .cases import DTYPES, MODES, Case, memory_cases, quick_cases, standard_cases
from .goals import GOALS, GPU_GOALS, Goal
from .providers import get, providers
from .run import Pair, Session, grouped

DESCRIPTION = """Times every loss, ours and every peer that is installed, in turns within one run, beside the bare
products at the rate measured in the same run. A provider whose result is wrong is reported as wrong, without a time.
Without options: the default set, some 5 minutes on 2 cores. Any of --case ... --frozen-y measures every combination of
what is named instead."""

#: Fewest rounds behind a promised ratio.
GOAL_ROUNDS = 5


def _list_of(kind: Callable[[str], object]) -> Callable[[str], list[object]]:
    def parse(text: str) -> list[object]:
        return [kind(part) for part in text.split(",")]

    parse.__name__ = f"list of {kind.__name__}"
    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=DESCRIPTION)
    what = parser.add_argument_group("what (lists are comma-separated)")
    what.add_argument("--case", type=_list_of(str), metavar="LOSS,...", help=", ".join(LOSSES))
    what.add_argument("--n", type=_list_of(int), metavar="N,...", help="batch sizes (8192)")
    what.add_argument("--m", type=int, metavar="M", help="candidates of info_nce (N)")
    what.add_argument("--d", type=_list_of(int), metavar="D,...", help="feature widths (256)")
    what.add_argument("--dtype", type=_list_of(str), metavar="DTYPE,...", help=", ".join(DTYPES))
    what.add_argument("--mode", type=_list_of(str), metavar="MODE,...", help=", ".join(MODES))
    what.add_argument("--device", metavar="DEVICE", help="cpu or cuda (cpu)")
    what.add_argument("--fixed-scale", action="store_true", help="no gradient to the temperature")
    what.add_argument("--frozen-y", action="store_true", help="no gradient to y")
    what.add_argument("--provider", type=_list_of(str), metavar="NAME,...", help="these only; see --list")
    what.add_argument("--quick", action="store_true", help="a tiny set, for tests")
    what.add_argument(
        "--goals",
        action="store_true",
        help="the promised ratios of --device alone, each with its bound (some 15 minutes)",
    )
    what.add_argument(
        "--distributed",
        action="store_true",
        help="clip_loss over 1, 2 and 4 processes instead, against gathering all features (some minutes)",
    )
    what.add_argument(
        "--family",
        action="store_true",
        help="what a member of a loss costs (ids, a margin, a scale by row), beside the loss without it, instead",
    )
    what.add_argument(
        "--integrations",
        action="store_true",
        help="other libraries' losses, those that are installed, against contrastive_kernels.integrations instead",
    )
    how = parser.add_argument_group("how")
    how.add_argument("--memory", action="store_true", help="peak memory too, one process each (about 4 minutes more)")
    how.add_argument("--no-time", action="store_true", help="with --memory: no times")
    how.add_argument("--rounds", type=int, help="turns of every provider (as many as fit into 12 s a group, 3 to 15)")
    how.add_argument("--threads", type=int, help="torch's threads (of each process)")
    out = parser.add_argument_group("out")
    out.add_argument("--list", action="store_true", help="providers and the default set; measure nothing")
    out.add_argument("--dry-run", action="store_true", help="what would run, and why the rest would not")
    out.add_argument("--json", type=Path, metavar="FILE", help="add or update rows in FILE")
    out.add_argument("--resume", action="store_true", help="with --json: leave out what FILE has of this very code")
    out.add_argument(
        "--show", action="store_true", help="with --json: tables and plots of the stored rows; measure nothing"
    )
    out.add_argument("--plot", type=Path, metavar="DIR", help="PNGs of the rows in --json's FILE, or of this run")
    return parser


def _cases(args: argparse.Namespace) -> tuple[list[Case], list[Case], bool]:
    """Cases to time, cases whose memory is measured, and whether they are a set of ours."""
    axes = (args.case, args.n, args.m, args.d, args.dtype, args.mode, args.device)
    if args.quick:
        return quick_cases(), quick_cases()[-1:], True
    if not any(axes) and not args.fixed_scale and not args.frozen_y:
        return standard_cases(), memory_cases(), True
    combinations = itertools.product(
        args.case or ["clip_loss"],
        args.d or [256],
        args.dtype or ["float32"],
        args.n or [8192],
        args.mode or ["fwd+bwd"],
    )
    fixed = {
        "m": args.m or 0,
        "device": args.device or "cpu",
        "learnable_scale": not args.fixed_scale,
        "frozen_y": args.frozen_y,
    }
    cases = [Case(loss, n, d, dtype=dtype, mode=mode, **fixed) for loss, d, dtype, n, mode in combinations]
    return cases, cases, False


def _plan(cases: Sequence[Case], named: list[str] | None, default: bool) -> list[tuple[Case, str, str | None]]:
    """(case, provider, reason why it is left out) of every provider that has the loss."""
    lines = []
    for case in cases:
        for p in map(get, named or providers()):
            if case.loss not in p.losses:
                continue
            reason = p.why_not(case)
            if reason is None and default and named is None and not p.by_default(case):
                reason = "left out of the default set for its time; name it to run it"
            lines.append((case, p.name, reason))
    return lines


def _runnable(lines: list[tuple[Case, str, str | None]]) -> list[Pair]:
    return [(case, get(name)) for case, name, reason in lines if reason is None]


def _measure(
    session: Session,
    timed: list[Pair],
    remembered: list[Pair],
    console: Console,
    path: Path | None,
    rows: list[results.Row],
) -> None:
    """Adds all rows to `rows`; tables are printed and rows stored as groups finish."""
    columns = (
        SpinnerColumn(),
        BarColumn(24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(timed) + len(remembered))
        session.say = lambda text: progress.update(task, description=text)

        def finish(new: list[results.Row]) -> None:
            rows.extend(new)
            for table in report.case_tables(new):
                console.print(table, "")
            if path:
                results.save(path, new)

        for group in grouped(timed):
            finish(session.time_group(group))
            progress.update(task, advance=len(group))
        for case in dict.fromkeys(case for case, _ in remembered):
            new = []
            for provider in (p for c, p in remembered if c == case):
                new.append(session.memory_row(case, provider))
                progress.update(task, advance=1)
            finish(new)


def _goals(args: argparse.Namespace) -> list[Goal]:
    return GPU_GOALS if torch.device(args.device or "cpu").type == "cuda" else GOALS


def _goal_results(goals: list[Goal], rows: list[results.Row]) -> list[tuple[Goal, float | None, str]]:
    """Each goal's figure and verdict."""
    found = {(results.case_of(row), report.provider_name(row)): row for row in results.upsert([], rows)}

    def lookup(case: Case, name: str) -> results.Row:
        return found[case, name]

    lines: list[tuple[Goal, float | None, str]] = []
    for goal in goals:
        problem = next(
            (why for case, name in goal.needs if (why := _problem(found.get((case, name)), case, name))), None
        )
        figure = None if problem else goal.value(lookup)
        lines.append((goal, figure, problem or goal.verdict(goal.value(lookup))))
    return lines


def _problem(row: results.Row | None, case: Case, name: str) -> str | None:
    if row is None:
        why = get(name).why_not(case) if name in providers() else None
        return f"{name} cannot run here" + (f": {why}" if why else "")
    return None if row["status"] == "ok" else f"{name} is {row['status']}: {row['reason']}"


def _key(pair: Pair) -> tuple[object, ...]:
    return results.key_of(results.new_row(*pair))


def _stored(pairs: list[Pair], path: Path | None) -> list[results.Row]:
    """What a file has of these pairs, measured by this very code on this machine."""
    wanted = set(map(_key, pairs))
    return [row for row in results.load(path) if results.key_of(row) in wanted] if path else []


def _missing(pairs: list[Pair], stored: list[results.Row], figure: str) -> list[Pair]:
    """The pairs of the groups that are not all stored."""
    known = {results.key_of(row) for row in stored if figure in row or row["status"] != "ok"}
    return [pair for group in grouped(pairs) if any(_key(pair) not in known for pair in group) for pair in group]


def _show(args: argparse.Namespace, console: Console) -> None:
    rows = results.load(args.json)
    for table in [*report.case_tables(_alone(rows)), *distributed.scaling_tables(rows)]:
        console.print(table, "")
    if args.plot:
        _plot(rows, args.plot, console)


def _alone(rows: list[results.Row]) -> list[results.Row]:
    """Those of no group of processes."""
    return [row for row in rows if not row.get("processes")]


def _plot(rows: list[results.Row], folder: Path, console: Console) -> None:
    for path in plot.plot(_alone(rows), folder):
        console.print(f"wrote {path}", highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Parses, measures, prints, stores; returns the exit status: 1 where ours was wrong or a goal was not met."""
    parser = _parser()
    args = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 150)
    if args.show:
        if not args.json:
            parser.error("--show needs --json FILE")
        _show(args, console)
        return 0
    if args.distributed:
        others = set(vars(args)) - {"distributed", "quick", "n", "d", "rounds", "threads", "json"}
        if given := [name for name in sorted(others) if getattr(args, name)]:
            parser.error(f"--distributed: expected --n, --d, --quick, --rounds, --threads, --json alone; got {given}")
        plan = _scaling(args)
        _warn_of_load(plan.threads, console)
        return distributed.run(plan, console, args.json)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.family:
        others = set(vars(args)) - {"family", "quick", "rounds", "threads"}
        if given := [name for name in sorted(others) if getattr(args, name)]:
            parser.error(f"--family: expected --quick, --rounds, --threads alone; got {given}")
        _warn_of_load(torch.get_num_threads(), console)
        return family.run(console, args.rounds or (1 if args.quick else 5), args.quick)
    if args.integrations:
        others = set(vars(args)) - {"integrations", "quick", "rounds", "threads", "json", "plot"}
        if given := [name for name in sorted(others) if getattr(args, name)]:
            parser.error(f"--integrations: expected --quick, --rounds, --threads, --json, --plot alone; got {given}")
        _warn_of_load(torch.get_num_threads(), console)
        return integrations.run(console, args.rounds or (1 if args.quick else 7), args.quick, args.json, args.plot)
    try:
        timed, remembered = _choose(args)
    except ValueError as error:
        parser.error(str(error))
    if args.list:
        console.print(report.provider_table(providers().values()), "")
    if args.list or args.dry_run:
        for title, lines in (("Times", timed), ("Peak memory", remembered)):
            if lines:
                console.print(report.plan_table(title, ((case, get(name), why) for case, name, why in lines)), "")
        return 0
    return _run(args, _runnable(timed), _runnable(remembered), console)


def _scaling(args: argparse.Namespace) -> distributed.Plan:
    """Of --distributed."""
    sizes: dict[str, Any] = {"processes": (1, 2), "each": 32, "total": 96, "d": 16} if args.quick else {}
    sizes |= {"d": args.d[0]} if args.d else {}
    if args.n and len(args.n) > 1:  # small batches, whose messages are what they cost
        sizes |= {"totals": tuple(args.n), "strategies": ("auto",)}
    elif args.n:
        sizes |= {"total": args.n[0], "each": args.n[0] // 4}
    sizes |= {"threads": args.threads} if args.threads else {}
    return distributed.Plan(**sizes, rounds=args.rounds or (1 if args.quick else 5))


def _choose(args: argparse.Namespace) -> tuple[list[tuple[Case, str, str | None]], list[tuple[Case, str, str | None]]]:
    """What is timed and whose memory is measured, with the reasons of what is not."""
    if args.goals:
        needs = dict.fromkeys((case, name, goal.memory) for goal in _goals(args) for case, name in goal.needs)
        lines = [
            (case, name, get(name).why_not(case), of_memory) for case, name, of_memory in needs if name in providers()
        ]
        return [line[:3] for line in lines if not line[3]], [line[:3] for line in lines if line[3]]
    cases, memory_of, default = _cases(args)
    timed = [] if args.no_time else _plan(cases, args.provider, default)
    remembered = _plan(memory_of, args.provider, default) if args.memory else []
    reasons = {device: memory.why_not(device) for device in {case.device for case in memory_of}}
    return timed, [(case, name, why or reasons[case.device]) for case, name, why in remembered]


def _warn_of_load(threads: int, console: Console) -> None:
    """Interleaving evens out slow drifts, not a second process on the same cores."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.25 * threads:
        console.print(
            f"[yellow]other processes are running (load {load:.1f}): figures will be off[/yellow]\n", highlight=False
        )


def _run(args: argparse.Namespace, timed: list[Pair], remembered: list[Pair], console: Console) -> int:
    start = time.perf_counter()
    session = Session(
        torch.get_num_threads(), args.rounds or (2 if args.quick else None), GOAL_ROUNDS if args.goals else 3
    )
    device = (timed or remembered)[0][0].device if timed or remembered else "cpu"
    console.print(
        f"{results.describe_machine(device)}; {session.threads} threads; torch {torch.__version__}; "
        f"commit {results.commit()}\n",
        highlight=False,
    )
    _warn_of_load(session.threads, console)
    stored = _stored([*timed, *remembered], args.json) if args.resume else []
    timed, remembered = _missing(timed, stored, "best_s"), _missing(remembered, stored, "peak_bytes")
    rows, stopped = list(stored), False
    try:
        _measure(session, timed, remembered, console, args.json, rows)
    except KeyboardInterrupt:
        stopped = True
        console.print("stopped: what follows is of the groups that were finished", highlight=False)
    bad = any(row["backend"] and row["status"] != "ok" for row in rows)
    if args.goals:
        kept = _goal_results(_goals(args), rows)
        bad |= any(verdict == "not met" for _, _, verdict in kept)
        console.print(report.goal_table(kept, "bf16" if _goals(args) is GPU_GOALS else "fp32"), "")
    if args.json:
        console.print(f"wrote {args.json}: {len(results.load(args.json))} rows", highlight=False)
    if args.plot:
        _plot(results.load(args.json) if args.json else rows, args.plot, console)
    console.print(f"{len(rows)} measurements in {time.perf_counter() - start:.0f} s", highlight=False)
    return int(bad or stopped)


if __name__ == "__main__":
    sys.exit(main())
