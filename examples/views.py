"""Augmented views of both modalities: another face and another shift of a character, a caption with words dropped."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from glyphs import GlyphData, shift
from torch import Tensor
from towers import CaptionSet

__all__ = ["CaptionViews", "all_faces", "drop_words"]

COPIES = 4  # of every caption with other words dropped: cheaper than dropping anew at every step, and as good
WINDOW = 20  # pixels of the side of a picture's part: strokes, slant and serifs are in it, the whole letter seldom


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


def all_faces(
    data: GlyphData, characters: npt.NDArray[np.int64], count: int, step: int, seed: int, max_shift: int
) -> tuple[Tensor, Tensor]:
    """Two views [count, 32, 32] of the pictures that independent features are learnt from: moved, most of it cut away.

    The first characters of a batch, each in all of its faces. A picture is pulled towards another part of itself, not
    towards another face, which would make the features forget the face; and among its negatives is its own character in
    every other face, so that knowing the character, which the caption tells as well, is not enough.
    """
    first = data.first[characters]
    faces = data.first[characters + 1] - first  # of each character
    end = faces.cumsum()
    number = np.arange(count)
    which = np.searchsorted(end, number, side="right")  # the character of each row
    pictures = data.images[first[which] + number - (end - faces)[which]]
    random = np.random.default_rng([seed, 4, step])
    shifts = random.integers(-max_shift, max_shift + 1, (2, 2, count))
    once, again = (torch.from_numpy(_window(shift(pictures, down, right), random)) for down, right in shifts)
    return once, again


def _window(pictures: npt.NDArray[np.uint8], random: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Pictures [N, H, W] of which a square somewhere is left, paper around it."""
    count, height, width = pictures.shape
    top, left = random.integers(0, [[height - WINDOW + 1], [width - WINDOW + 1]], (2, count))
    rows, columns = np.arange(height) - top[:, None], np.arange(width) - left[:, None]
    kept = [(place >= 0) & (place < WINDOW) for place in (rows, columns)]
    return np.where(kept[0][:, :, None] & kept[1][:, None, :], pictures, 0).astype(pictures.dtype)
