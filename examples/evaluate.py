"""How good two towers are on characters that they never saw: retrieval both ways, and zero-shot classes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from glyphs import GlyphData
from torch import Tensor
from torch.nn.functional import normalize
from towers import TwoTowers
from unicode_scripts import SCRIPTS

import contrastive_kernels as ck

__all__ = ["Scores", "evaluate", "ranks", "zero_shot_accuracy"]

RECALL_AT = (1, 5, 10)
CHUNK = 1024  # pictures encoded at a time


@dataclass(frozen=True)
class Scores:
    """Recall in 0 ... 1 by k, and balanced accuracy of the script; each with what guessing would reach."""

    candidates: int
    image_to_text: dict[int, float]
    text_to_image: dict[int, float]
    recall_by_chance: dict[int, float]
    classes: int
    zero_shot: float
    zero_shot_by_chance: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@torch.no_grad()
def encode_pictures(model: TwoTowers, data: GlyphData, rows: np.ndarray[Any, Any]) -> Tensor:
    """Unit features [len(rows), D] of some of the set's pictures."""
    device = model.log_logit_scale.device
    parts = [rows[i : i + CHUNK] for i in range(0, len(rows), CHUNK)]
    return torch.cat([model.encode_images(torch.from_numpy(data.images[part]).to(device)) for part in parts])


@torch.no_grad()
def encode_texts(model: TwoTowers, texts: list[str]) -> Tensor:
    """Unit features [len(texts), D]."""
    return model.encode_captions(model.prepare_captions(texts).all())


def ranks(queries: Tensor, candidates: Tensor) -> Tensor:
    """How many candidates stand before each query's own, [N]; a tie counts against it, and so does NaN."""
    return ck.retrieval_metrics(queries, candidates).ranks


def _recall(rank: Tensor) -> dict[int, float]:
    return {k: float((rank < k).double().mean()) for k in RECALL_AT}


def class_features(model: TwoTowers, classes: list[int]) -> Tensor:
    """Unit features [len(classes), D]: the mean of each script's prompts."""
    means = [encode_texts(model, list(SCRIPTS[c].prompts)).mean(0) for c in classes]
    return normalize(torch.stack(means), dim=1)


def zero_shot_accuracy(model: TwoTowers, data: GlyphData, rows: np.ndarray[Any, Any]) -> tuple[float, int]:
    """Balanced accuracy of the script (the mean of the classes' own accuracies) over pictures, and count of classes.

    Characters that are in no class are left out; classes without a picture here are not offered.
    """
    truth = data.scripts[data.character[rows]]
    rows, truth = rows[truth >= 0], truth[truth >= 0]
    classes = sorted({int(c) for c in truth})
    scores = encode_pictures(model, data, rows) @ class_features(model, classes).T
    found = np.asarray(classes)[scores.argmax(1).cpu().numpy()]
    return float(np.mean([(found[truth == c] == c).mean() for c in classes])), len(classes)


@torch.no_grad()
def evaluate(model: TwoTowers, data: GlyphData, split: str = "test") -> Scores:
    """Retrieval with one picture and one caption of each character of the split; zero-shot over all its pictures."""
    training = model.training
    model.eval()
    characters = data.characters(split)
    image = encode_pictures(model, data, data.one_each(characters))
    text = encode_texts(model, [data.captions[c] for c in characters])
    accuracy, classes = zero_shot_accuracy(model, data, np.flatnonzero(np.isin(data.character, characters)))
    model.train(training)
    return Scores(
        candidates=len(characters),
        image_to_text=_recall(ranks(image, text)),
        text_to_image=_recall(ranks(text, image)),
        recall_by_chance={k: min(1.0, k / len(characters)) for k in RECALL_AT},
        classes=classes,
        zero_shot=accuracy,
        zero_shot_by_chance=1 / classes,
    )
