"""Two small towers, an image encoder and a text encoder, made for training on two CPU cores."""

from __future__ import annotations

import itertools
import math
import re
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import torch
from processes import BatchNorm1d, BatchNorm2d
from torch import Tensor, nn
from torch.nn.functional import normalize, pixel_unshuffle

__all__ = ["CaptionSet", "Captions", "ImageTower", "TextTower", "TwoTowers", "prepare_images"]

BUCKETS = 2**15  # rows of the n-gram table; the captions have 18,000 different n-grams
MAX_LOGIT_SCALE = 100.0  # as in CLIP


def prepare_images(images: Tensor) -> Tensor:
    """uint8 [N, 32, 32] -> float [N, 4, 16, 16] in 0 ... 1: each 2 x 2 pixels are one point, channels last."""
    points = pixel_unshuffle(images.unsqueeze(1).float().div_(255), 2)
    return points.contiguous(memory_format=torch.channels_last)


def n_grams(caption: str) -> list[str]:
    """Words, adjacent words, words in this order at any distance, and two or three adjacent letters of a word.

    A digit is a word by itself: DOTS-124 is DOTS, 1, 2 and 4.
    """
    words = re.findall(r"[A-Z]+|[0-9]", caption)
    marked = [f"<{word}>" for word in words]
    adjacent = [f"{a} {b}" for a, b in itertools.pairwise(words)]
    distant = [f"{a} ... {b}" for i, a in enumerate(words) for b in words[i + 2 :]]
    letters = [word[i : i + n] for n in (2, 3) for word in marked for i in range(len(word) - n + 1)]
    return marked + adjacent + distant + letters


@lru_cache(maxsize=8192)
def _buckets(caption: str) -> tuple[int, ...]:
    """Rows of the n-gram table; the names of classes are asked for again and again."""
    return tuple(zlib.crc32(gram.encode()) % BUCKETS for gram in n_grams(caption))


class CaptionSet(Protocol):
    """Texts made ready for a text encoder: two tensors, whatever they mean to it."""

    def __getitem__(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Some of the texts, by number [N]."""

    def all(self) -> tuple[Tensor, Tensor]:
        """Every text, in order."""


class Captions:
    """Captions as numbers of hashed n-grams, all in one tensor.

    Hashing needs no vocabulary: a word that was never seen in training still has its triples of letters.

    Parameters
    ----------
    captions : sequence of str
    device : torch.device or str
    """

    def __init__(self, captions: Sequence[str], device: torch.device | str = "cpu") -> None:
        rows = [_buckets(caption) for caption in captions]
        self.grams = torch.tensor([gram for row in rows for gram in row], device=device)  # [G]
        self.count = torch.tensor([len(row) for row in rows], device=device)  # [C]
        self.start = self.count.cumsum(0) - self.count

    def __getitem__(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Captions [N] -> their n-grams end to end [G'], and where each caption starts among them [N]."""
        count = self.count[index]
        start = count.cumsum(0) - count
        within = torch.arange(int(count.sum()), device=count.device) - start.repeat_interleave(count)
        return self.grams[self.start[index].repeat_interleave(count) + within], start

    def all(self) -> tuple[Tensor, Tensor]:
        """Every caption, in order."""
        return self.grams, self.start


def _block(channels_in: int, channels: int) -> nn.Sequential:
    """Halves height and width."""
    convolution = nn.Conv2d(channels_in, channels, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(convolution, BatchNorm2d(channels), nn.ReLU(inplace=True))


class ImageTower(nn.Module):
    """Two strided convolutions and two dense layers: [N, 4, 16, 16] -> [N, dim].

    A third convolution, on the full 32 x 32 pixels, doubles the tower's time (it moves memory, not numbers) and bought
    no more recall in the same time than wider layers.
    """

    def __init__(self, dim: int, width: int = 32) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(_block(4, width), _block(width, 2 * width))
        self.features = 2 * width * 16  # of the convolutions
        hidden = 2 * dim
        self.head = nn.Sequential(
            nn.Linear(self.features, hidden, bias=False), BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, dim)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Not normalised."""
        return self.head(self.convolutions(images).flatten(1))


class TextTower(nn.Module):
    """The sum of hashed n-grams' vectors and one hidden layer: captions -> [N, dim].

    On two cores this learnt more per second than a small transformer over the words: names are made of few parts whose
    order says little, and a part's vector is learnt from every name that has it.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(BUCKETS, dim, mode="sum")
        nn.init.normal_(self.table.weight, std=0.1)
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, captions: tuple[Tensor, Tensor]) -> Tensor:
        """Captions as ``Captions`` gives them; not normalised."""
        return self.head(self.table(*captions))


class TwoTowers(nn.Module):
    """Both towers, the temperature and SigLIP's bias.

    Parameters
    ----------
    dim : int
        Width of the common space.
    logit_scale, logit_bias : float
        What they start from.
    """

    def __init__(self, dim: int = 256, logit_scale: float = 1 / 0.07, logit_bias: float = 0.0) -> None:
        super().__init__()
        self.image = ImageTower(dim)
        self.text = TextTower(dim)
        self.log_logit_scale = nn.Parameter(torch.tensor(math.log(logit_scale)))
        self.logit_bias = nn.Parameter(torch.tensor(logit_bias))

    def forward(self, images: Tensor, captions: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Pictures uint8 [N, 32, 32] and their captions -> unit features [N, D] of both."""
        return self.encode_images(images), self.encode_captions(captions)

    def encode_images(self, images: Tensor) -> Tensor:
        """Unit features [N, D]."""
        return normalize(self.image(prepare_images(images)), dim=1)

    def encode_captions(self, captions: tuple[Tensor, Tensor]) -> Tensor:
        """Unit features [N, D]."""
        return normalize(self.text(captions), dim=1)

    def prepare_captions(self, texts: Sequence[str]) -> CaptionSet:
        """Texts as ``encode_captions`` takes them."""
        return Captions(texts, self.log_logit_scale.device)

    @property
    def logit_scale(self) -> Tensor:
        """What multiplies the dot products, 0-d."""
        return self.log_logit_scale.exp()

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keeps it within 1 ... 100; to be called after every optimiser step."""
        self.log_logit_scale.clamp_(0.0, math.log(MAX_LOGIT_SCALE))
