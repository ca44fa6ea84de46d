"""Times: everything interleaved round-robin within one run, and the rate of the bare products beside it.

Machines are shared and clocks drift, so a time alone says little: providers and floor take turns, in an order that
rotates, and what is reported are the best and the median of the rounds and ratios within the run.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

import torch

from .cases import DTYPES, Case

__all__ = ["Floor", "Work", "floor_works", "interleave", "warm_up"]

#: A shorter measurement is repeated until it lasts this long.
MIN_SECONDS = 0.05
#: Shapes of the bare products' tiles; the fastest of them is the floor. Larger on CUDA, where a launch costs as much.
TILES = {"cpu": ((2048, 2048), (1024, 4096), (4096, 4096)), "cuda": ((8192, 8192), (4096, 16384))}
#: Tiles' worth of scores of one floor measurement: all of N = 8,192 on the CPU, a sample beyond.
FLOOR_SCORES = {"cpu": 16 * 2048**2, "cuda": 8 * 8192**2}


@dataclass
class Work:
    """Something to be timed.

    Parameters
    ----------
    run : callable
        Does it once.
    device : str
        Where.
    repeats : int
        Runs per measurement.
    flop : float
        Operations per run (the floor's only).
    """

    run: Callable[[], object]
    device: str
    repeats: int = 1
    flop: float = 0.0
    seconds: list[float] = field(default_factory=list)

    @property
    def best(self) -> float:
        """Seconds of the fastest round."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """Seconds of the middle round."""
        return median(self.seconds)

    def measure(self) -> float:
        """Seconds per run."""
        if torch.device(self.device).type != "cuda":
            start = time.perf_counter()
            for _ in range(self.repeats):
                self.run()
            return (time.perf_counter() - start) / self.repeats
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(self.repeats):
            self.run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / self.repeats


def warm_up(work: Work) -> float:
    """Runs it (twice where it is short), sets its repeats and returns the seconds of one measurement."""
    seconds = work.measure()
    if seconds < 1.0:
        seconds = work.measure()
    work.repeats = max(1, math.ceil(MIN_SECONDS / max(seconds, 1e-9)))
    return seconds * work.repeats


def interleave(works: list[Work], rounds: int, after: Callable[[], None] = lambda: None) -> None:
    """Measures each once a round; every round starts one further down the list. ``after`` is called after each."""
    with _no_collection():
        for turn in range(rounds):
            first = turn % len(works)
            for work in works[first:] + works[:first]:
                work.seconds.append(work.measure())
                after()


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@dataclass
class Floor:
    """The bare products of one shape of scores: by kind, timed like everything else."""

    works: dict[str, Work]
    tile: tuple[int, int]

    def seconds(self, case: Case) -> list[float]:
        """What the case's products alone take, round by round."""
        counts = {kind: count for kind, count in case.products.items() if count}
        rounds = zip(*(self.works[kind].seconds for kind in counts), strict=True)
        weights = [count * case.flop / self.works[kind].flop for kind, count in counts.items()]
        return [sum(w * s for w, s in zip(weights, row, strict=True)) for row in rounds]


def floor_works(case: Case) -> Floor:
    """Products of tiles as the whole problem has them, in the tile shape that turns out fastest.

    x yT fills a tile of scores, w y and wT x read one; the blocks of x and y are walked, the tile stays.
    """
    device = torch.device(case.device).type
    floors = {_clip(tile, case): _floor(case, _clip(tile, case), FLOOR_SCORES[device]) for tile in TILES[device]}
    if len(floors) == 1:
        return next(iter(floors.values()))
    times = {}
    for tile in floors:
        trial = _floor(case, tile, FLOOR_SCORES[device] // 4)
        times[tile] = sum(min(warm_up(w) / w.repeats, w.measure()) / w.flop for w in trial.works.values())
    return floors[min(times, key=lambda tile: times[tile])]


def _clip(tile: tuple[int, int], case: Case) -> tuple[int, int]:
    rows, columns = case.shape
    return min(tile[0], rows), min(tile[1], columns)


def _floor(case: Case, tile: tuple[int, int], scores: int) -> Floor:
    (rows, columns), (r, c) = case.shape, tile
    dtype, device = DTYPES[case.dtype], case.device
    x, y = (torch.randn(k, case.d, device=device).to(dtype) for k in (rows, columns))
    w = torch.randn(r, c, device=device).to(dtype)
    starts = [(i, j) for i in range(0, rows - r + 1, r) for j in range(0, columns - c + 1, c)]
    starts = starts[: max(1, scores // (r * c))]
    out, dx, dy = torch.empty_like(w), torch.empty_like(x[:r]), torch.empty_like(y[:c])

    def score() -> None:
        for i, j in starts:
            torch.mm(x[i : i + r], y[j : j + c].T, out=out)

    def w_y() -> None:
        for _, j in starts:
            torch.mm(w, y[j : j + c], out=dx)

    def wt_x() -> None:
        for i, _ in starts:
            torch.mm(w.T, x[i : i + r], out=dy)

    flop = 2.0 * len(starts) * r * c * case.d
    kinds = {"score": score, "w_y": w_y, "wT_x": wt_x}
    return Floor({kind: Work(run, device, flop=flop) for kind, run in kinds.items()}, tile)
