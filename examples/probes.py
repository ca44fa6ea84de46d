"""What two towers know, on characters that they never saw: zero-shot and few-shot classes, retrieval, faces, the gap.

Linear probes are least squares with a ridge, in closed form: no iterations, no seed, and good enough to compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from evaluate import CHUNK, encode_pictures, encode_texts
from glyphs import GlyphData
from structured_towers import StructuredTowers
from tasks import ATTRIBUTES, CATEGORIES, attribute, category_index, tells_face
from torch import Tensor
from torch.nn.functional import normalize, one_hot
from towers import TwoTowers
from unicode_scripts import SCRIPTS

import contrastive_kernels as ck

__all__ = ["SHOTS", "TOP", "clouds", "evaluate_towers", "few_shot", "gap", "linear_probe", "retrieval", "top_k"]

TOP = (1, 3, 5)
SHOTS = (1, 5, 20)
FACE_SHOTS = (5, 20)
DRAWS = 5  # of the pictures that a few-shot classifier learns from
RIDGE = 1e-3  # times the number of training pictures
FACE_RIDGE = 1e-5  # for 6,000 pictures: a unit vector's 128 entries have squares of 1 / 128, 1e-3 would blur them
PROBE_PICTURES = 6000  # of training characters, for the probe of the face


# Classifiers


def top_k(scores: Tensor, truth: Tensor, ks: Sequence[int] = TOP) -> dict[int, float]:
    """Balanced accuracy by k: the mean over the classes of the share that has its class among the k best.

    Parameters
    ----------
    scores : Tensor
        [N, C].
    truth : Tensor
        Columns of ``scores`` [N]; classes that do not occur are not averaged over.
    ks : sequence of int
    """
    rank = scores.shape[1] - 1 - (scores < scores.gather(1, truth[:, None])).sum(1)  # a tie counts against it
    return {k: float(torch.stack([(rank[truth == c] < k).double().mean() for c in truth.unique()]).mean()) for k in ks}


def linear_probe(x: Tensor, truth: Tensor, classes: int, ridge: float = RIDGE) -> Callable[[Tensor], Tensor]:
    """Least squares from features [N, D] to classes [N], every class with the same weight: a function to scores [M, C].

    With W = diag of 1 / the size of the row's class: (XT W X + ridge tr(W) I) B = XT W Y, X with a column of ones.
    """
    x, target = _with_one(x), one_hot(truth, classes).double()
    weight = target @ (1 / target.sum(0).clamp_min(1))
    left = x.T @ (weight[:, None] * x) + ridge * weight.sum() * torch.eye(x.shape[1], dtype=x.dtype)
    solution = torch.linalg.solve(left, x.T @ (weight[:, None] * target))
    return lambda features: _with_one(features) @ solution


def _with_one(x: Tensor) -> Tensor:
    return torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], dim=1)


def few_shot(
    x: Tensor, truth: Tensor, shots: int, test_x: Tensor, test_truth: Tensor, classes: int, draws: int = DRAWS
) -> float:
    """Top-1 balanced accuracy of a probe that learns from so many training pictures a class; the mean of some draws."""
    found = []
    for draw in range(draws):
        order = torch.from_numpy(np.random.default_rng(draw).permutation(len(truth)))
        rows = torch.cat([order[truth[order] == c][:shots] for c in range(classes)])
        found.append(top_k(linear_probe(x[rows], truth[rows], classes)(test_x), test_truth, (1,))[1])
    return float(np.mean(found))


# Features


@torch.no_grad()
def picture_features(model: StructuredTowers, images: npt.NDArray[np.uint8]) -> tuple[Tensor, Tensor | None]:
    """Shared and independent features [N, D] of pictures [N, 32, 32], on the CPU."""
    device = model.log_logit_scale.device
    parts = [
        model.image_features(torch.from_numpy(images[i : i + CHUNK]).to(device)) for i in range(0, len(images), CHUNK)
    ]
    shared = torch.cat([part[0] for part in parts]).cpu()
    independent = [part[1] for part in parts if part[1] is not None]
    return shared, torch.cat(independent).cpu() if independent else None


def gap(image: Tensor, text: Tensor) -> float:
    """Distance between the centres of two clouds of features [N, D]: the modality gap."""
    return float((image.mean(0) - text.mean(0)).norm())


def clouds(model: TwoTowers, data: GlyphData, split: str, count: int = 200) -> dict[str, list[list[float]]]:
    """Held-out characters' picture and caption features in two dimensions: along the gap, and across it.

    Across is where both vary most. The principal components alone would not show the gap: content varies far more.
    """
    characters = np.random.default_rng(0).permutation(data.characters(split))[:count]
    image = encode_pictures(model.eval(), data, data.one_each(characters)).cpu()
    text = encode_texts(model, [data.captions[c] for c in characters]).cpu()
    both = torch.cat([image, text]).double()
    centred, along = both - both.mean(0), normalize(image.double().mean(0) - text.double().mean(0), dim=0)
    beside = centred - (centred @ along)[:, None] * along
    directions = torch.stack([along, torch.linalg.svd(beside, full_matrices=False)[2][0]])
    flat = (centred @ directions.T).round(decimals=4)
    return {"image": flat[: len(image)].tolist(), "text": flat[len(image) :].tolist()}


class _Classes:
    """A classification task: each character's class [C] (-1: none) and how a text encoder is asked for each class."""

    def __init__(
        self, data: GlyphData, split: str, known: npt.NDArray[np.int64], prompts: Sequence[Sequence[str]]
    ) -> None:
        # A class that training or the split do not have is not offered.
        present = [set(known[data.characters(part)].tolist()) - {-1} for part in ("train", split)]
        self.classes = sorted(present[0] & present[1])
        number = {c: i for i, c in enumerate(self.classes)}
        self.truth = np.array([number.get(int(c), -1) for c in known], dtype=np.int64)
        self.prompts = [list(prompts[c]) for c in self.classes]

    def text_features(self, model: StructuredTowers) -> Tensor:
        """The mean of each class's prompts [C, D], unit-norm."""
        return normalize(torch.stack([encode_texts(model, texts).mean(0) for texts in self.prompts]), dim=1).cpu()


def _tasks(data: GlyphData, split: str) -> dict[str, _Classes]:
    categories = np.array([category_index(int(c)) for c in data.codepoints], dtype=np.int64)
    return {
        "script": _Classes(data, split, data.scripts, [script.prompts for script in SCRIPTS]),
        "category": _Classes(data, split, categories, [category.prompts for category in CATEGORIES]),
    }


def _pictures(data: GlyphData, split: str) -> npt.NDArray[np.int64]:
    """Rows of the pictures of a split's characters."""
    return np.flatnonzero(np.isin(data.character, data.characters(split)))


def evaluate_towers(
    model: StructuredTowers, data: GlyphData, shifted: GlyphData, split: str = "test"
) -> dict[str, Any]:
    """Every number of the two towers' part of the table.

    Parameters
    ----------
    model : StructuredTowers
    data : GlyphData
        What it was trained on: its training characters are taught to the probes.
    shifted : GlyphData
        Pictures of the same characters in faces that were never trained on.
    split : str
        Whose characters are asked about.
    """
    training = model.training
    model.eval()
    result: dict[str, Any] = {"zero-shot": {}, "few-shot": {}, "classes": {}}
    train_rows, test_rows = _pictures(data, "train"), _pictures(data, split)
    train_rows = np.random.default_rng(0).permutation(train_rows)[:PROBE_PICTURES]
    train, test = picture_features(model, data.images[train_rows]), picture_features(model, data.images[test_rows])
    for name, task in _tasks(data, split).items():
        texts, truth = task.text_features(model), torch.from_numpy(task.truth[data.character[test_rows]])
        result["classes"][name] = len(task.classes)
        result["zero-shot"][name] = top_k((test[0] @ texts.T)[truth >= 0], truth[truth >= 0])
        learnt = torch.from_numpy(task.truth[data.character[train_rows]])
        few = (test[0][truth >= 0], truth[truth >= 0], len(task.classes))
        result["few-shot"][name] = {k: few_shot(train[0][learnt >= 0], learnt[learnt >= 0], k, *few) for k in SHOTS}
    result["shift"] = _shift(model, data, shifted, split)
    result["retrieval"], result["gap"] = retrieval(model, data, split)
    result["face"] = face_probes(model, data, split)
    model.train(training)
    return result


def _shift(model: StructuredTowers, data: GlyphData, shifted: GlyphData, split: str) -> dict[str, dict[int, float]]:
    """Zero-shot script of the same held-out characters in known faces and in those never seen."""
    characters = np.intersect1d(data.codepoints[data.characters(split)], shifted.codepoints)
    found = {}
    for name, part in (("known faces", data), ("new faces", shifted)):
        rows = np.flatnonzero(np.isin(part.codepoints[part.character], characters))
        truth = part.scripts[part.character[rows]]
        rows, truth = rows[truth >= 0], truth[truth >= 0]
        classes, columns = np.unique(truth, return_inverse=True)
        task = _Classes(data, split, data.scripts, [script.prompts for script in SCRIPTS])
        offered = np.searchsorted(task.classes, classes)
        keep = np.isin(classes, task.classes)[columns]
        scores = picture_features(model, part.images[rows[keep]])[0] @ task.text_features(model).T
        found[name] = top_k(scores, torch.from_numpy(offered[columns[keep]]))
    return found


def retrieval(model: TwoTowers, data: GlyphData, split: str = "test") -> tuple[dict[str, float], float]:
    """Recall of held-out captions by pictures and back, one of each; and the gap between their clouds."""
    characters = data.characters(split)
    image = encode_pictures(model, data, data.one_each(characters)).cpu()
    text = encode_texts(model, [data.captions[c] for c in characters]).cpu()
    result: dict[str, float] = {"candidates": len(characters)}
    for name, queries, documents in (("image to text", image, text), ("text to image", text, image)):
        metrics = ck.retrieval_metrics(queries, documents)
        result |= {f"{name} R@{k}": value for k, value in metrics.recall.items()}
        result |= {f"{name} median rank": metrics.median_rank, f"{name} MRR": metrics.mean_reciprocal_rank}
    return result, gap(image, text)


def face_probes(model: StructuredTowers, data: GlyphData, split: str) -> dict[str, dict[str, float]]:
    """What shared and independent features, which have one width, tell about the face of letters.

    Balanced accuracies of linear probes: each attribute and their mean (chance is 0.5), which face it is, learnt from
    few pictures a face or from many; and how often the nearest training picture, of another letter, has the same face.
    """
    told = tells_face(data)
    learnt_rows, asked_rows = (
        rows[told[data.character[rows]]] for rows in map(partial(_pictures, data), ("train", split))
    )
    learnt_rows = np.random.default_rng(0).permutation(learnt_rows)[:PROBE_PICTURES]
    learnt, asked = picture_features(model, data.images[learnt_rows]), picture_features(model, data.images[asked_rows])
    return {
        kind: _face(data, learnt_rows, asked_rows, taught, features)
        for kind, taught, features in zip(("shared", "independent"), learnt, asked)
        if taught is not None and features is not None
    }


def _face(
    data: GlyphData,
    learnt_rows: npt.NDArray[np.int64],
    asked_rows: npt.NDArray[np.int64],
    learnt: Tensor,
    asked: Tensor,
) -> dict[str, float]:
    found = {}
    for name in ATTRIBUTES:
        taught, truth = (
            torch.from_numpy(attribute(name, data.face[rows])).long() for rows in (learnt_rows, asked_rows)
        )
        found[name] = _probe(learnt, taught, asked, truth)
    found["mean"] = float(np.mean(list(found.values())))
    taught, truth = (
        torch.from_numpy(np.unique(data.face[rows], return_inverse=True)[1]) for rows in (learnt_rows, asked_rows)
    )
    faces = int(taught.max()) + 1
    for shots in FACE_SHOTS:
        found[f"which, {shots} shots"] = few_shot(learnt, taught, shots, asked, truth, faces)
    found["which"] = _probe(learnt, taught, asked, truth)
    found["by chance"] = 1 / faces
    nearest = taught[(asked @ learnt.T).argmax(1)]
    found["nearest"] = float((nearest == truth).double().mean())
    return found


def _probe(learnt: Tensor, taught: Tensor, asked: Tensor, truth: Tensor) -> float:
    """Top-1 balanced accuracy."""
    return top_k(linear_probe(learnt, taught, int(taught.max()) + 1, FACE_RIDGE)(asked), truth, (1,))[1]
