"""Train two towers on characters and their names, with any of the losses.

    python examples/train_clip.py                                        the fused CLIP loss, batch 4,096
    python examples/train_clip.py --loss sigmoid --batch 1024 --epochs 200
    python examples/train_clip.py --out runs/a --resume                  goes on where a killed run stopped
    torchrun --nproc-per-node 2 examples/train_clip.py                   two processes, each with half of every batch

Writes to ``--out``: ``checkpoint.pt`` (replaced atomically and sealed with a checksum; a run that resumes from it ends
as if it had never been stopped), ``metrics.json`` and ``curves.png``. One run writes to a folder.

Several processes train as one would: the losses and the batch normalisation see all their rows, and the curve is the
same to rounding. A run may go on with another number of them. On CPUs set OMP_NUM_THREADS to the cores of each.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import math
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import processes
import torch
from evaluate import RECALL_AT, Scores, evaluate
from files import Mistake, read_sealed, reason, write_figure, write_json, write_sealed
from glyphs import BatchSampler, GlyphData, load_glyphs
from objectives import LOSSES, Objective, initial_logits, make_objective
from options import (
    COUNT,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    SIZE,
    Number,
    at_least,
    check_folder,
    device_name,
    run,
)
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from towers import TwoTowers

import contrastive_kernels as ck

__all__ = ["Settings", "Trainer", "read_checkpoint", "scores_table", "train"]

RUNS = Path(__file__).resolve().parent / "runs"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides a run's result; a checkpoint keeps it.

    ``steps`` 0 means ``epochs`` passes over the characters instead.
    """

    loss: str = "clip"
    batch: int = 4096
    steps: int = 0
    epochs: int = 150
    seed: int = 0
    dim: int = 256
    lr: float = 5e-3
    weight_decay: float = 0.5
    warmup: float = 0.1  # part of the steps
    shift: int = 1  # pixels that a picture moves at most

    numbers: ClassVar[Mapping[str, Number]] = {
        "batch": SIZE, "steps": COUNT, "epochs": SIZE, "seed": SEED, "dim": SIZE, "lr": POSITIVE,
        "weight_decay": NOT_NEGATIVE, "warmup": FRACTION, "shift": at_least(0, 31),
    }  # fmt: skip

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss: expected one of {LOSSES}, got {self.loss!r}")
        for name, number in self.numbers.items():
            number.check(name, getattr(self, name))


class BatchLoss(nn.Module):
    """From a batch to its loss, towers included: what several processes compute together."""

    def __init__(self, model: TwoTowers, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, images: Tensor, captions: tuple[Tensor, Tensor], characters: Tensor) -> Tensor:
        """Pictures uint8 [N, 32, 32], their captions, and which characters they are [N] -> 0-d."""
        image, text = self.model(images, captions)
        return self.objective(self.model, image, text, characters)


class Trainer:
    """One run: everything that a checkpoint has to bring back, and one step of it.

    Parameters
    ----------
    settings : Settings
    data : GlyphData
    device : torch.device or str
    """

    views = 1  # of each picture in a batch

    def __init__(self, settings: Settings, data: GlyphData, device: torch.device | str = "cpu") -> None:
        self.settings, self.data, self.device = settings, data, torch.device(device)
        torch.manual_seed(settings.seed)
        self.model = self._make_model().to(self.device)
        self.objective = self._make_objective()
        self.batch_loss = processes.data_parallel(BatchLoss(self.model, self.objective))
        self.sampler = BatchSampler(
            data, settings.batch, split="train", seed=settings.seed, views=self.views, max_shift=settings.shift,
            share=(processes.number(), processes.count()),
        )  # fmt: skip
        self.steps = settings.steps or settings.epochs * len(self.sampler)
        self.captions = self.model.prepare_captions(data.captions)
        self.optimizer = torch.optim.AdamW(self._groups(), lr=settings.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)
        self.step = 0
        self.seconds = 0.0  # spent in steps, over all sittings
        self.losses: list[Tensor] = []  # on the device: a step asks nothing of it
        self.scales: list[Tensor] = []

    def _make_model(self) -> TwoTowers:
        model = TwoTowers(self.settings.dim, *initial_logits(self.settings.loss))
        model.logit_bias.requires_grad_(self.settings.loss == "sigmoid")  # no other loss has one
        return model

    def _make_objective(self) -> Objective:
        return make_objective(self.settings.loss, len(self.data.codepoints), self.device)

    def _groups(self) -> list[dict[str, Any]]:
        """Weight decay for matrices alone; the temperature learns ten times faster than the rest."""
        logits = [self.model.log_logit_scale, self.model.logit_bias]
        others = [p for name, p in self.model.named_parameters() if p.requires_grad and "logit_" not in name]
        return [
            {"params": [p for p in others if p.ndim > 1], "weight_decay": self.settings.weight_decay, "speed": 1.0},
            {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0, "speed": 1.0},
            {"params": logits, "weight_decay": 0.0, "speed": 10.0},
        ]

    def _learning_rate(self) -> float:
        """Linear warm-up, then a cosine to zero."""
        warmup = max(1, round(self.steps * self.settings.warmup))
        cosine = 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        return self.settings.lr * min(1.0, (self.step + 1) / warmup) * cosine

    def train_step(self) -> None:
        """Draws a batch and moves the towers."""
        started = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate() * group["speed"]
        loss = self._loss()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.model.clamp_logit_scale()
        self.losses.append(loss.detach())
        self.scales.append(self.model.logit_scale.detach())
        self.step += 1
        self.seconds += time.perf_counter() - started

    def _loss(self) -> Tensor:
        """The loss of this step's batch, 0-d."""
        batch = self.sampler[self.step]
        characters = torch.from_numpy(batch.characters).to(self.device)
        images = torch.from_numpy(batch.images[0]).to(self.device)
        loss: Tensor = self.batch_loss(images, self.captions[characters], characters)
        return loss

    def curve(self) -> dict[str, list[float]]:
        """Loss and temperature at every step so far."""
        return {"loss": _floats(self.losses), "logit_scale": _floats(self.scales)}

    def save(self, path: Path) -> None:
        """Writes a sealed checkpoint: a kill or a full disk at any moment leaves a whole one, the new or the old."""
        state = {
            "settings": dataclasses.asdict(self.settings),
            "data": self.data.checksum,
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "objective": self.objective.state_dict(),
            "curve": self.curve(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
        }
        content = io.BytesIO()
        torch.save(state, content)
        write_sealed(path, content.getvalue())
        for part in path.parent.glob(f"{path.name}.*.part"):  # of runs that were killed
            with contextlib.suppress(OSError):
                part.unlink()

    def load(self, state: dict[str, Any]) -> None:
        """Takes back what ``save`` wrote."""
        if state["data"] != self.data.checksum:
            raise ValueError("data: expected the pictures that the checkpoint's run began with")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.objective.load_state_dict(state["objective"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.losses = list(torch.tensor(state["curve"]["loss"]))
        self.scales = list(torch.tensor(state["curve"]["logit_scale"]))
        torch.set_rng_state(state["random"].cpu())
        if state["random_cuda"]:
            torch.cuda.set_rng_state_all([s.cpu() for s in state["random_cuda"]])


def read_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What ``Trainer.save`` wrote; a Mistake if any byte of it is another."""
    try:
        content = read_sealed(path)
    except Mistake as damaged:
        raise Mistake(f"--resume: {damaged}; move it away to begin anew") from None
    return torch.load(io.BytesIO(content), map_location=device, weights_only=True)


def restore(trainer: Trainer, state: dict[str, Any], path: Path) -> None:
    """``trainer.load``; a checkpoint of another version of the models, or of other data, is a Mistake."""
    try:
        trainer.load(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        what = " ".join(str(error).split())[:200]
        raise Mistake(f"--resume: {path} does not fit this run ({what}); move it away to begin anew") from error


def _floats(values: list[Tensor]) -> list[float]:
    return torch.stack([v.cpu() for v in values]).tolist() if values else []


def train(
    trainer: Trainer, out: Path | None = None, *, save_every: int = 25, until: int | None = None, label: str = ""
) -> bool:
    """Runs a trainer to its last step (or to step ``until``), with a progress bar; saves to ``out`` now and then.

    Of several processes the first one saves and shows the bar.
    A checkpoint that cannot be written is said and tried again later: the training is worth more than its checkpoint.
    Returns whether the last one could be.
    """
    last = trainer.steps if until is None else min(until, trainer.steps)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console, first, saved = processes.console(), processes.number() == 0, True
    shown = console.is_terminal and first
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task(label or trainer.settings.loss, total=last, completed=trainer.step)
        while trainer.step < last:
            trainer.train_step()
            progress.update(task, completed=trainer.step)
            if shown and trainer.step % 10 == 0:  # reading the loss waits for the device
                text = f"{label or trainer.settings.loss}: loss {float(trainer.losses[-1]):.3f}"
                progress.update(task, description=text)
            if out and first and (trainer.step % save_every == 0 or trainer.step == last):
                saved = _save(trainer, out / "checkpoint.pt", console)
    return saved


def _save(trainer: Trainer, path: Path, console: Console) -> bool:
    """Saves, or says why not."""
    try:
        trainer.save(path)
        return True
    except OSError as error:
        left = "the older checkpoint stays" if os.path.exists(path) else "there is no checkpoint"
        line = f"step {trainer.step}: {path} cannot be written ({reason(error)}); {left}"
        console.print(line, soft_wrap=True, markup=False, highlight=False)
        return False


def scores_table(scores: Scores, title: str) -> Table:
    """What a person wants to know, with guessing beside it."""
    table = Table("", "reached", "by chance", title=title, title_justify="left")
    table.columns[1].justify = table.columns[2].justify = "right"
    for name, recall in (("picture to name", scores.image_to_text), ("name to picture", scores.text_to_image)):
        for k in RECALL_AT:
            table.add_row(f"{name}, recall@{k}", f"{recall[k]:.1%}", f"{scores.recall_by_chance[k]:.1%}")
    row = f"zero-shot script, {scores.classes} classes, balanced accuracy"
    table.add_row(row, f"{scores.zero_shot:.1%}", f"{scores.zero_shot_by_chance:.1%}")
    return table


def write_metrics(path: Path, trainer: Trainer, scores: dict[str, Scores]) -> None:
    """Settings, versions, curve and results, as JSON."""
    metrics = {
        "settings": dataclasses.asdict(trainer.settings),
        "steps": trainer.step,
        "seconds": trainer.seconds,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "device": str(trainer.device),
        "processes": processes.count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "contrastive_kernels": ck.__version__,
        "python": platform.python_version(),
        "scores": {split: value.as_dict() for split, value in scores.items()},
        "curve": trainer.curve(),
    }
    write_json(path, metrics)


def draw_curves(path: Path, curves: dict[str, dict[str, list[float]]]) -> None:
    """Loss and temperature against the step, a line per run, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    styles = ({"lw": 3.5, "alpha": 0.45}, {"lw": 1.2, "color": "black"})
    for i, (name, curve) in enumerate(curves.items()):
        style: dict[str, Any] = styles[i] if len(curves) == 2 else {}
        left.plot(range(1, len(curve["loss"]) + 1), curve["loss"], label=name, **style)
        right.plot(range(1, len(curve["logit_scale"]) + 1), curve["logit_scale"], label=name, **style)
    left.set(xlabel="step", ylabel="training loss")
    right.set(xlabel="step", ylabel="logit scale (1 / temperature)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    write_figure(path, figure, dpi=130)


def parse_arguments() -> tuple[argparse.Namespace, dict[str, Any]]:
    """Options that are no settings, and those settings that were given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Settings):
        kind: dict[str, Any] = {"choices": LOSSES} if field.name == "loss" else {"type": Settings.numbers[field.name]}
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, default=argparse.SUPPRESS, help=f"default {field.default}", **kind)
    parser.add_argument("--device", type=device_name, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder of the run; default examples/runs/<loss>")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    parser.add_argument("--save-every", type=SIZE, default=25, metavar="STEPS")
    parser.add_argument("--cache", type=Path, help="where the drawn characters are kept; default: the user's cache")
    arguments = parser.parse_args()
    names = {field.name for field in dataclasses.fields(Settings)}
    return arguments, {name: value for name, value in vars(arguments).items() if name in names}


def start(data: GlyphData, given: dict[str, Any], checkpoint: Path, resume: bool, device: str) -> Trainer:
    """A new trainer, or the one of the checkpoint; options that contradict the checkpoint are an error."""
    if not (resume and checkpoint.exists()):
        return Trainer(Settings(**given), data, device)
    state = read_checkpoint(checkpoint, device)
    kept = state["settings"]
    if kept.keys() != dataclasses.asdict(Settings()).keys():
        raise Mistake(f"--resume: {checkpoint} is not of this command; its settings are {kept}")
    changed = {name: value for name, value in given.items() if kept[name] != value}
    if changed:
        raise Mistake(f"--resume: expected the settings of {checkpoint}, {kept}, got {changed}")
    trainer = Trainer(Settings(**kept), data, device)
    restore(trainer, state, checkpoint)
    return trainer


def main() -> None:
    """The command, on one process or on those of torchrun."""
    with processes.joined():
        _train(processes.console())


def _train(console: Console) -> None:
    with processes.one_speaks():
        arguments, given = parse_arguments()
    out: Path = arguments.out or RUNS / given.get("loss", Settings.loss)
    check_folder(out)
    data = processes.from_first(lambda: load_glyphs(arguments.cache))
    trainer = start(data, given, out / "checkpoint.pt", arguments.resume, arguments.device)
    several = f"{processes.count()} processes, " if processes.count() > 1 else ""
    console.print(
        f"{trainer.settings.loss} loss, {len(data):,} pictures of {len(data.codepoints):,} characters, "
        f"batch {trainer.sampler.batch:,} distinct characters, steps {trainer.step} to {trainer.steps}, "
        f"{trainer.device}, {several}{torch.get_num_threads()} threads"
    )
    saved = train(trainer, out, save_every=arguments.save_every)
    if processes.number() > 0:
        return
    scores = {split: evaluate(trainer.model, data, split) for split in ("validation", "test")}
    title = f"{scores['test'].candidates:,} held-out characters, after {trainer.seconds:.0f} s of training"
    console.print(scores_table(scores["test"], title))
    write_metrics(out / "metrics.json", trainer, scores)
    draw_curves(out / "curves.png", {trainer.settings.loss: trainer.curve()})
    console.print(f"{'checkpoint.pt, ' if saved else ''}metrics.json, curves.png in {out}")


if __name__ == "__main__":
    run(main)
