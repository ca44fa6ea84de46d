"""``python -m bench.kernels``: what a panel's parts cost on a GPU, apart from each other.

products    the two gradient products, as the driver adds them up, in panels of several shapes
tiles       the score kernels of the Triton backend, usual and persistent, in every tile that could serve; the best
            ones as lines of its tables
overlap     a whole pass over the panels: the statistics; weights and gradients, on one stream and on two; and how
            long the host takes to issue it, which bounds the pass from below
timeline    one step of several losses, kernel by kernel: time, launches, and what the GPU idles in between

Every figure goes into --json as it is found, and what is there of the same code, machine and versions is not measured
again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import contrastive_kernels as ck
from contrastive_kernels.backends import get
from contrastive_kernels.engine.driver import gradient_pass, statistics_pass
from contrastive_kernels.engine.gradients import Wanted
from contrastive_kernels.engine.matrix import Positives, ScoreMatrix
from contrastive_kernels.panels.panel import Side
from contrastive_kernels.panels.terms import EXPONENTIAL

from .cases import DTYPES, SOFTMAX_SCALE
from .measure import Work, interleave, warm_up
from .results import commit, describe_machine

__all__ = ["Log", "main"]

MIB = 2**20
#: Shapes of panels of 64 MiB of 16-bit weights or less: squarish ones, longer ones either way, and a thin one.
PANELS = (
    (5632, 5632),
    (5504, 5056),
    (4096, 8128),
    (8128, 4096),
    (4096, 4096),
    (2816, 11264),
    (2048, 16384),
    (512, 65472),
)
#: Rows and columns of the whole matrix that a panel is a part of.
MATRIX = 65536
#: Blocks that the products walk in turn: together they are larger than the L2 cache.
BLOCKS = 4


@dataclass
class Log:
    """Rows in a file, one for each thing that was measured; what has been measured is not measured again."""

    path: Path | None
    device: str
    deadline: float

    def __post_init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        if self.path is not None and self.path.exists():
            self.rows = json.loads(self.path.read_text())
        versions = f"torch {torch.__version__}"
        self.where = {"machine": describe_machine(self.device), "versions": versions, "commit": commit()}

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The row of this key from this code and machine, or None."""
        key = {**key, **self.where}
        return next((row for row in self.rows if key.items() <= row.items()), None)

    def add(self, **row: Any) -> dict[str, Any]:
        """Keeps a row, in the file too."""
        self.rows.append({**row, **self.where})
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(f".{os.getpid()}.part")
            partial.write_text("[\n" + ",\n".join(map(json.dumps, self.rows)) + "\n]\n")
            partial.replace(self.path)
        return self.rows[-1]

    def measured(self, works: dict[str, Callable[[], object]], rounds: int, **key: Any) -> dict[str, Any] | None:
        """The row of this key, with the best milliseconds of every work in turns; None where the time is up."""
        if (row := self.find(**key)) is not None:
            return row
        if time.monotonic() > self.deadline:
            print(f"no time for {key} and what follows", flush=True)
            return None
        timed = {name: Work(run, self.device) for name, run in works.items()}
        for work in timed.values():
            warm_up(work)
        interleave(list(timed.values()), rounds)
        return self.add(**key, ms={name: 1e3 * work.best for name, work in timed.items()})


# ---- products ----


def _add(sums: Tensor, weights: Tensor, block: Tensor) -> None:
    """sums += weights @ block, as the driver does it."""
    if weights.is_cuda and sums.dtype != weights.dtype:
        torch.addmm(sums, weights, block, out_dtype=torch.float32, out=sums)
    else:
        sums += weights @ block


def _in_turn(run: Callable[[int], object]) -> Callable[[], object]:
    """`run` of one block after the other."""
    count = 0

    def step() -> object:
        nonlocal count
        count += 1
        return run(count % BLOCKS)

    return step


def _ceilings(log: Log, side: int, dtype: torch.dtype, rounds: int) -> tuple[float, float] | None:
    """flop/s of one large square product, and bytes/s of a copy."""
    a, b = (torch.randn(side, side, device=log.device).to(dtype) for _ in range(2))
    out, source = torch.empty_like(a), torch.randn(4 * side * side, device=log.device)
    target = torch.empty_like(source)
    works: dict[str, Callable[[], object]] = {
        "product": lambda: torch.mm(a, b, out=out),
        "copy": lambda: target.copy_(source),
    }
    row = log.measured(works, rounds, what="ceilings", side=side, dtype=str(dtype))
    if row is None:
        return None
    rates = 2e3 * side**3 / row["ms"]["product"], 2e3 * source.nbytes / row["ms"]["copy"]
    print(f"one product of {side} x {side} x {side}: {rates[0] / 1e12:.0f} Tflop/s; a copy: {rates[1] / 1e12:.2f} TB/s")
    return rates


def _panel_works(rows: int, cols: int, d: int, dtype: torch.dtype, device: str) -> dict[str, Callable[[], object]]:
    """The products of a panel, by name: those with += add to float32 sums, the others round to `dtype`."""
    x, y = (normalize(torch.randn(k, d, device=device)).to(dtype) for k in (rows, BLOCKS * cols))
    w = torch.rand(rows, cols, device=device).to(dtype)
    dx, dy = torch.zeros(rows, d, device=device), torch.zeros(BLOCKS * cols, d, device=device)
    small_x, small_y = torch.empty_like(x), torch.empty_like(y[:cols])

    def part(v: Tensor, k: int) -> Tensor:
        return v[k * cols : (k + 1) * cols]

    return {
        "score": _in_turn(lambda k: torch.mm(x, part(y, k).T, out=w)),
        "w y": _in_turn(lambda k: torch.mm(w, part(y, k), out=small_x)),
        "wT x": lambda: torch.mm(w.T, x, out=small_y),
        "dx += w y": _in_turn(lambda k: _add(dx, w, part(y, k))),
        "dy += wT x": _in_turn(lambda k: _add(part(dy, k), w.T, x)),
    }


def products(args: argparse.Namespace, log: Log) -> None:
    """Times products of panels and prints what a whole matrix of them would take."""
    dtype = DTYPES[args.dtype]
    rates = _ceilings(log, args.ceiling, dtype, args.rounds)
    if rates is None:
        return
    names = ("score", "dx +=", "dy +=", "limit", "w y", "wT x", "Tflop/s", "whole ms")
    print(f"{'D':>5} {'panel':>15}", *(f"{name:>8}" for name in names))
    here = None if torch.cuda.is_available() else 90
    for d in args.d:
        own = ck.plan(MATRIX, d=d, dtype=dtype, device="cuda", backend="triton", capability=here).passes[-1].panel
        for rows, cols in dict.fromkeys(args.panels or [own, *PANELS]):
            works = _panel_works(rows, cols, d, dtype, log.device)
            row = log.measured(works, args.rounds, what="products", d=d, panel=[rows, cols], dtype=args.dtype)
            if row is None:
                return
            ms, flop = row["ms"], 2 * rows * cols * d
            limit = sum(_limit_ms(rates, r, c, d, dtype.itemsize) for r, c in ((rows, cols), (cols, rows)))
            both = ms["dx += w y"] + ms["dy += wT x"]
            figures = [ms["score"], ms["dx += w y"], ms["dy += wT x"], limit, ms["w y"], ms["wT x"]]
            print(f"{d:>5} {f'{rows:,} x {cols:,}':>15}", *(f"{figure:8.3f}" for figure in figures), end=" ")
            whole = both * MATRIX**2 / (rows * cols)
            print(f"{2e-9 * flop / both:8.0f} {whole:8.1f}", "(its own)" * ((rows, cols) == own), flush=True)
    print("ms of one panel; both += in Tflop/s, and what they take of all 65,536 x 65,536 scores")


def _limit_ms(rates: tuple[float, float], rows: int, cols: int, d: int, itemsize: int) -> float:
    """The larger of flop and bytes over their rates, of sums [rows, D] += weights [rows, cols] @ block [cols, D]."""
    moved = itemsize * (rows * cols + cols * d) + 8 * rows * d  # float32 sums in and out
    return 1e3 * max(2 * rows * cols * d / rates[0], moved / rates[1])


# ---- tiles ----


def _compile(job: tuple[str, str, int, str, tuple[int, ...]]) -> str | None:
    """Compiles one kernel into Triton's cache, by running it on a small panel; why that failed, or None."""
    from contrastive_kernels._triton import launch
    from contrastive_kernels._triton.configs import PersistentTile, Tile

    device, work, d, dtype, tile = job
    try:
        shape, more = tile[:5], dict(zip(("parts", "programs"), tile[5:]))
        made = PersistentTile(*shape, **more) if more else Tile(*shape)
        launch.probe(torch.device(device), work.split(",")[0], d, DTYPES[dtype], 64)(made)
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
    except Exception as error:  # a tile that cannot run is no failure: the timing meets it again
        return f"{type(error).__name__}: {error}"
    return None


def _compile_all(jobs: list[tuple[str, str, int, str, tuple[int, ...]]], processes: int) -> None:
    start, failed = time.monotonic(), 0
    try:
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            failed = sum(reason is not None for reason in pool.map(_compile, jobs))
    except BrokenProcessPool:  # a compiler may end its process; the timing then meets what is missing
        print("a process that compiles has died", flush=True)
    seconds = time.monotonic() - start
    print(f"compiled {len(jobs) - failed} kernels in {seconds:.0f} s; {failed} cannot run", flush=True)


def _values(tile: Any) -> tuple[int, ...]:
    persistent = (tile.parts, tile.programs) if hasattr(tile, "parts") else ()
    return (tile.block_m, tile.block_n, tile.block_k, tile.num_warps, tile.num_stages, *persistent)


def tiles(args: argparse.Namespace, log: Log) -> None:
    """Times every tile and prints the best ones as lines of the table."""
    from contrastive_kernels._triton import configs, launch, tuning

    device, dtype = torch.device(log.device), DTYPES[args.dtype]
    precision = launch.precision_of(dtype)
    capability = 90
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        capability = 10 * major + minor
    candidates = {}
    if "usual" in args.kinds:
        candidates = {work: tuning.candidates(capability, precision, work)[: args.limit] for work in configs.WORKS}
    for work in configs.WORKS if "persistent" in args.kinds else ():
        if persistent := tuning.persistent_candidates(capability, precision, work)[: args.limit]:
            candidates[tuning.persistently(work)] = persistent
    jobs = [(work, tile) for work, tried in candidates.items() for tile in tried]
    if args.processes > 1:
        new = [(w, t) for w, t in jobs if any(log.find(**_tile_key(args, w, d, t)) is None for d in args.d)]
        _compile_all([(log.device, work, args.d[0], args.dtype, _values(tile)) for work, tile in new], args.processes)
    in_time = all(
        _time_tile(args, log, work, d, tile, run)
        for d in args.d
        for work in candidates
        for run in [launch.probe(device, work.split(",")[0], d, dtype, args.side)]
        for tile in candidates[work]
    )
    if not in_time:
        print("what follows is of those that were measured")
    _print_tiles(args, log, candidates, configs.family(capability) or capability, precision)


def _time_tile(args: argparse.Namespace, log: Log, work: str, d: int, tile: Any, run: Callable[[Any], None]) -> bool:
    """Whether there was time for it."""
    key = _tile_key(args, work, d, tile)
    try:
        return log.measured({"panel": lambda: run(tile)}, args.rounds, **key) is not None
    except Exception as error:  # too much shared memory, or what a compiler may raise
        log.add(**key, ms={}, error=f"{type(error).__name__}: {str(error)[:200]}")
        return True


def _tile_key(args: argparse.Namespace, work: str, d: int, tile: Any) -> dict[str, Any]:
    return {"what": "tiles", "work": work, "d": d, "dtype": args.dtype, "side": args.side, "tile": [*_values(tile)]}


def _print_tiles(
    args: argparse.Namespace, log: Log, candidates: dict[str, list[Any]], family: int, precision: str
) -> None:
    """By kind of work the five best tiles (by time over the best time, mean over D), then the table's line."""
    line: list[str] = []
    for work, tried in candidates.items():
        kind, persistent = type(tried[0]).__name__, "persistent" in work
        found = {(tile, d): log.find(**_tile_key(args, work, d, tile)) for tile in tried for d in args.d}
        widths = [d for d in args.d if all(found[tile, d] is not None for tile in tried)]
        ms = {tile: [(found[tile, d] or {"ms": {}})["ms"].get("panel") for d in widths] for tile in tried}
        complete = {tile: times for tile, times in ms.items() if times and None not in times}
        if not complete:
            print(f"{work}: not measured")
            if not persistent:
                line.append(f"{kind}{_values(tried[0])}")
            continue
        best = [min(column) for column in zip(*complete.values(), strict=True)]
        slower = {t: sum(a / b for a, b in zip(found, best, strict=True)) / len(best) for t, found in complete.items()}
        order = sorted(slower, key=slower.__getitem__)
        own = tried[0]
        print(f"{work}: the table's is {slower.get(own, float('nan')):.3f} of the best at each D; ms at D = {widths}")
        for tile in order[:5]:
            print(f"    {kind}{_values(tile)}  {slower[tile]:.3f}  {', '.join(f'{ms:.3f}' for ms in complete[tile])}")
        if persistent:
            *shape, parts, programs = _values(order[0])
            named = f"{', '.join(map(str, shape))}, parts={parts}, programs={programs}"
            print(f'({family}, "{precision}", "{work.split(",")[0]}", "exponential"): {kind}({named}),')
        else:
            line.append(f"{kind}{_values(order[0])}")
    print(f'({family}, "{precision}"): ({", ".join(line)}),', flush=True)


# ---- overlap ----


def overlap(args: argparse.Namespace, log: Log) -> None:
    """Times whole passes over the panels: statistics, then weights and gradients on one stream and on two."""
    dtype = DTYPES[args.dtype]
    cuda = torch.device(log.device).type == "cuda"
    for d in args.d:
        x, y = (normalize(torch.randn(args.n, d, device=log.device)).to(dtype) for _ in range(2))
        params = torch.tensor([SOFTMAX_SCALE, 0.0, 0.0], device=log.device)
        normalizer = torch.tensor([[9.0], [0.0]], device=log.device).repeat(1, args.n)
        side = Side(None, normalizer, torch.full_like(normalizer[0], 1 / args.n))
        matrix = ScoreMatrix(EXPONENTIAL, x, y, params, Positives(0), get(args.backend), 64 * MIB)

        def weighing(
            workspace: int, overlaps: bool, matrix: ScoreMatrix = matrix, side: Side = side
        ) -> Callable[[], object]:
            walked = replace(matrix, workspace_bytes=workspace * MIB, overlap=overlaps)
            return lambda: gradient_pass(walked, side, side, Wanted(True, True, True))

        works: dict[str, Callable[[], object]] = {
            "reduce": lambda matrix=matrix: statistics_pass(matrix, cols=True),  # type: ignore[misc]
            "weigh": weighing(64, False),
        }
        if cuda:
            works |= {
                "weigh, two streams": weighing(64, True),
                "weigh, two streams, twice the workspace": weighing(128, True),
                "weigh, twice the workspace": weighing(128, False),
            }
        row = log.measured(works, args.rounds, what="overlap", n=args.n, d=d, dtype=args.dtype, backend=args.backend)
        if row is None:
            return
        flop = 2 * args.n**2 * d
        for name, ms in row["ms"].items():
            rate = 1e-9 * (1 if name == "reduce" else 3) * flop / ms
            issued = _issue_ms(works[name], log.device)
            print(
                f"N = {args.n:,}, D = {d}, {name}: {ms:.2f} ms, {rate:.0f} Tflop/s; issued in {issued:.2f}", flush=True
            )


def _issue_ms(run: Callable[[], object], device: str) -> float:
    """Milliseconds that the host takes to start a pass on an idle GPU."""
    cuda, times = torch.device(device).type == "cuda", []
    for _ in range(3):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return min(times)


# ---- the command ----


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _panels(text: str) -> list[tuple[int, int]]:
    pairs = (part.split("x") for part in text.split(","))
    return [(int(rows), int(cols)) for rows, cols in pairs]


_KINDS = ("usual", "persistent")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("products", "tiles", "overlap", "timeline"))
    parser.add_argument("--d", type=_numbers, default=[768, 512], metavar="D,...", help="feature widths (768,512)")
    parser.add_argument("--dtype", default="bfloat16", help=", ".join(DTYPES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--seconds", type=float, default=120.0, help="nothing is begun later")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--panels", type=_panels, metavar="RxC,...", help="products: instead of the usual shapes")
    parser.add_argument("--ceiling", type=int, default=8192, help="products: side of the square product")
    parser.add_argument("--side", type=int, default=8192, help="tiles: rows and columns of the panel")
    parser.add_argument("--limit", type=int, help="tiles: only so many")
    parser.add_argument("--kinds", nargs="+", choices=_KINDS, default=_KINDS, help="tiles: of which programs (all)")
    parser.add_argument("--processes", type=int, default=1, help="tiles: that compile beforehand")
    parser.add_argument("--n", type=int, default=MATRIX, help="overlap: rows and columns; timeline: at most")
    parser.add_argument("--backend", default="triton", help="overlap, timeline: the backend")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, stores."""
    args = _parser().parse_args(argv)
    from .timeline import timeline

    log = Log(args.json, args.device, time.monotonic() + args.seconds)
    stages: dict[str, Callable[[argparse.Namespace, Log], None]] = {
        "products": products,
        "tiles": tiles,
        "overlap": overlap,
        "timeline": timeline,
    }
    stages[args.what](args, log)
    return 0


if __name__ == "__main__":
    sys.exit(main())
