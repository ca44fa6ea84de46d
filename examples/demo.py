"""What ``make demo`` runs: the fused CLIP loss on real image-text pairs, beside the dense formula.

python examples/demo.py               about two minutes on two cores, the longest part being the training
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evaluate import encode_pictures, encode_texts, evaluate, ranks
from files import write_figure, write_json
from glyphs import GlyphData, load_glyphs
from loss_cost import Cost, loss_costs
from options import SIZE, Distinct, check_folder, run
from rich.console import Console
from rich.table import Table
from torch import Tensor
from train_clip import RUNS, Settings, Trainer, draw_curves, scores_table, train

import contrastive_kernels as ck

CAPTIONS_SHOWN = 12
HITS_SHOWN = 8


def introduce(console: Console, data: GlyphData, settings: Settings, compared: int) -> None:
    """Says what is going to be shown."""
    sample = torch.ones(1, settings.dim)
    backend = next(name for name in ck.list_backends() if ck.why_not(name, sample) is None)
    console.rule("[bold]contrastive_kernels: the CLIP loss without the N x N matrix")
    console.print(
        f"Two small towers learn to match {len(data):,} pictures of {len(data.codepoints):,} characters with their "
        f"Unicode names, from nothing, in batches of {settings.batch:,}. Shown are\n"
        f"  1. that the fused loss trains as the dense formula does: the same {compared} steps with both;\n"
        "  2. what one step of the loss costs, in time and memory, as batches grow;\n"
        "  3. how well the towers match pictures and names of characters that were never trained on.\n"
        f"Backend {backend!r}, torch {torch.__version__}, {torch.get_num_threads()} threads.\n",
        highlight=False,
    )


# 1. The same curve


def train_both(console: Console, data: GlyphData, settings: Settings, compared: int) -> tuple[Trainer, Trainer]:
    """The dense run's first steps, and the whole fused run."""
    dense = Trainer(dataclasses.replace(settings, loss="dense"), data)
    train(dense, until=compared, label="dense loss, first steps")
    fused = Trainer(settings, data)
    train(fused, until=compared, label="fused loss, the same steps")
    table = Table("step", "dense loss", "fused loss", "difference", title="1. The same seed, the same batches")
    for column in table.columns:
        column.justify = "right"
    curves = fused.curve()["loss"], dense.curve()["loss"]
    for step in sorted({1, *range(compared // 4, compared + 1, max(1, compared // 4)), compared}):
        ours, theirs = curves[0][step - 1], curves[1][step - 1]
        table.add_row(str(step), f"{theirs:.6f}", f"{ours:.6f}", f"{ours - theirs:+.1e}")
    console.print(table)
    difference = max(abs(a - b) for a, b in zip(*curves))
    console.print(
        f"Largest difference of the loss over {compared} steps: [bold]{difference:.1e}[/] "
        f"(the loss fell from {curves[1][0]:.2f} to {curves[1][-1]:.2f}). A whole training step took "
        f"{fused.seconds / compared:.2f} s with the fused loss, {dense.seconds / compared:.2f} s with the dense one.\n",
        highlight=False,
    )
    train(fused, label="fused loss, the rest")
    return fused, dense


# 2. The cost


def show_costs(console: Console, sizes: list[int], dim: int) -> list[Cost]:
    """Measures and prints both providers at each batch size."""
    with console.status("time and memory of the loss alone, in a process of its own"):
        costs = list(loss_costs(sizes, dim))
    title = f"2. One step of the loss alone, forward and backward, {dim} features: dense / fused"
    table = Table("batch", "seconds", "ratio", "peak MiB", "ratio", title=title)
    for column in table.columns:
        column.justify = "right"
    by_key = {(cost.provider, cost.rows): cost for cost in costs}
    for rows in sizes:
        dense, fused = by_key["dense", rows], by_key["fused", rows]
        table.add_row(
            f"{rows:,}",
            f"{_number(dense.seconds, '.3f') or dense.skipped} / {_number(fused.seconds, '.3f')}",
            _ratio(dense.seconds, fused.seconds),
            f"{_number(dense.peak_bytes, ',.0f', 2**20)} / {_number(fused.peak_bytes, ',.0f', 2**20)}",
            _ratio(dense.peak_bytes, fused.peak_bytes),
        )
    console.print(table)
    console.print("Memory: the peak beyond the features and their gradients.\n", highlight=False)
    return costs


def _number(value: float | None, form: str, unit: float = 1.0) -> str:
    return "" if value is None else format(value / unit, form)


def _ratio(theirs: float | None, ours: float | None) -> str:
    return f"{theirs / ours:.1f} x" if theirs and ours else ""


def draw_costs(path: Path, costs: list[Cost]) -> None:
    """Time and memory against the batch size, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for provider, color in (("dense", "tab:red"), ("fused", "tab:blue")):
        points = [cost for cost in costs if cost.provider == provider and cost.seconds]
        rows = [cost.rows for cost in points]
        left.plot(rows, [cost.seconds or 0.0 for cost in points], "o-", color=color, label=provider)
        right.plot(rows, [(cost.peak_bytes or 0) / 2**20 for cost in points], "o-", color=color, label=provider)
    left.set(xlabel="batch", ylabel="seconds a step of the loss", xscale="log", yscale="log")
    right.set(xlabel="batch", ylabel="peak memory of the loss, MiB", xscale="log", yscale="log")
    for axes in (left, right):
        sizes = sorted({cost.rows for cost in costs})
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    write_figure(path, figure, dpi=130)


# 3. The towers


def show_retrieval(console: Console, path: Path, trainer: Trainer) -> None:
    """Some held-out names, and the held-out pictures that the towers find nearest to each."""
    data, model = trainer.data, trainer.model.eval()
    characters = data.characters("test")
    rows = data.one_each(characters)
    names = [data.captions[c] for c in characters]
    image, text = encode_pictures(model, data, rows), encode_texts(model, names)
    best = (text @ image.T).topk(HITS_SHOWN).indices
    rank = ranks(text, image)
    shown = _examples(data, characters)
    table = Table("a name never seen in training", "rank of its picture", title="Examples", title_justify="left")
    for i in shown:
        table.add_row(names[i], f"{int(rank[i]) + 1} of {len(names):,}")
    table.columns[1].justify = "right"
    console.print(table)
    draw_retrieval(path, data.images[rows], names, best, shown)


def _examples(data: GlyphData, characters: np.ndarray[Any, Any]) -> list[int]:
    """A held-out character of each of the largest scripts, the choice being blind to how well it is found."""
    random = np.random.default_rng(0)
    scripts, counts = np.unique(data.scripts[characters], return_counts=True)
    largest = [s for s in scripts[np.argsort(-counts)] if s >= 0][:CAPTIONS_SHOWN]
    return [int(random.choice(np.flatnonzero(data.scripts[characters] == s))) for s in largest]


def draw_retrieval(path: Path, images: np.ndarray[Any, Any], names: list[str], best: Tensor, shown: list[int]) -> None:
    """A row per name: its own picture, then the nearest ones; the right one is framed in green."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.72 * len(shown) + 0.5), layout="constrained")
    grid = figure.subplots(len(shown), HITS_SHOWN + 2, width_ratios=[6.5, *[1] * (HITS_SHOWN + 1)], squeeze=False)
    for line, i in zip(grid, shown):
        line[0].text(1, 0.5, names[i], ha="right", va="center", fontsize=8)
        line[0].axis("off")
        for axes, j in zip(line[1:], [i, *best[i].tolist()]):
            axes.imshow(255 - images[j], cmap="gray", vmin=0, vmax=255)
            axes.set(xticks=[], yticks=[])
            if axes is not line[1]:
                axes.spines[:].set(color="tab:green" if j == i else "lightgray", linewidth=3 if j == i else 0.5)
    grid[0][1].set_title("own", fontsize=8)
    grid[0][2].set_title("nearest", fontsize=8)
    write_figure(path, figure, dpi=130)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RUNS / "demo", help="where the pictures go")
    parser.add_argument("--cache", type=Path, help="where the drawn characters are kept; default: the user's cache")
    parser.add_argument("--batch", type=SIZE, default=4096)
    parser.add_argument("--steps", type=SIZE, default=100)
    parser.add_argument("--compare", type=SIZE, default=25, help="steps that the dense loss is trained for as well")
    parser.add_argument(
        "--sizes", type=SIZE, nargs="+", action=Distinct, default=[4096, 8192, 16384], help="batch sizes of part 2"
    )
    arguments = parser.parse_args()
    started = time.perf_counter()
    console, out = Console(), arguments.out
    check_folder(out)

    data = load_glyphs(arguments.cache)
    # no more than a batch of distinct characters can hold, so that what is said is what is done
    batch = min(arguments.batch, len(data.characters("train")))
    settings = Settings(batch=batch, steps=arguments.steps)
    compared = min(arguments.compare, arguments.steps)
    introduce(console, data, settings, compared)

    fused, dense = train_both(console, data, settings, compared)
    draw_curves(out / "curves.png", {"fused": fused.curve(), "dense": dense.curve()})
    costs = show_costs(console, sorted(arguments.sizes), settings.dim)
    draw_costs(out / "cost.png", costs)
    scores = evaluate(fused.model, data)
    title = f"3. {scores.candidates:,} held-out characters, after {fused.seconds:.0f} s of training"
    console.print(scores_table(scores, title))
    show_retrieval(console, out / "retrieval.png", fused)

    results = {"costs": [dataclasses.asdict(cost) for cost in costs], "scores": scores.as_dict()}
    curves = {"fused": fused.curve(), "dense": dense.curve()}
    write_json(out / "demo.json", {**results, "curves": curves})
    console.print(f"\ncurves.png, cost.png, retrieval.png and demo.json are in {out}")
    console.print(f"{time.perf_counter() - started:.0f} seconds in all.", highlight=False)


if __name__ == "__main__":
    run(main)
