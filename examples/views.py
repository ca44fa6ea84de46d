"""Augmented views of both modalities: another face and another shift of a character, a caption with words dropped."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from glyphs import Batch, shift
from torch import Tensor
from towers import CaptionSet

__all__ = ["CaptionViews", "drop_words", "same_faces"]

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


def same_faces(batch: Batch, step: int, seed: int, max_shift: int) -> tuple[Tensor, Tensor]:
    """Pictures [2 (B // 2), 32, 32] that independent features are learnt from, and each of them moved once more.

    Half of the batch's characters, each in two faces. A picture is pulled towards itself moved, not towards another
    face, which would make the features forget the face; and among its negatives is its own character in another face,
    so that knowing the character, which the caption tells as well, is not enough.
    """
    half = len(batch.characters) // 2
    pictures = np.concatenate([batch.images[0][:half], batch.images[1][:half]])
    random = np.random.default_rng([seed, 4, step])
    shifts = random.integers(-max_shift, max_shift + 1, (2, len(pictures)))
    return torch.from_numpy(pictures), torch.from_numpy(shift(pictures, shifts[0], shifts[1]))
