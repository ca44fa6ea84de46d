"""Latent modality structures on real data: what each regulariser does to two towers and to a fusion model.

    python examples/structures.py                     every cell of the table, three seeds
    python examples/structures.py --quick             all of it in small, under a minute; the numbers mean nothing
    python examples/structures.py --variants base "+ bridge" --seeds 0 --kinds towers      some cells

A cell is one kind of model, one variant of the loss, one seed. Each is kept in --out when it is finished, and training
leaves checkpoints: a run that was killed goes on where it stopped, and two runs may share the cells between them.
Trained on the DejaVu faces of the training characters; everything is measured on test characters.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from fusion import FusionSettings, FusionTrainer
from fusion_tasks import KINDS, TEST_QUESTIONS, evaluate_questions, fine_tune
from glyphs import GlyphData, load_glyphs
from probes import clouds, evaluate_towers, retrieval
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from structured_towers import VARIANTS, TowerSettings, TowerTrainer
from structures_report import draw_report, print_report
from tasks import DEJAVU, STIX
from train_clip import RUNS, Settings, train

__all__ = ["Cell", "Plan", "run_cell"]

MODELS = ("towers", "fusion")
SAVE_EVERY = 100  # steps; the towers' checkpoint has 110 MB


@dataclasses.dataclass(frozen=True)
class Plan:
    """How large every cell is."""

    towers: TowerSettings = dataclasses.field(default_factory=TowerSettings)
    fusion: FusionSettings = dataclasses.field(default_factory=FusionSettings)
    fine_tune_steps: int = 400
    questions: int = TEST_QUESTIONS


QUICK = Plan(
    TowerSettings(batch=128, steps=4, dim=32, hidden=64),
    FusionSettings(batch=32, steps=2, dim=32, width=32, queue=64),
    fine_tune_steps=len(KINDS),
    questions=32,
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
        return f"{self.model}-{self.variant.replace('+ ', '')}-{self.seed}"

    def settings(self, plan: Plan) -> TowerSettings | FusionSettings:
        """The plan's, with the variant's weights."""
        weights = dataclasses.asdict(VARIANTS[self.variant])
        sized = plan.towers if self.model == "towers" else plan.fusion
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
    expected = {**dataclasses.asdict(settings), "fine_tune_steps": plan.fine_tune_steps, "questions": plan.questions}
    if path.exists():
        kept: dict[str, Any] = json.loads(path.read_text())
        _same_settings(kept["settings"], expected, path)
        return kept
    trained_on = data.subset(faces=DEJAVU)
    trainer = _trainer(settings, trained_on)
    checkpoint = out / cell.name / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        _same_settings(state["settings"], dataclasses.asdict(settings), checkpoint)
        trainer.load(state)
    train(trainer, out / cell.name, save_every=SAVE_EVERY, until=until, label=cell.name)
    if trainer.step < trainer.steps:
        return None
    started = time.perf_counter()
    if isinstance(trainer, TowerTrainer):
        result = evaluate_towers(trainer.model, trained_on, data.subset(faces=STIX))
        result["clouds"] = clouds(trainer.model, trained_on)
    else:
        result = _answer(trainer, trained_on, plan, cell)
    result |= {
        "cell": dataclasses.asdict(cell), "settings": expected, "terms": trainer.terms,
        "training_seconds": trainer.seconds, "measuring_seconds": time.perf_counter() - started,
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    result = json.loads(json.dumps(result))  # what is read back later, keys of dicts as strings
    _write(path, result)
    checkpoint.unlink()
    checkpoint.parent.rmdir()
    return result


def _trainer(settings: Settings, data: GlyphData) -> TowerTrainer | FusionTrainer:
    if isinstance(settings, TowerSettings):
        return TowerTrainer(settings, data)
    if isinstance(settings, FusionSettings):
        return FusionTrainer(settings, data)
    raise TypeError(f"settings: expected TowerSettings or FusionSettings, got {type(settings).__name__}")


def _answer(trainer: FusionTrainer, data: GlyphData, plan: Plan, cell: Cell) -> dict[str, Any]:
    """Fine-tunes on questions and asks those of the test characters; retrieval with the pre-trained model."""
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    trainer.model.eval()
    found, _ = retrieval(trainer.model, data)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"{cell.name}: questions", total=plan.fine_tune_steps)
        report = lambda step, loss: progress.update(task, completed=step)  # noqa: E731
        answerer = fine_tune(trainer.model, data, steps=plan.fine_tune_steps, seed=cell.seed, report=report)
    return {"retrieval": found, "questions": evaluate_questions(answerer, data, plan.questions)}


def _same_settings(kept: dict[str, Any], expected: dict[str, Any], path: Path) -> None:
    changed = {name: (kept.get(name), value) for name, value in expected.items() if kept.get(name) != value}
    if changed:
        raise ValueError(f"--out: expected cells of these settings; {path} was made with others (kept, now): {changed}")


def _write(path: Path, result: dict[str, Any]) -> None:
    """Beside ``path``, then renamed: a kill never leaves half a result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(result, indent=1))
    os.replace(part, path)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models, a few steps, one seed")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS), metavar="VARIANT",
                        help=f"of {', '.join(map(repr, VARIANTS))}; default: all")  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, help="default 0 1 2; with --quick 0")
    parser.add_argument("--out", type=Path, help="folder of results; default examples/runs/structures[-quick]")
    parser.add_argument("--json", type=Path, help="write every cell's numbers here too")
    parser.add_argument("--cache", type=Path, help="where the drawn characters are kept; default: the user's cache")
    parser.add_argument("--text", choices=("ngrams", "transformer"), default="ngrams", help="the towers' text encoder")
    parser.add_argument("--momentum", type=float, default=0.0, help="of the towers' encoders of views; 0: none")
    arguments = parser.parse_args()
    console, started = Console(), time.perf_counter()
    plan = QUICK if arguments.quick else Plan()
    plan = dataclasses.replace(
        plan, towers=dataclasses.replace(plan.towers, text=arguments.text, momentum=arguments.momentum)
    )
    out = arguments.out or RUNS / ("structures-quick" if arguments.quick else "structures")
    seeds = arguments.seeds or ([0] if arguments.quick else [0, 1, 2])
    data = load_glyphs(arguments.cache)
    cells = [Cell(m, variant, seed) for seed in seeds for m in arguments.models for variant in arguments.variants]
    results = []
    for number, cell in enumerate(cells, 1):
        result = run_cell(cell, plan, data, out / "cells")
        if result is not None:
            results.append(result)
            seconds = result["training_seconds"] + result["measuring_seconds"]
            console.print(f"{number:3} of {len(cells)}: {cell.name}, {seconds:.0f} s", highlight=False)
    print_report(console, results)
    draw_report(out / "structures.png", results)
    if arguments.json:
        _write(arguments.json, {"cells": results})
    console.print(f"\nstructures.png and the cells are in {out}; {time.perf_counter() - started:.0f} seconds in all.")


if __name__ == "__main__":
    main()
