"""``python -m bench --family``: what a member of a loss costs, ids or a margin say, beside the same loss without it.

Forward and backward in float32, in turns within one run; a goal is the largest ratio that is promised.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import contrastive_kernels as ck

from .cases import SIGMOID_BIAS, SIGMOID_SCALE, SOFTMAX_SCALE
from .measure import Work, interleave, warm_up
from .report import milliseconds
from .results import commit, describe_machine
from .structures import make_features

__all__ = ["Member", "members", "run"]

#: A member of a loss takes at most so much of the time without it.
GOAL = 1.1
#: The same of sup_con with 10 classes, beside info_nce of the same matrix.
GOAL_OF_LABELS = 1.3
#: The width of the guide's features that are measured, as of many a small model, and the largest ratio with it: its
#: scores are a product of that width in each of two passes, beside four of the features; in bands one, beside three.
GUIDE_FEATURES, FEATURES = 128, 256
GOALS_OF_GUIDE = {
    "info_nce": GOAL * (3 * FEATURES + GUIDE_FEATURES) / (3 * FEATURES),
    **dict.fromkeys(("clip_loss", "nt_xent"), GOAL * (4 * FEATURES + 2 * GUIDE_FEATURES) / (4 * FEATURES)),
}


Maker = Callable[[Tensor, Tensor], tuple[Callable[[], Tensor], list[Tensor]]]


@dataclass(frozen=True)
class Member:
    """A loss of one size with a member, and without it."""

    name: str
    n: int
    d: int
    #: [N, D], [M, D] -> the loss, and what wants a gradient
    member: Maker
    #: the loss that it is measured beside
    plain: str
    m: int = 0
    goal: float | None = field(default=GOAL)

    @property
    def title(self) -> str:
        """For people."""
        side = f"{self.n:,} x {self.m:,}" if self.m else f"{self.n:,}"
        return f"{self.name}, {side}, D = {self.d}"


def _scale(value: float = SOFTMAX_SCALE) -> Tensor:
    return torch.full((), value, dtype=torch.float32, device="cpu").requires_grad_()


def _of(loss: str, **options: Any) -> Maker:
    """A loss of this name; options that are functions are called with the number of candidates."""

    def make(x: Tensor, y: Tensor) -> tuple[Callable[[], Tensor], list[Tensor]]:
        made = {name: value(len(y)) if callable(value) else value for name, value in options.items()}
        scale = made.pop("logit_scale", None)
        scale = _scale(SIGMOID_SCALE if loss == "sigmoid" else SOFTMAX_SCALE) if scale is None else scale
        leaves = [v for v in (scale, *made.values()) if isinstance(v, Tensor) and v.requires_grad]
        if loss in ("sup_con", "multi_positive_nce"):
            labels = made.pop("labels")
            if len(y) != len(x):
                made.update(y=y, y_labels=labels)
                return lambda: getattr(ck, loss)(x, labels[: len(x)], scale, **made), [x, y, *leaves]
            views = torch.cat([labels, labels])
            return lambda: getattr(ck, loss)(torch.cat([x, y]), views, scale, **made), [x, y, *leaves]
        more: tuple[Any, ...] = (SIGMOID_BIAS,) if loss == "sigmoid" else ()
        if loss == "decomposable":
            more = (torch.full((len(x),), 3.0, dtype=torch.float32, device="cpu"),)
        return lambda: getattr(ck, loss)(x, y, scale, *more, **made), [x, y, *leaves]

    return make


def _integers(classes: int, m: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(classes, (m,), generator=generator, dtype=torch.int64, device="cpu")


def _ids(m: int) -> Tensor:
    return _integers(m // 2, m)


def _learnt(m: int, value: float = 0.0) -> Tensor:
    return torch.full((m,), value, dtype=torch.float32, device="cpu").requires_grad_()


def _several(m: int) -> Tensor:
    own = torch.arange(m, dtype=torch.int64, device="cpu")
    return torch.stack([own, (own + 1) % m], 1)


def _guide(m: int) -> tuple[Tensor, Tensor]:
    """Another model's features of rows and columns."""
    generator, shape = torch.Generator().manual_seed(2), (m, GUIDE_FEATURES)
    x, y = (torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") for _ in range(2))
    return x, y + 0.2 * x  # of a hundred candidates, one is more alike than the positive


def members(quick: bool = False) -> list[Member]:
    """Everything that is measured; `quick`: at small sizes, for tests, which no goal is promised of."""
    n, d = (64, 16) if quick else (8192, FEATURES)
    scales, log_q = partial(_learnt, value=SOFTMAX_SCALE), (lambda m: torch.linspace(-1, 1, m, device="cpu"))
    said: dict[str, dict[str, dict[str, Any]]] = {
        "info_nce": {
            "ids": {"ids": _ids},
            "candidate_bias": {"candidate_bias": log_q},
            "candidate_bias, learnt": {"candidate_bias": _learnt},
            "margin": {"margin": 0.5},
            "margin, relative": {"margin": ("relative", 0.1)},
            "logit_scale [N]": {"logit_scale": scales},
            "DCL": {"include_positive": False},
            "label_smoothing": {"label_smoothing": 0.1},
            "positives [N, 2]": {"positives": _several},
        },
        "clip_loss": {
            "ids": {"ids": _ids},
            "margin": {"margin": 0.5},
            "logit_scale [N]": {"logit_scale": scales},
            "DCL": {"include_positive": False},
        },
        "nt_xent": {"ids": {"ids": _ids}, "margin": {"margin": 0.5}},
        "sigmoid": {"ids": {"ids": _ids}},
        "decomposable": {"ids": {"ids": _ids}, "margin": {"margin": 0.5}},
    }
    made = [
        Member(f"{loss}, {name}", n // 2 if loss == "nt_xent" else n, d, _of(loss, **options), loss)
        for loss, cases in said.items()
        for name, options in cases.items()
    ]
    few = 16 if quick else 256
    made += [
        Member(f"{loss}, DCL", few, d, _of(loss, include_positive=False), loss) for loss in ("info_nce", "clip_loss")
    ]
    for loss, goal in GOALS_OF_GUIDE.items():
        guided = _of(loss, guided=_guide)
        made.append(Member(f"{loss}, guided", n // 2 if loss == "nt_xent" else n, d, guided, loss, goal=goal))
    classes = partial(_integers, 10)
    for width in (16,) if quick else (128, 256, 512):
        size = (8, 32) if quick else (64, 2048)
        of_labels = _of("sup_con", labels=classes)
        made.append(Member("sup_con, 10 classes", size[0], width, of_labels, "info_nce", size[1], GOAL_OF_LABELS))
    for loss in ("sup_con", "multi_positive_nce"):
        made.append(Member(f"{loss} beside nt_xent", n // 2, d, _of(loss, labels=_ids), "nt_xent"))
    return [replace(member, goal=None) for member in made] if quick else made


def _step(loss: Callable[[], Tensor], leaves: list[Tensor]) -> None:
    torch.autograd.grad(loss(), leaves)


def run(console: Console, rounds: int, quick: bool) -> int:
    """The command; returns the exit status: 1 where a goal was not met."""
    missed = False
    title = f"float32, forward and backward; {describe_machine('cpu')}; commit {commit()}"
    table = Table(title=title, title_justify="left")
    for name in ("", "without, ms", "with, ms", "ratio", "goal"):
        table.add_column(name, justify="left" if not name else "right")
    for (plain, n, m, d), group in itertools.groupby(members(quick), lambda each: (each.plain, each.n, each.m, each.d)):
        named = list(group)
        x, y = make_features(m or n, d)
        x, y = x[:n].detach().clone().requires_grad_(), y.detach().requires_grad_()
        works = [Work(partial(_step, *make(x, y)), "cpu") for make in (_of(plain), *(each.member for each in named))]
        for work in works:
            warm_up(work)
        interleave(works, rounds)
        without = works[0].best
        for member, work in zip(named, works[1:], strict=True):
            ratio, goal = work.best / without, member.goal
            late = goal is not None and ratio > goal
            missed |= late
            told = "" if goal is None else f"{goal:.3g}" + (" not met" if late else "")
            table.add_row(member.title, milliseconds(without), milliseconds(work.best), f"{ratio:.2f}", told)
    console.print(table)
    return int(missed)
