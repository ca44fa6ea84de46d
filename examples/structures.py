"""Latent modality structures on real data: what each regulariser does to two towers and to a fusion model.

    python examples/structures.py                     every cell of the table, three seeds
    python examples/structures.py --quick             all of it in small; the numbers mean nothing
    python examples/structures.py --variants base "+ bridge" --seeds 0 --models towers      some cells

A cell is one kind of model, one variant of the loss, one seed. Each is kept in --out when it is finished, and training
leaves checkpoints: a run that was killed goes on where it stopped, and two runs may share the cells between them.
Trained on the DejaVu faces of the training characters; everything is measured on test characters, or, to choose weights
by, on the validation characters (--split validation).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any

import torch
from files import Mistake, read_json, write_json
from fusion import FusionSettings, FusionTrainer
from fusion_tasks import KINDS, TEST_QUESTIONS, evaluate_questions, fine_tune
from glyphs import GlyphData, load_glyphs
from options import SEED, SHARE, SIZE, Distinct, at_least, check_folder, output_file, run
from probes import clouds, evaluate_towers, retrieval
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from structured_towers import VARIANTS, TowerSettings, TowerTrainer, structure_of
from structures_report import draw_report, print_report
from tasks import DEJAVU, STIX
from train_clip import RUNS, Settings, read_checkpoint, restore, train

__all__ = ["Cell", "Plan", "run_cell"]

MODELS = ("towers", "fusion")
GEOMETRY_BATCH = 1024  # rows a batch at which variants give the weight of geometry
SAVE_EVERY = 100  # steps; the towers' checkpoint has 110 MB


@dataclasses.dataclass(frozen=True)
class Plan:
    """How large every cell is."""

    towers: TowerSettings = dataclasses.field(default_factory=TowerSettings)
    fusion: FusionSettings = dataclasses.field(default_factory=FusionSettings)
    fine_tune_steps: int = 600
    questions: int = TEST_QUESTIONS
    split: str = "test"  # whose characters are asked about
    faces: tuple[int, ...] | None = None  # None: all


QUICK = Plan(
    TowerSettings(batch=128, steps=4, dim=32, hidden=64),
    FusionSettings(batch=32, steps=2, dim=32, width=32, queue=64),
    fine_tune_steps=len(KINDS),
    questions=32,
    faces=(0, 7, 8, 12),  # sans, serif bold italic, mono, STIX
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One model of one variant with one seed."""

    model: str
    variant: str
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.model}-{self.variant.replace('+ ', '').replace(' ', '-')}-{self.seed}"

    def settings(self, plan: Plan) -> TowerSettings | FusionSettings:
        """The plan's, with the variant's weights; geometry, a mean of sums over the batch, grows with it."""
        weights = dataclasses.asdict(structure_of(self.variant))
        sized = plan.towers if self.model == "towers" else plan.fusion
        weights["geometry"] *= GEOMETRY_BATCH / sized.batch
        return dataclasses.replace(sized, seed=self.seed, **weights)


def run_cell(cell: Cell, plan: Plan, data: GlyphData, out: Path, until: int | None = None) -> dict[str, Any] | None:
    """The cell's result: read, if it is finished; else trained (from its checkpoint, if there is one) and measured.

    Parameters
    ----------
    cell : Cell
    plan : Plan
    data : GlyphData
        All faces.
    out : Path
        Folder of the cells.
    until : int, optional
        Stop the training at this step, with a checkpoint and without a result: None.
    """
    path, settings = out / f"{cell.name}.json", cell.settings(plan)
    asked = {"fine_tune_steps": plan.fine_tune_steps, "questions": plan.questions, "split": plan.split}
    expected = {**dataclasses.asdict(settings), **asked}
    if path.exists():
        return _kept_result(path, expected)
    trained_on = data.subset(faces=DEJAVU)
    trainer = _trainer(settings, trained_on)
    checkpoint = out / cell.name / "checkpoint.pt"
    if checkpoint.exists():
        state = read_checkpoint(checkpoint)
        _same_settings(state["settings"], dataclasses.asdict(settings), checkpoint)
        restore(trainer, state, checkpoint)
    train(trainer, out / cell.name, save_every=SAVE_EVERY, until=until, label=cell.name)
    if trainer.step < trainer.steps:
        return None
    started = time.perf_counter()
    if isinstance(trainer, TowerTrainer):
        result = evaluate_towers(trainer.model, trained_on, data.subset(faces=STIX), plan.split)
        result["clouds"] = clouds(trainer.model, trained_on, plan.split)
    else:
        result = _answer(trainer, trained_on, plan, cell)
    result |= {
        "cell": dataclasses.asdict(cell), "settings": expected, "terms": trainer.terms,
        "training_seconds": trainer.seconds, "measuring_seconds": time.perf_counter() - started,
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    result = json.loads(json.dumps(result))  # what is read back later, keys of dicts as strings
    write_json(path, result)
    shutil.rmtree(checkpoint.parent, ignore_errors=True)  # with what killed runs left
    return result


def _kept_result(path: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """A finished cell's result, if it is one of these settings."""
    kept = read_json(path)
    if not isinstance(kept, dict) or "settings" not in kept:
        raise Mistake(f"{path}: expected the result of a cell; move it away to begin anew")
    _same_settings(kept["settings"], expected, path)
    return kept


def _trainer(settings: Settings, data: GlyphData) -> TowerTrainer | FusionTrainer:
    if isinstance(settings, TowerSettings):
        return TowerTrainer(settings, data)
    if isinstance(settings, FusionSettings):
        return FusionTrainer(settings, data)
    raise TypeError(f"settings: expected TowerSettings or FusionSettings, got {type(settings).__name__}")


def _answer(trainer: FusionTrainer, data: GlyphData, plan: Plan, cell: Cell) -> dict[str, Any]:
    """Fine-tunes on questions and asks those about held-out characters; retrieval with the pre-trained model."""
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    trainer.model.eval()
    found, _ = retrieval(trainer.model, data, plan.split)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"{cell.name}: questions", total=plan.fine_tune_steps)
        report = lambda step, loss: progress.update(task, completed=step)  # noqa: E731
        answerer = fine_tune(trainer.model, data, steps=plan.fine_tune_steps, seed=cell.seed, report=report)
    return {"retrieval": found, "questions": evaluate_questions(answerer, data, plan.split, plan.questions)}


def _same_settings(kept: dict[str, Any], expected: dict[str, Any], path: Path) -> None:
    changed = {name: (kept.get(name), value) for name, value in expected.items() if kept.get(name) != value}
    if changed:
        raise Mistake(f"--out: expected cells of these settings; {path} was made with others (kept, now): {changed}")


def run_cells(cells: Sequence[Cell], plan: Plan, out: Path, cache: Path | None, jobs: int) -> Iterator[dict[str, Any]]:
    """Results in the order in which cells finish; several at a time are processes that share the cores."""
    if jobs == 1:
        data = load_glyphs(cache, faces=plan.faces)
        for cell in cells:
            result = run_cell(cell, plan, data, out)
            if result is not None:
                yield result
        return
    load_glyphs(cache, faces=plan.faces)  # drawn once, not by every process
    context, threads = multiprocessing.get_context("spawn"), max(1, (os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(jobs, context, initializer=_start_worker, initargs=(threads,)) as pool:
        futures = [pool.submit(_work, cell, plan, out, cache) for cell in cells]
        console = Console()
        columns = (TextColumn("cells"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            for future in progress.track(as_completed(futures), total=len(cells)):
                yield future.result()


def _end_with_parent() -> None:
    """A killed command leaves no workers behind."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _start_worker(threads: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the life of the process: two bars on one line are none


@cache
def _data(folder: Path | None, faces: tuple[int, ...] | None) -> GlyphData:
    """Of this process: where the drawn characters cannot be kept, each worker draws them once, not for every cell."""
    return load_glyphs(folder, faces=faces, progress=False)


def _work(cell: Cell, plan: Plan, out: Path, folder: Path | None) -> dict[str, Any]:
    result = run_cell(cell, plan, _data(folder, plan.faces), out)
    if result is None:
        raise RuntimeError(f"{cell.name}: expected a result")
    return result


def parse_arguments() -> argparse.Namespace:
    """The options; defaults that depend on --quick are filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models, a few steps, one seed")
    parser.add_argument("--models", nargs="+", action=Distinct, choices=MODELS, default=list(MODELS))
    parser.add_argument("--variants", nargs="+", action=Distinct, default=list(VARIANTS), metavar="VARIANT",
                        help=f"of {', '.join(map(repr, VARIANTS))} (default: all), "
                        "or weights, as 'separation=0.1 bridge=2'")  # fmt: skip
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="whose characters are asked")
    parser.add_argument("--seeds", nargs="+", action=Distinct, type=SEED, help="default 0 1 2; with --quick 0")
    parser.add_argument("--jobs", type=SIZE, help="cells at a time; default: one a core, at most 4; with --quick 1")
    parser.add_argument("--out", type=Path, help="folder of results; default examples/runs/structures[-quick]")
    parser.add_argument("--json", type=output_file, help="write every cell's numbers here too, but the clouds' points")
    parser.add_argument("--cache", type=Path, help="where the drawn characters are kept; default: the user's cache")
    parser.add_argument(
        "--batch", type=at_least(2), help="characters a step of the towers; default 1024, with --quick 128"
    )
    parser.add_argument("--text", choices=("ngrams", "transformer"), default="ngrams", help="the towers' text encoder")
    parser.add_argument("--momentum", type=SHARE, default=0.0, help="of the towers' encoders of views; 0: none")
    arguments = parser.parse_args()
    quick = arguments.quick
    arguments.out = arguments.out or RUNS / ("structures-quick" if quick else "structures")
    arguments.seeds = arguments.seeds or ([0] if quick else [0, 1, 2])
    arguments.jobs = arguments.jobs or (1 if quick else min(4, os.cpu_count() or 1))
    for variant in arguments.variants:
        try:
            structure_of(variant)
        except ValueError as wrong:
            parser.error(f"--variants: {wrong}")
    check_folder(arguments.out)
    return arguments


def main() -> None:
    """The command."""
    arguments, console, started = parse_arguments(), Console(), time.perf_counter()
    plan = QUICK if arguments.quick else Plan()
    towers = dataclasses.replace(plan.towers, text=arguments.text, momentum=arguments.momentum)
    towers = dataclasses.replace(towers, batch=arguments.batch or towers.batch)
    plan = dataclasses.replace(plan, towers=towers, split=arguments.split)
    cells = [
        Cell(model, variant, seed)
        for seed in arguments.seeds
        for model in arguments.models
        for variant in arguments.variants
    ]
    results: list[dict[str, Any]] = []
    for result in run_cells(cells, plan, arguments.out / "cells", arguments.cache, arguments.jobs):
        results.append(result)
        seconds = result["training_seconds"] + result["measuring_seconds"]
        name = Cell(**result["cell"]).name
        console.print(f"{len(results):3} of {len(cells)}: {name}, {seconds:.0f} s", highlight=False)
    results.sort(key=lambda result: cells.index(Cell(**result["cell"])))
    print_report(console, results)
    draw_report(arguments.out / "structures.png", results)
    if arguments.json:
        write_json(
            arguments.json, {"cells": [{k: v for k, v in result.items() if k != "clouds"} for result in results]}
        )
    seconds = time.perf_counter() - started
    console.print(f"\nstructures.png and the cells are in {arguments.out}; {seconds:.0f} seconds in all.")


if __name__ == "__main__":
    run(main)
