"""Runs: every provider of a group of cases is checked, warmed up, checked again and then timed in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .cases import Case, Inputs, make_inputs, precision
from .check import CHECK_ROWS, Projection, Verdict, check_small, evaluate, project
from .measure import Floor, Work, floor_works, interleave, warm_up
from .memory import measure_peak
from .providers import Provider
from .results import Row, new_row

__all__ = ["Pair", "Session", "grouped"]

Pair = tuple[Case, Provider]

#: Most rounds of a group, and the seconds that it may take where no number of rounds is asked for.
MAX_ROUNDS, GROUP_SECONDS = 15, {"cpu": 12.0, "cuda": 4.0}


def grouped(pairs: Iterable[Pair]) -> list[list[Pair]]:
    """Pairs of one shape of scores, dtype and device together: they share the floor and take turns."""
    groups: dict[tuple[object, ...], list[Pair]] = {}
    for case, provider in pairs:
        groups.setdefault((case.shape, case.d, case.dtype, case.device), []).append((case, provider))
    return list(groups.values())


@dataclass
class _Entry:
    """One provider at one case on its way through a group."""

    case: Case
    provider: Provider
    inputs: Inputs
    forward: Callable[[], Tensor]
    work: Work
    verdict: Verdict
    value: Tensor | None = None

    def step(self) -> None:
        self.value = evaluate(self.forward, self.inputs, self.case.mode)


@dataclass
class Session:
    """What one invocation shares.

    Parameters
    ----------
    threads : int
        Threads of torch.
    rounds : int, optional
        Rounds of every group; None: as many as fit into ``GROUP_SECONDS``.
    min_rounds : int
        Fewest rounds that are chosen so.
    say : callable
        Told what is going on.
    """

    threads: int
    rounds: int | None = None
    min_rounds: int = 3
    say: Callable[[str], None] = lambda text: None
    _verdicts: dict[tuple[str, Case], Verdict | str] = field(default_factory=dict)

    def time_group(self, pairs: list[Pair]) -> list[Row]:
        """Rows of one group, in the order of ``pairs``; wrong and failed providers have a reason and no time."""
        with precision(pairs[0][0]):
            return self._time_group(pairs)

    def _time_group(self, pairs: list[Pair]) -> list[Row]:
        first = pairs[0][0]
        rows: dict[Pair, Row] = {}
        entries: list[_Entry] = []
        inputs: dict[Case, Inputs] = {}
        projections: dict[Case, Projection | None] = {}
        for case, provider in pairs:
            if case not in inputs:
                inputs[case] = make_inputs(case)
                self.say(f"{case.title}: truth at full size")
                projections[case] = project(case, inputs[case])
            entry = self._admit(case, provider, inputs[case], projections[case])
            if isinstance(entry, _Entry):
                entries.append(entry)
            else:
                rows[case, provider] = entry
        if entries:
            floor = self._time(first, entries)
            rows.update({(e.case, e.provider): _timed_row(e, floor) for e in entries})
        return [rows[pair] for pair in pairs]

    def _admit(self, case: Case, provider: Provider, inputs: Inputs, projection: Projection | None) -> _Entry | Row:
        """An entry that is right at the small size and at this one, warmed up; or the row that says what is wrong."""
        self.say(f"{case.title}: checking {provider.name}")
        verdict = self._check(case, provider)
        if isinstance(verdict, str):
            return new_row(case, provider, status="failed", reason=verdict)
        if not verdict.ok:
            return _wrong_row(case, provider, verdict)
        self.say(f"{case.title}: warming up {provider.name}")
        try:
            entry = _Entry(
                case, provider, inputs, provider.build(case, inputs), Work(lambda: None, case.device), verdict
            )
            entry.work.run = entry.step
            warm_up(entry.work)
        except Exception as error:  # a peer may raise anything; the row says what
            return new_row(case, provider, status="failed", reason=_first_line(error))
        if projection is not None and entry.value is not None:
            at_full_size = projection.check(provider, entry.value, inputs, case.dtype)
            if not at_full_size.ok:
                return _wrong_row(case, provider, at_full_size)
            entry.verdict = max(verdict, at_full_size, key=lambda v: v.error)
        return entry

    def _check(self, case: Case, provider: Provider) -> Verdict | str:
        """The verdict at the small size, once per session; or what the provider raised."""
        key = (provider.name, case.smaller(CHECK_ROWS))
        if key not in self._verdicts:
            try:
                self._verdicts[key] = check_small(provider, case)
            except Exception as error:
                self._verdicts[key] = _first_line(error)
        return self._verdicts[key]

    def _time(self, first: Case, entries: list[_Entry]) -> Floor:
        """Times all entries and the floor's products in turns."""
        self.say(f"{first.title}: the bare products")
        floor = floor_works(first)
        works = [*floor.works.values(), *(entry.work for entry in entries)]
        expected = sum(warm_up(work) for work in works)
        seconds = GROUP_SECONDS[torch.device(first.device).type]
        rounds = self.rounds or min(max(int(seconds / expected), self.min_rounds), MAX_ROUNDS)
        done = 0

        def after() -> None:
            nonlocal done
            done += 1
            self.say(f"{first.title}: round {min(done // len(works) + 1, rounds)} of {rounds}")

        interleave(works, rounds, after)
        return floor

    def memory_row(self, case: Case, provider: Provider) -> Row:
        """Peak memory of one provider, in a process of its own; checked like a time."""
        self.say(f"{case.title}: memory of {provider.name}")
        with precision(case):
            return self._memory_row(case, provider)

    def _memory_row(self, case: Case, provider: Provider) -> Row:
        verdict = self._check(case, provider)
        if isinstance(verdict, str):
            return new_row(case, provider, status="failed", reason=verdict)
        if not verdict.ok:
            return _wrong_row(case, provider, verdict)
        try:
            peak = measure_peak(provider.name, case, self.threads)
        except Exception as error:
            return new_row(case, provider, status="failed", reason=_first_line(error))
        return new_row(case, provider, status="ok", peak_bytes=peak.peak, kept_bytes=peak.kept)


def _timed_row(entry: _Entry, floor: Floor) -> Row:
    seconds = floor.seconds(entry.case)
    return new_row(
        entry.case,
        entry.provider,
        status="ok",
        best_s=entry.work.best,
        median_s=entry.work.median,
        rounds=len(entry.work.seconds),
        floor_s=min(seconds),
        floor_products=sum(entry.case.products.values()),
        floor_tile=list(floor.tile),
        floor_ratio=min(seconds) / entry.work.best,
        error=entry.verdict.error,
        tolerance=entry.verdict.tolerance,
    )


def _wrong_row(case: Case, provider: Provider, verdict: Verdict) -> Row:
    return new_row(
        case, provider, status="wrong", reason=str(verdict), error=verdict.error, tolerance=verdict.tolerance
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:200]
