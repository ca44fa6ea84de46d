"""Questions about pictures for the fusion model: script, face and marks; pairs of pictures; entailment of a claim.

Questions of a split are about its own characters alone. All kinds share one list of answers and one linear head, so
that a model which does not read the question is lost. Each kind's answers are drawn equally often.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from fusion import FusionModel
from glyphs import GlyphData
from tasks import (
    ABOVE,
    ATTRIBUTES,
    BELOW,
    CLAIM,
    MANY,
    MOST_MARKS,
    RELATIONS,
    WHICH,
    SplitTables,
    attribute,
    hide,
    relation,
    script_title,
)  # fmt: skip
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from unicode_scripts import SCRIPTS

__all__ = ["ANSWERS", "KINDS", "Answerer", "Asked", "Questions", "evaluate_questions", "fine_tune"]

KINDS = ("script", "face", "marks", "pairs", "entailment")
NUMBERS = tuple(str(n) for n in range(MOST_MARKS + 1))
ANSWERS = (*(script_title(i) for i in range(len(SCRIPTS))), "YES", "NO", *NUMBERS, "TRUE", "FALSE", *RELATIONS)
_ANSWER = {answer: i for i, answer in enumerate(ANSWERS)}
TEST_QUESTIONS = 768  # of each kind
LEAST = 8  # characters of a script that pairs are asked about, in a split


@dataclasses.dataclass(frozen=True)
class Asked:
    """Questions of one kind: pictures uint8 [N, P, 32, 32] (P = 2 for pairs, else 1), texts [N], answers [N]."""

    pictures: npt.NDArray[np.uint8]
    texts: list[str]
    answers: npt.NDArray[np.int64]
    characters: npt.NDArray[np.int64]  # [N, P]


class Questions:
    """Draws questions about the characters of one split.

    Parameters
    ----------
    data : GlyphData
    split : str
        "train", "validation" or "test".
    """

    def __init__(self, data: GlyphData, split: str) -> None:
        self.data, self.tables = data, SplitTables(data, split)
        self.has = {name: attribute(name, data.face) for name in ATTRIBUTES}
        self.scripts = sorted(script for script, rows in self.tables.by_script.items() if len(rows) >= LEAST)
        self._draw = {
            "script": self._script, "face": self._face, "marks": self._marks, "pairs": self._pair,
            "entailment": self._entailment,
        }  # fmt: skip

    def draw(self, kind: str, count: int, random: np.random.Generator) -> Asked:
        """So many questions of a kind."""
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")
        asked = [self._draw[kind](random) for _ in range(count)]
        return Asked(
            np.stack([np.stack(pictures) for pictures, _, _, _ in asked]),
            [text for _, text, _, _ in asked],
            np.array([_ANSWER[answer] for _, _, answer, _ in asked]),
            np.array([characters for _, _, _, characters in asked]),
        )

    def _picture(self, character: int, random: np.random.Generator) -> int:
        """Row of one of a character's pictures."""
        return int(random.integers(self.data.first[character], self.data.first[character + 1]))

    def _one(self, characters: npt.NDArray[np.int64], random: np.random.Generator) -> int:
        return int(random.choice(characters))

    def _script(self, random: np.random.Generator) -> Any:
        script = self.scripts[random.integers(len(self.scripts))]
        c = self._one(self.tables.by_script[script], random)
        return [self.data.images[self._picture(c, random)]], WHICH, script_title(script), [c]

    def _face(self, random: np.random.Generator) -> Any:
        name, wanted = ATTRIBUTES[random.integers(len(ATTRIBUTES))], bool(random.integers(2))
        row, c = self._in_face(self.tables.faced, name, wanted, random)
        return [self.data.images[row]], f"IS IT {name.upper()}", "YES" if wanted else "NO", [c]

    def _in_face(
        self, characters: npt.NDArray[np.int64], name: str, wanted: bool, random: np.random.Generator
    ) -> tuple[int, int]:
        """A picture whose face has, or has not, an attribute; and its character."""
        while True:
            c = self._one(characters, random)
            first, last = self.data.first[c], self.data.first[c + 1]
            rows = first + np.flatnonzero(self.has[name][first:last] == wanted)
            if len(rows):
                return int(random.choice(rows)), c

    def _marks(self, random: np.random.Generator) -> Any:
        numbers = sorted(self.tables.by_marks)
        number = numbers[random.integers(len(numbers))]
        c = self._one(self.tables.by_marks[number], random)
        return [self.data.images[self._picture(c, random)]], MANY, str(number), [c]

    def _pair(self, random: np.random.Generator) -> Any:
        """BOTH ARE ARROWS, BOTH ARE BOLD: half of them are; of the others one or both are not."""
        both = bool(random.integers(2))
        holds = [True, True] if both else [[True, False], [False, True], [False, False]][random.integers(3)]
        if random.integers(2):
            name = ATTRIBUTES[random.integers(len(ATTRIBUTES))]
            found = [self._in_face(self.tables.faced, name, hold, random) for hold in holds]
            subject, rows, characters = name.upper(), [row for row, _ in found], [c for _, c in found]
        else:
            script = self.scripts[random.integers(len(self.scripts))]
            others = [s for s in self.scripts if s != script]
            chosen = [script if hold else others[random.integers(len(others))] for hold in holds]
            characters = [self._one(self.tables.by_script[s], random) for s in chosen]
            subject, rows = script_title(script), [self._picture(c, random) for c in characters]
        return [self.data.images[row] for row in rows], f"BOTH ARE {subject}", "TRUE" if both else "FALSE", characters

    def _entailment(self, random: np.random.Generator) -> Any:
        """A claim by name about a picture with one side hidden, or none; drawn until it has the relation wanted."""
        wanted = RELATIONS[random.integers(len(RELATIONS))]
        bases = sorted(self.tables.by_base)
        while True:
            base = bases[random.integers(len(bases))]
            c, claimed = self._one(self.tables.by_base[base], random), self._one(self.tables.by_base[base], random)
            if wanted == "CONTRADICTS" and random.integers(2):  # half of them by the letter, half by its marks
                claimed = self._one(self.tables.by_base[bases[random.integers(len(bases))]], random)
            hidden = (None, ABOVE, BELOW)[random.integers(3)]
            if relation(int(self.data.codepoints[c]), int(self.data.codepoints[claimed]), hidden) == wanted:
                image = hide(self.data.images[self._picture(c, random)], hidden)
                return [image], f"{CLAIM} {self.data.captions[claimed]}", wanted, [c]


class Answerer(nn.Module):
    """A pre-trained fusion model and one linear head over all answers."""

    def __init__(self, model: FusionModel) -> None:
        super().__init__()
        self.fusion_model = model
        width = model.patch_in.out_features
        self.which = nn.Parameter(torch.zeros(2, 1, width))  # first or second picture
        self.head = nn.Linear(width, len(ANSWERS))

    def forward(self, pictures: Tensor, tokens: Tensor) -> Tensor:
        """Pictures uint8 [N, P, 32, 32], tokens [N, L] -> logits [N, answers]."""
        count = pictures.shape[1]
        patches = self.fusion_model.see(pictures.flatten(0, 1)).unflatten(0, (-1, count)) + self.which[:count]
        words, mask = self.fusion_model.words(tokens)
        return self.head(self.fusion_model.fuse(words, mask, patches.flatten(1, 2))[:, 0])


def fine_tune(
    model: FusionModel, data: GlyphData, *, steps: int, batch: int = 128, lr: float = 1e-3, seed: int = 0,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> Answerer:  # fmt: skip
    """Teaches a copy of a pre-trained model to answer questions about the training characters, each kind in turn."""
    torch.manual_seed(seed)
    questions, answerer = Questions(data, "train"), Answerer(copy.deepcopy(model)).train()
    trained = [p for name, p in answerer.named_parameters() if not name.startswith(("fusion_model.independent",))]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    for step in range(steps):
        rate = lr * min(1.0, (step + 1) / max(1, steps // 10)) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        asked = questions.draw(KINDS[step % len(KINDS)], batch, np.random.default_rng([seed, 5, step]))
        loss = cross_entropy(_logits(answerer, asked), torch.from_numpy(asked.answers))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        report(step + 1, float(loss.detach()))
    return answerer


def _logits(answerer: Answerer, asked: Asked) -> Tensor:
    tokens, _ = answerer.fusion_model.prepare_captions(asked.texts).all()
    return answerer(torch.from_numpy(asked.pictures), tokens)


@torch.no_grad()
def evaluate_questions(
    answerer: Answerer, data: GlyphData, split: str = "test", count: int = TEST_QUESTIONS
) -> dict[str, dict[str, float]]:
    """Accuracy on questions about a split's characters, the same for every model; and of guessing, by kind."""
    answerer.eval()
    questions, found = Questions(data, split), {}
    for number, kind in enumerate(KINDS):
        asked = questions.draw(kind, count, np.random.default_rng([number, 6]))
        right = (_logits(answerer, asked).argmax(1).numpy() == asked.answers).mean()
        found[kind] = {"accuracy": float(right), "by chance": 1 / len(np.unique(asked.answers))}
    return found
