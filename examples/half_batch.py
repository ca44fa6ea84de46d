"""Half the batch, as good a model? The conventional loss at batch B against the decomposable one at B / 2 and B / 4.

    python examples/half_batch.py --json half_batch.json --png half_batch.png      five seeds, some five minutes

Two small towers learn characters and their names (``glyphs.py``), with the same initial weights, optimiser, learning
rate, temperature and number of pictures seen; only loss and batch size differ. The towers do not couple the rows of a
batch (layer norms, no batch norms), so that a batch's size enters through the loss alone. Reported: recall@1 among the
held-out characters, the mean of both directions, and zero-shot accuracy of the script, with 95 % confidence intervals
over seeds; differences to the conventional loss at B are paired by seed.

Methods: ``conventional`` is InfoNCE among the batch; ``stored`` the decomposable loss over the whole data set, weighed
by what the memory held before the batch (no bias, most variance); ``updated`` has the batch in the memory's average, as
SogCLR has (bounded variance, some bias); ``own`` is the control that tells a larger K from a better normaliser: the
batch's own normaliser, as in the conventional loss, but with its negatives standing for all of the data set's.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from evaluate import evaluate
from files import Mistake, RowFile, write_figure
from glyphs import BatchSampler, GlyphData, load_glyphs
from objectives import dense_clip_loss
from options import SEED, SIZE, Distinct, at_least, output_file
from options import run as run_command
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from towers import Captions, TwoTowers

import contrastive_kernels as ck

__all__ = ["FIXED", "METHODS", "Run", "Temperature", "Towers", "interval", "run", "train_all", "train_towers"]

T = TypeVar("T")

BUCKETS, DIM, WIDTH = 4096, 64, 128
LOGIT_SCALE = 1 / 0.07
LEARNING_RATE, WEIGHT_DECAY, WARM_UP = 2e-3, 0.1, 0.1
BATCH, SEEDS, SAMPLES = 64, 5, 60_000

#: Options of ``DecomposableContrastiveLoss`` by name; None: the conventional loss of the batch.
METHODS: dict[str, dict[str, Any] | None] = {
    "conventional": None,
    "stored": {},
    "updated": {"weights": "updated", "floor": 0.6},
    "own": {"weights": "batch"},
}


class _Caption(nn.Module):
    """The sum of hashed n-grams' vectors and one hidden layer, with fewer buckets than the large model has."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(BUCKETS, DIM, mode="sum")
        nn.init.normal_(self.table.weight, std=0.1)
        self.head = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, WIDTH), nn.GELU(), nn.Linear(WIDTH, DIM))

    def forward(self, captions: tuple[Tensor, Tensor]) -> Tensor:
        """Captions as ``Captions`` gives them -> [N, DIM], not normalised."""
        grams, start = captions
        return self.head(self.table(grams % BUCKETS, start))


class Towers(TwoTowers):
    """Two towers, small, in which no row of a batch sees another."""

    def __init__(self) -> None:
        super().__init__(DIM, LOGIT_SCALE)
        hidden = [nn.Linear(1024, WIDTH), nn.LayerNorm(WIDTH), nn.GELU()]
        hidden += [nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.GELU()]
        self.add_module("image", nn.Sequential(nn.Flatten(), *hidden, nn.Linear(WIDTH, DIM)))
        self.add_module("text", _Caption())
        self.log_logit_scale.requires_grad_(False)
        self.logit_bias.requires_grad_(False)


@dataclasses.dataclass(frozen=True)
class Temperature:
    """What the scale does during training, and what that does to the memory.

    Parameters
    ----------
    start : float
        The scale of the first step; it rises in equal ratios to ``LOGIT_SCALE`` at half of the steps.
    learnable : bool
        Whether the scale is a parameter, without weight decay.
    rescale : bool
        Whether the memory's logarithms follow the scale before every step (``NormalizerMemory.rescale``).
    """

    start: float = LOGIT_SCALE
    learnable: bool = False
    rescale: bool = False

    @torch.no_grad()
    def move(self, towers: Towers, loss_fn: ck.DecomposableContrastiveLoss | None, before: float, part: float) -> float:
        """Sets the scale after a `part` of all steps, in 0 ... 1; the memory's last one was `before`; returns it."""
        if self.start != LOGIT_SCALE:
            left = max(0.0, 1 - 2 * part)
            towers.log_logit_scale.fill_(math.log(LOGIT_SCALE) + left * math.log(self.start / LOGIT_SCALE))
        scale = float(towers.logit_scale)
        if self.rescale and loss_fn is not None and scale != before:
            loss_fn.memory.rescale(scale / before)
        return scale


FIXED = Temperature()


def train_towers(
    data: GlyphData,
    captions: Captions,
    method: str,
    batch: int,
    seed: int,
    samples: int,
    temperature: Temperature = FIXED,
    **options: Any,
) -> tuple[Towers, ck.DecomposableContrastiveLoss | None]:
    """Towers after so many pictures, and their loss if it has a memory; `options` go before those of METHODS."""
    torch.manual_seed(seed)
    towers = Towers()
    characters = data.characters("train")
    place = np.full(len(data.codepoints), -1)
    place[characters] = np.arange(len(characters))
    chosen = METHODS[method]
    loss_fn = None if chosen is None else ck.DecomposableContrastiveLoss(len(characters), **{**chosen, **options})
    sampler = BatchSampler(data, batch, seed=seed, max_shift=1)
    if sampler.batch < batch:
        raise Mistake(f"--batch: expected at most {sampler.batch}, each character once, got {batch}")
    steps = samples // batch
    parameters = [p for p in towers.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY, fused=True
    )
    if temperature.learnable:
        towers.log_logit_scale.requires_grad_(True)
        optimizer.add_param_group({"params": [towers.log_logit_scale], "weight_decay": 0.0})
    scale = float(towers.logit_scale.detach())
    for step in range(steps):
        scale = temperature.move(towers, loss_fn, scale, step / steps)
        warm = min(1.0, (step + 1) / (WARM_UP * steps))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        drawn = sampler[step]
        x = towers.encode_images(torch.from_numpy(drawn.images[0]))
        y = towers.encode_captions(captions[torch.from_numpy(drawn.characters)])
        if loss_fn is None:
            loss = dense_clip_loss(x, y, towers.logit_scale)
        else:
            loss = loss_fn(x, y, torch.from_numpy(place[drawn.characters]), towers.logit_scale)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        towers.clamp_logit_scale()
    return towers.eval(), loss_fn


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run; parts of 1. `recall` is the mean of recall@1 of both directions.

    `effective_rows` and `scatter` are the memory's at the end: E[r]^2 / E[r^2] and the standard deviation of log r.
    """

    method: str
    batch: int
    seed: int
    samples: int
    recall: float
    validation_recall: float
    zero_shot: float
    effective_rows: float | None
    seconds: float
    scatter: float | None = None
    logit_scale: float = LOGIT_SCALE


@cache
def _data() -> tuple[GlyphData, Captions]:
    data = load_glyphs(progress=False)
    return data, Captions(data.captions)


def run(method: str, batch: int, seed: int, samples: int, temperature: Temperature = FIXED, **options: Any) -> Run:
    """Trains and scores one model, on one thread."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    data, captions = _data()
    towers, loss = train_towers(data, captions, method, batch, seed, samples, temperature, **options)
    seconds = time.perf_counter() - started
    test, validation = evaluate(towers, data, "test"), evaluate(towers, data, "validation")
    effective, scatter = None, None
    if loss is not None:
        statistics = loss.memory.statistics()
        effective, scatter = sum(statistics.effective) / 2, sum(statistics.log_ratio_std) / 2
    recall, validation_recall = ((s.image_to_text[1] + s.text_to_image[1]) / 2 for s in (test, validation))
    scale = float(towers.logit_scale.detach())
    return Run(
        method, batch, seed, samples, recall, validation_recall, test.zero_shot, effective, seconds, scatter, scale
    )


def plan(batch: int) -> list[tuple[str, int]]:
    """(method, batch size) of B, B / 2 and B / 4, as far as a comparison needs them; the most telling first."""
    half, quarter = batch // 2, batch // 4
    return [
        ("conventional", batch), ("updated", half), ("conventional", half), ("own", half),
        ("stored", half), ("own", batch), ("updated", quarter), ("conventional", quarter),
    ]  # fmt: skip


#: Student's t, two-sided 95 %, by degrees of freedom; beyond 9, 2.2.
_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % confidence interval."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return mean, _T.get(len(values) - 1, 2.2) * math.sqrt(variance / len(values))


def differences(runs: Sequence[Run], method: str, batch: int, name: str) -> list[float]:
    """By seed, a method's score less that of the conventional loss at the largest batch."""
    largest = max(r.batch for r in runs if r.method == "conventional")
    base = {r.seed: getattr(r, name) for r in runs if (r.method, r.batch) == ("conventional", largest)}
    rows = [r for r in runs if (r.method, r.batch) == (method, batch) and r.seed in base]
    return [getattr(r, name) - base[r.seed] for r in rows]


def summary(runs: Sequence[Run]) -> Table:
    """A line per method and batch size, with 95 % intervals and paired differences."""
    table = Table("method", "B", "seeds", "recall@1, %", "difference", "zero-shot, %", "difference", "effective rows")
    for method, batch in dict.fromkeys((r.method, r.batch) for r in runs):
        rows = [r for r in runs if (r.method, r.batch) == (method, batch)]
        cells = []
        for name in ("recall", "zero_shot"):
            mean, width = interval([100 * getattr(r, name) for r in rows])
            change, change_width = interval([100 * d for d in differences(runs, method, batch, name)] or [math.nan])
            cells += [f"{mean:.1f} ± {width:.1f}", f"{change:+.1f} ± {change_width:.1f}"]
        effective = [r.effective_rows for r in rows if r.effective_rows is not None]
        share = f"{sum(effective) / len(effective):.0%}" if effective else ""
        table.add_row(method, str(batch), str(len(rows)), *cells, share)
    return table


def draw(runs: Sequence[Run], path: Path) -> None:
    """Both scores against the batch size, with 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {"conventional": "tab:blue", "stored": "tab:orange", "updated": "tab:red", "own": "tab:green"}
    figure, axes = pyplot.subplots(1, 2, figsize=(9.0, 3.6))
    for axis, (name, title) in zip(axes, (("recall", "recall@1, %"), ("zero_shot", "zero-shot script, %"))):
        for k, method in enumerate(dict.fromkeys(r.method for r in runs)):
            sizes = sorted({r.batch for r in runs if r.method == method})
            points = [[100 * getattr(r, name) for r in runs if (r.method, r.batch) == (method, b)] for b in sizes]
            means, widths = zip(*(interval(p) for p in points))
            places = [b * 1.03 ** (k - 1) for b in sizes]  # side by side
            axis.errorbar(places, means, widths, marker="o", capsize=3, label=method, color=colours.get(method))
        base = [r for r in runs if r.method == "conventional"]
        largest = [100 * getattr(r, name) for r in base if r.batch == max(r.batch for r in base)]
        axis.axhline(interval(largest)[0], color="tab:blue", linewidth=0.8, linestyle=":")
        axis.set(xscale="log", xlabel="batch size", title=title)
        ticks = sorted({r.batch for r in runs})
        axis.set_xticks(ticks, [str(b) for b in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    write_figure(path, figure, dpi=110)
    pyplot.close(figure)


def train_all(work: Callable[..., T], jobs: Sequence[tuple[Any, ...]], processes: int) -> Iterator[T]:
    """The work on every job (its arguments), a few at a time, in whichever order they end."""
    load_glyphs(progress=False)  # drawn once, before the processes want it
    if processes == 1:
        yield from (work(*job) for job in jobs)
        return
    with ProcessPoolExecutor(processes) as pool:
        for done in as_completed([pool.submit(work, *job) for job in jobs]):
            yield done.result()


def main() -> None:
    """The command: all seeds, a table, JSON and a picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=at_least(8), default=BATCH, help="B of the conventional loss")
    parser.add_argument("--seeds", type=SIZE, default=SEEDS)
    parser.add_argument("--first-seed", type=SEED, default=0)
    parser.add_argument("--samples", type=SIZE, default=SAMPLES, help="pictures that every run sees")
    parser.add_argument("--methods", nargs="+", action=Distinct, choices=METHODS, default=list(METHODS))
    parser.add_argument("--processes", type=SIZE, default=2)
    parser.add_argument("--json", type=output_file, help="write a row per run; runs that it holds are not repeated")
    parser.add_argument("--png", type=output_file, help="draw the scores")
    arguments = parser.parse_args()
    settings = [s for s in plan(arguments.batch) if s[0] in ("conventional", *arguments.methods)]
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    if arguments.samples < arguments.batch:
        parser.error(f"--samples: expected at least a batch of {arguments.batch}, got {arguments.samples}")
    kept = RowFile(arguments.json, {field.name for field in dataclasses.fields(Run)})
    runs = [Run(**row) for row in kept.read()]
    wanted = [(*setting, seed, arguments.samples) for setting in settings for seed in seeds]
    held = {(r.method, r.batch, r.seed, r.samples) for r in runs}
    jobs = [job for job in wanted if job not in held]
    console = Console(width=None if sys.stdout.isatty() else 120)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("training", total=len(wanted), completed=len(wanted) - len(jobs))
        for new in train_all(run, jobs, arguments.processes):
            runs.append(new)
            progress.update(task, advance=1, description=f"{new.method}, B = {new.batch}: {new.recall:.1%}")
            kept.add([dataclasses.asdict(new)])
    runs.sort(key=lambda r: (list(METHODS).index(r.method), -r.batch, r.seed))
    console.print(summary(runs))
    if arguments.png:
        draw(runs, arguments.png)
    kept.finish()


if __name__ == "__main__":
    run_command(main)
