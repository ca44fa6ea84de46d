"""A problem whose optimum is known: minibatch InfoNCE misses it at every batch size, the decomposable loss does not.

    python examples/synthetic.py                                     the whole grid, two minutes
    python examples/synthetic.py --noise 1 --batch 16 --runs 10 --json synthetic.json

One parameter theta. An anchor's positive has the score theta, its negatives theta * x + noise * eta with x and eta
standard normal, fresh at every step; no positive in the denominator, and the mean over negatives in it. The loss over
all negatives is -theta + theta^2 / 2 + noise^2 / 2, whose minimum is at 1 whatever the noise. 256 anchors, 64 a step,
6,000 steps of gradient descent from ten starts; the result is the mean over the last quarter.

Methods: ``conventional`` is InfoNCE of each batch; ``decomposable`` draws u from a memory of the negatives' means.
Where the noise is so strong that single negatives outweigh all others, three more: ``mean u`` does not draw u, which is
as unbiased and scatters less; ``bounded`` also keeps u Z below 300, which takes E[(u Z - 300)+] from the weights (the
column "bound took"); ``stored Z`` remembers normalisers, positive and all, which lag behind theta.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from files import write_figure, write_json
from options import NOT_NEGATIVE, SEED, SIZE, Distinct, at_least, output_file, run
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

import contrastive_kernels as ck

__all__ = ["METHODS", "Result", "simulate"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a decomposable run weighs an anchor: u's gamma shape (None: its mean), a bound of u Z, what it remembers."""

    shape: float | None = 1.0
    max_ratio: float = math.inf
    remembers_positive: bool = False


METHODS: dict[str, Rule | None] = {
    "conventional": None,
    "decomposable": Rule(),
    "mean u": Rule(None),
    "bounded": Rule(None, max_ratio=300.0),
    "stored Z": Rule(remembers_positive=True),
}
USUAL = ("conventional", "decomposable")
NOISES, BATCHES = (0.0, 1.0, 1.5, 2.0), (4, 16, 64)
ANCHORS, ANCHORS_A_STEP = 256, 64
STEPS, LEARNING_RATE, HALVED_AFTER = 6000, 0.02, 1000
STARTS, LIMITS = (-1.0, 3.0), (-3.0, 6.0)  # a run that diverges is kept at the limit
MEMORY_STEP = 0.6
RECORD_EVERY = 20
COLOURS = {
    "conventional": "tab:blue",
    "decomposable": "tab:red",
    "mean u": "tab:orange",
    "bounded": "tab:green",
    "stored Z": "tab:gray",
}


@dataclasses.dataclass(frozen=True)
class Result:
    """One run: where it ended, how far it came, and the part of its row weights that the bound took away."""

    method: str
    noise: float
    batch: int
    seed: int
    final: float
    lowest: float
    highest: float
    bound_took: float
    path: list[float]

    def as_row(self) -> dict[str, object]:
        """For JSON, without the path."""
        row = dataclasses.asdict(self)
        del row["path"]
        return row


class _Runs:
    """All runs of one method, noise and batch size, at once: theta [R]."""

    def __init__(self, method: str, starts: Tensor, generator: torch.Generator) -> None:
        self.method, self.rule = method, METHODS[method]
        self.theta, self.generator = starts.clone(), generator
        self.memory = ck.NormalizerMemory(len(starts) * ANCHORS, directions=1, step=MEMORY_STEP)
        self.took = torch.zeros(len(starts))
        self.path: list[Tensor] = []
        self.lowest, self.highest = starts.clone(), starts.clone()

    def step(self, rows: Tensor, x: Tensor, eta: Tensor, rate: float) -> None:
        """One step for the anchors `rows` [A] with negatives x, eta [R, A, B] (eta has the noise's strength)."""
        scores = self.theta[:, None, None] * x + eta
        total = scores.logsumexp(2)  # [R, A]
        share = torch.exp(scores - total[..., None])
        pull = (share * x).sum(2) - 1  # of one anchor: d(log Z)/d(theta)
        ratio = torch.ones_like(total)  # u Z
        if self.rule is not None:
            found = total - math.log(x.shape[2])
            if self.rule.remembers_positive:
                found = found - self.theta[:, None]
            ratio = self._ratio(rows, found, self.rule.shape)
            kept = ratio.clamp(max=self.rule.max_ratio)
            self.took += (ratio - kept).mean(1)
            ratio = kept
        self.theta = (self.theta - rate * (ratio * pull).mean(1)).clamp(*LIMITS)
        self.lowest, self.highest = torch.minimum(self.lowest, self.theta), torch.maximum(self.highest, self.theta)

    def _ratio(self, rows: Tensor, found: Tensor, shape: float | None) -> Tensor:
        """u Z of every anchor from the normalisers stored before this step [R, A]; moves the memory."""
        index = (torch.arange(len(found))[:, None] * ANCHORS + rows).flatten()
        stored, visits = self.memory.read(index)
        stored = torch.where(visits == 0, found.flatten()[:, None], stored.to(found))[:, 0]
        log_weight = ck.reference.draw_log_weights(stored, shape, self.generator)
        self.memory.update(index, found.flatten()[:, None])
        return torch.exp(found.flatten() - stored + log_weight).view(found.shape)


def simulate(
    noise: float, batch: int, runs: int, methods: Sequence[str] = USUAL, seed: int = 0, steps: int = STEPS
) -> Iterator[int | list[Result]]:
    """Runs all methods side by side on the same negatives; yields the steps done, and the results at last."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.empty(runs).uniform_(*STARTS, generator=generator)
    groups = [_Runs(method, starts, torch.Generator().manual_seed(seed + 1)) for method in methods]
    finals = [torch.zeros(runs) for _ in groups]

    for step in range(steps):
        rows = torch.randperm(ANCHORS, generator=generator)[:ANCHORS_A_STEP]
        x, eta = torch.randn(2, runs, ANCHORS_A_STEP, batch, generator=generator)
        rate = LEARNING_RATE / (1 + step / HALVED_AFTER)
        for group, final in zip(groups, finals):
            group.step(rows, x, noise * eta, rate)
            if step % RECORD_EVERY == 0:
                group.path.append(group.theta)
            if step >= steps - steps // 4:
                final += group.theta / (steps // 4)
        if step % 100 == 99:
            yield step + 1
    yield [
        Result(
            group.method, noise, batch, seed * runs + run, float(final[run]), float(group.lowest[run]),
            float(group.highest[run]), float(group.took[run]) / steps, [float(theta[run]) for theta in group.path],
        )
        for group, final in zip(groups, finals)
        for run in range(runs)
    ]  # fmt: skip


def summary(results: Sequence[Result]) -> Table:
    """A line per method and setting."""
    table = Table("noise", "B", "method", "mean", "least", "greatest", "within 0.05 of 1", "bound took")
    for key in dict.fromkeys((r.noise, r.batch, r.method) for r in results):
        rows = [r for r in results if (r.noise, r.batch, r.method) == key]
        finals = [r.final for r in rows]
        near = sum(abs(final - 1) <= 0.05 for final in finals)
        took = f"{sum(r.bound_took for r in rows) / len(rows):.4f}" if any(r.bound_took for r in rows) else ""
        table.add_row(
            f"{key[0]:g}", str(key[1]), key[2], f"{sum(finals) / len(finals):.3f}", f"{min(finals):.3f}",
            f"{max(finals):.3f}", f"{near} of {len(rows)}", took,
        )  # fmt: skip
    return table


def draw(results: Sequence[Result], path: Path) -> None:
    """Trajectories: a panel per noise and batch size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    noises, batches = (sorted({getattr(r, name) for r in results}) for name in ("noise", "batch"))
    size = (2.9 * len(batches) + 0.6, 2.2 * len(noises) + 0.6)
    figure, axes = pyplot.subplots(len(noises), len(batches), figsize=size, sharex=True, sharey=True, squeeze=False)
    for r in results:
        axis = axes[noises.index(r.noise)][batches.index(r.batch)]
        steps = [RECORD_EVERY * i for i in range(len(r.path))]
        axis.plot(steps, r.path, color=COLOURS[r.method], linewidth=0.7, alpha=0.8)
    for i, noise in enumerate(noises):
        for j, batch in enumerate(batches):
            axes[i][j].axhline(1.0, color="black", linewidth=0.8, linestyle=":")
            axes[i][j].set_title(f"noise {noise:g}, B = {batch}", fontsize=9)
            axes[i][j].set_ylim(-1.2, 6.2)
    methods = [m for m in METHODS if any(r.method == m for r in results)]
    handles = [Line2D([], [], color=COLOURS[m], label=m) for m in methods]
    figure.legend(handles=handles, loc="lower center", ncol=len(handles), frameon=False, fontsize=9)
    figure.supylabel(r"$\theta$")
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    write_figure(path, figure, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """The command: settings one after the other, a table, JSON and a picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", type=NOT_NEGATIVE, nargs="+", action=Distinct, default=NOISES)
    parser.add_argument("--batch", type=SIZE, nargs="+", action=Distinct, default=BATCHES)
    parser.add_argument("--runs", type=SIZE, default=10)
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--steps", type=at_least(4), default=STEPS)
    parser.add_argument(
        "--methods", nargs="+", action=Distinct, choices=METHODS, help="default: two, and all from noise 2 on"
    )
    parser.add_argument("--json", type=output_file, help="write a row per run")
    parser.add_argument("--png", type=output_file, help="draw the trajectories")
    arguments = parser.parse_args()
    settings = [(noise, batch) for noise in arguments.noise for batch in arguments.batch]
    console, results = Console(width=None if sys.stdout.isatty() else 120), list[Result]()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(settings) * arguments.steps)
        for i, (noise, batch) in enumerate(settings):
            progress.update(task, description=f"noise {noise:g}, B = {batch}")
            methods = arguments.methods or (list(METHODS) if noise >= 2 else list(USUAL))
            for news in simulate(noise, batch, arguments.runs, methods, arguments.seed, arguments.steps):
                if isinstance(news, int):
                    progress.update(task, completed=i * arguments.steps + news)
                else:
                    results += news
    console.print(summary(results))
    if arguments.json:
        write_json(arguments.json, [r.as_row() for r in results])
    if arguments.png:
        draw(results, arguments.png)


if __name__ == "__main__":
    run(main)
