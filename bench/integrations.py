"""``python -m bench --integrations``: losses of other libraries beside ``contrastive_kernels.integrations``, in turns.

The loss alone, forward and backward, at sizes that are usual in each library; checked against the original first.
"""

from __future__ import annotations

import datetime
import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from . import memory
from .measure import Work, interleave, warm_up
from .plot import plot_ratios
from .report import milliseconds
from .results import Row, commit, describe_machine
from .structures import make_features

__all__ = ["Comparison", "comparisons", "run"]

#: Largest relative difference of value and gradients between the two, in float64 (a memory bank has float32's digits).
TOLERANCE, CHECK_ROWS = 1e-6, 256
MIB = 2**20

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Comparison:
    """A loss of a library at one size: made by a module that has its class, the library's own or ours."""

    library: str
    #: where the library has its classes
    module: str
    name: str
    n: int
    d: int
    make: Callable[[Any], Loss]
    #: columns of features
    columns: int = 2

    @property
    def title(self) -> str:
        return f"{self.library} {self.name}, {self.n:,} x {self.d}"


def _clip(module: Any) -> Loss:
    loss = module.ClipLoss()
    return lambda x, y: loss(x, y, 14.0)


def _siglip(module: Any) -> Loss:
    loss = module.SigLipLoss()
    return lambda x, y: loss(x, y, 10.0, -10.0)


def _bank(module: Any) -> Loss:
    torch.manual_seed(0)
    loss = module.NTXentLoss(temperature=0.1, memory_bank_size=(65_536, 128))
    loss.memory_bank.forward = lambda out, update=False, bank=loss.memory_bank: (out, bank.bank.t().to(out.dtype))
    keys: Loss = lambda x, y: loss(x, y.detach()) + 0.0 * y.sum()  # noqa: E731  (of a momentum encoder)
    return keys


def _ranking(module: Any) -> Loss:
    loss = module.MultipleNegativesRankingLoss(nn.Identity())
    return lambda *columns: loss.compute_loss_from_embeddings(list(columns), None)


def _cached_ranking(module: Any) -> Loss:
    loss = module.CachedMultipleNegativesRankingLoss(nn.Sequential(nn.Identity()), mini_batch_size=64)

    def found(*columns: Tensor) -> Tensor:
        value: Tensor = loss.calculate_loss([list(column.split(64)) for column in columns])
        return value

    return found


def _pairs(module: Any) -> Loss:
    loss = module.NTXentLoss(temperature=0.1)
    return lambda x, y: loss(torch.cat([x, y]), torch.arange(len(x), dtype=torch.int64, device=x.device).repeat(2))


def _two_views(name: str) -> Callable[[Any], Loss]:
    def make(module: Any) -> Loss:
        loss: Loss = getattr(module, name)()
        return loss

    return make


def comparisons(quick: bool = False) -> list[Comparison]:
    """Everything that is compared; `quick`: at one small size each, for tests."""
    st, pml = "sentence_transformers.sentence_transformer.losses", "pytorch_metric_learning.losses"
    nt_xent, dcl = _two_views("NTXentLoss"), _two_views("DCLLoss")
    made = [
        *(Comparison("open_clip", "open_clip.loss", "ClipLoss", n, 512, _clip) for n in (64, 256, 1024, 4096)),
        *(Comparison("open_clip", "open_clip.loss", "SigLipLoss", n, 512, _siglip) for n in (64, 256, 1024, 4096)),
        *(Comparison("lightly", "lightly.loss", "NTXentLoss", n, 128, nt_xent) for n in (64, 256, 1024)),
        *(Comparison("lightly", "lightly.loss", "DCLLoss", n, 128, dcl) for n in (256, 1024)),
        Comparison("lightly", "lightly.loss", "NTXentLoss with a bank of 65,536", 256, 128, _bank),
        *(Comparison("sentence_transformers", st, "MultipleNegativesRankingLoss", n, 384, _ranking) for n in (64, 512)),
        Comparison("sentence_transformers", st, "MultipleNegativesRankingLoss, 3 negatives", 256, 384, _ranking, 5),
        Comparison("sentence_transformers", st, "CachedMultipleNegativesRankingLoss", 2048, 384, _cached_ranking),
        *(Comparison("metric_learning", pml, "NTXentLoss", n, 128, _pairs) for n in (32, 128)),
    ]  # fmt: skip
    if not quick:
        return made
    smallest = {(c.library, c.name): Comparison(c.library, c.module, c.name, 16, c.d, c.make, c.columns) for c in made}
    return list(smallest.values())


def _modules(comparison: Comparison) -> tuple[ModuleType, ModuleType]:
    """Ours and the library's own."""
    ours = importlib.import_module(f"contrastive_kernels.integrations.{comparison.library}")
    return ours, importlib.import_module(comparison.module)


def _step(loss: Loss, columns: Sequence[Tensor]) -> list[Tensor]:
    leaves = [column.detach().requires_grad_() for column in columns]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def _columns(comparison: Comparison, n: int) -> list[Tensor]:
    x, y = make_features(n, comparison.d)
    return [x, y, *(y.roll(k, 0).clone() for k in range(1, comparison.columns - 1))]


def _measured(comparison: Comparison, rounds: int) -> Row:
    """What is found: an error, or seconds and bytes of both."""
    columns = _columns(comparison, comparison.n)
    losses = [comparison.make(module) for module in _modules(comparison)]
    # in float64: in float32 the value of a nearly solved batch has no digits in common
    few = [column.double() for column in _columns(comparison, min(comparison.n, CHECK_ROWS))]
    pairs = zip(*(_step(loss, few) for loss in losses), strict=True)
    error = max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs)
    if error > TOLERANCE:
        return {"error": error}
    works = [Work(lambda loss=loss: _step(loss, columns), "cpu") for loss in losses]  # type: ignore[misc]
    for work in works:
        warm_up(work)
    interleave(works, rounds)
    found: Row = {"seconds": [work.best for work in works]}
    if memory.why_not("cpu") is None:
        peaks = [
            memory.peak_of(lambda loss=loss: sum(g.nbytes for g in _step(loss, columns)))[0]  # type: ignore[misc]
            for loss in losses
        ]
        found["bytes"] = [max(peak, 0) for peak in peaks]
    return found


def _cells(row: Row) -> list[str]:
    if "error" in row:
        return ["wrong", f"{row['error']:.1e}", "", "", ""]
    ours, theirs = row["seconds"]
    memories = [f"{size / MIB:.1f}" for size in row["bytes"]] if "bytes" in row else ["", ""]
    return [milliseconds(ours), milliseconds(theirs), f"{theirs / ours:.2f}x", *memories]


def run(console: Console, rounds: int, quick: bool, stored: Path | None = None, folder: Path | None = None) -> int:
    """The command; 1 where ours is wrong. Rows replace those of a JSON file, a plot goes into a folder."""
    machine = describe_machine("cpu")
    table = Table(title=f"float32, forward and backward; {machine}; commit {commit()}", title_justify="left")
    for name in ("", "ours, ms", "theirs, ms", "faster", "ours, MiB", "theirs, MiB"):
        table.add_column(name, justify="left" if not name else "right")
    rows, missing = list[Row](), dict[str, str]()
    for comparison in comparisons(quick):
        if comparison.library in missing:
            continue
        try:
            _modules(comparison)
        except (ImportError, RuntimeError) as error:  # (a library may fail in its own way)
            missing[comparison.library] = str(error).splitlines()[0]
            continue
        rows.append({"title": comparison.title, **_measured(comparison, rounds)})
        table.add_row(comparison.title, *_cells(rows[-1]))
    console.print(table)
    for library, reason in missing.items():
        console.print(f"{library} is left out: {reason}", highlight=False)
    if stored is not None:
        about = {
            "machine": machine,
            "threads": torch.get_num_threads(),
            "commit": commit(),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }
        lines = ",\n".join(json.dumps({**row, **about}) for row in rows)
        stored.write_text(f"[\n{lines}\n]\n")
    if folder is not None:
        right = [(row["title"], row["seconds"][1] / row["seconds"][0]) for row in rows if "seconds" in row]
        path = plot_ratios(right, f"{machine}, commit {commit()}", folder / "integrations.png")
        console.print(f"wrote {path}", highlight=False)
    return int(any("error" in row for row in rows))
