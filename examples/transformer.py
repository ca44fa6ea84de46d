"""A small transformer over words, alone as a text tower or with cross-attention to an image's patches."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["Layer", "TextTransformer", "Vocabulary", "WordTower", "Words"]

LENGTH = 16  # tokens of a text at most: 99 % of the captions fit
LEAST = 3  # occurrences that make a word a token
SPECIAL = ("<pad>", "<start>", "<mask>")
PAD, START, MASK = range(3)
_PIECES = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


class Vocabulary:
    """Words that occur often enough, and letters and digits for all others: ZHE is Z, H, E.

    Parameters
    ----------
    texts : sequence of str
        Of the training characters alone.
    least : int
        Occurrences that make a word a token.
    """

    def __init__(self, texts: Sequence[str], least: int = LEAST) -> None:
        counts = Counter(word for text in texts for word in _words(text))
        words = sorted(word for word, count in counts.items() if count >= least and len(word) > 1)
        self.tokens = [*SPECIAL, *_PIECES, *words]
        self._number = {token: i for i, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        """Count of tokens."""
        return len(self.tokens)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, with <start> before them; at most LENGTH."""
        numbers = [START]
        for word in _words(text):
            numbers += [self._number[word]] if word in self._number else [self._number[piece] for piece in word]
        return numbers[:LENGTH]


def _words(text: str) -> list[str]:
    """As in ``towers.n_grams``: a digit is a word by itself."""
    return re.findall(r"[A-Z]+|[0-9]", text)


class Words:
    """Texts as tokens [C, LENGTH], padded, and their lengths [C]."""

    def __init__(self, texts: Sequence[str], vocabulary: Vocabulary, device: torch.device | str = "cpu") -> None:
        rows = [vocabulary.encode(text) for text in texts]
        padded = [row + [PAD] * (LENGTH - len(row)) for row in rows]
        self.tokens = torch.tensor(padded, dtype=torch.int64, device=device).view(-1, LENGTH)
        self.lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64, device=device)

    def __getitem__(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Texts [N] -> tokens [N, L], L that of the longest, and lengths [N]."""
        lengths = self.lengths[index]
        return self.tokens[index, : int(lengths.max())], lengths

    def all(self) -> tuple[Tensor, Tensor]:
        """Every text, in order."""
        return self[torch.arange(len(self.tokens), device=self.tokens.device)]


class _Attention(nn.Module):
    """Multi-head attention of queries [N, L, W] to keys [N, K, W]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.queries = nn.Linear(width, width)
        self.keys_values = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """mask: bool [N, 1, 1, K], True where a key may be looked at."""
        queries = self._split(self.queries(x))
        keys, values = (self._split(part) for part in self.keys_values(context).chunk(2, dim=-1))
        mixed = scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        """[N, L, W] -> [N, heads, L, W / heads]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Layer(nn.Module):
    """One pre-norm layer: self-attention, cross-attention if asked for, two dense layers."""

    def __init__(self, width: int, heads: int = 4, cross: bool = False) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3 if cross else 2))
        self.itself = _Attention(width, heads)
        self.other = _Attention(width, heads) if cross else None
        self.dense = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor | None, context: Tensor | None = None) -> Tensor:
        """x [N, L, W], its mask [N, 1, 1, L], context [N, K, W]."""
        normed = self.norms[0](x)
        x = x + self.itself(normed, normed, mask)
        if self.other is not None and context is not None:
            x = x + self.other(self.norms[2](x), context, None)
        return x + self.dense(self.norms[1](x))


class TextTransformer(nn.Module):
    """Embeddings and layers: tokens -> states [N, L, W] and their mask [N, 1, 1, L]."""

    def __init__(self, words: int, width: int, layers: int, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.position = nn.Parameter(torch.randn(LENGTH, width) * 0.02)
        nn.init.normal_(self.embedding.weight, std=0.05)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [N, L]."""
        mask = (tokens != PAD)[:, None, None, :]
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, mask)
        return x, mask


class WordTower(nn.Module):
    """A text tower for ``TwoTowers``: a transformer whose first state goes through one dense layer."""

    def __init__(self, vocabulary: Vocabulary, dim: int, width: int = 96, layers: int = 2) -> None:
        super().__init__()
        self.words = TextTransformer(len(vocabulary), width, layers)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim))

    def forward(self, captions: tuple[Tensor, Tensor]) -> Tensor:
        """Captions as ``Words`` gives them -> [N, dim], not normalised."""
        return self.head(self.words(captions[0])[0][:, 0])
