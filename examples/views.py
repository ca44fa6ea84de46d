"""Augmented views of both modalities: another face and another shift of a character, a caption with words dropped."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from glyphs import Batch, shift
from torch import Tensor
from towers import CaptionSet

__all__ = ["CaptionViews", "drop_words", "same_face"]

COPIES = 4  # of every caption with other words dropped: cheaper than dropping anew at every step, and as good


def drop_words(caption: str, share: float, random: np.random.Generator) -> str:
    """The caption without some of its words; one always stays."""
    words = caption.split()
    kept = random.random(len(words)) >= share
    kept[random.integers(len(words))] = True
    return " ".join(word for word, keep in zip(words, kept) if keep)


class CaptionViews:
    """Captions with words dropped, some versions of each drawn once.

    Parameters
    ----------
    captions : sequence of str
        [C].
    prepare : callable
        Makes texts ready for a text encoder.
    share : float
        Of the words that are dropped, 0 ... 1.
    seed : int
    """

    def __init__(
        self, captions: Sequence[str], prepare: Callable[[Sequence[str]], CaptionSet], share: float, seed: int
    ) -> None:
        random = np.random.default_rng([seed, 2])
        self._count, self._seed = len(captions), seed
        self._versions = prepare([drop_words(text, share, random) for _ in range(COPIES) for text in captions])

    def view(self, characters: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """One version of each caption [N]; which one depends on seed and step alone."""
        version = np.random.default_rng([self._seed, 3, step]).integers(COPIES, size=len(characters))
        return self._versions[torch.from_numpy(version).to(characters.device) * self._count + characters]


def same_face(batch: Batch, step: int, seed: int, max_shift: int) -> Tensor:
    """The batch's first pictures [B, 32, 32] moved once more: a view that keeps the face, as the second one does not.

    Independent features are pulled towards this view: pulled towards another face, they would have to forget it.
    """
    random = np.random.default_rng([seed, 4, step])
    shifts = random.integers(-max_shift, max_shift + 1, (2, len(batch.characters)))
    return torch.from_numpy(shift(batch.images[0], shifts[0], shifts[1]))
