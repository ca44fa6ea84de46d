"""A real image-text data set with no download: the characters of the fonts that matplotlib ships, and their names.

Every character of the DejaVu and STIX fonts is drawn at 32 x 32 in each of up to 16 faces and captioned by its Unicode
name (``CYRILLIC SMALL LETTER ZHE WITH BREVE``). Names are made of words, so a text encoder can know a character that
it has never met, as it knows a caption that it has never met.

    python examples/glyphs.py             draws the set (once; it is kept on disk) and prints what is in it

>>> data = load_glyphs()                                        # doctest: +SKIP
>>> sampler = BatchSampler(data, batch=4096, seed=0)            # doctest: +SKIP
>>> batch = sampler[0]                                          # doctest: +SKIP

Faces are an augmentation of the image, small shifts another one (``BatchSampler``, ``views=2`` draws both anew). The
split is by *character*: no face of a held-out character is ever trained on.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import sys
import tempfile
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from files import Mistake, read_sealed, reason, write_sealed
from options import run
from rich.console import Console
from rich.progress import track
from unicode_scripts import SCRIPTS, script_index

__all__ = ["FACES", "SPLITS", "Batch", "BatchSampler", "Face", "GlyphData", "default_folder", "load_glyphs", "shift"]

SIZE = 32  # pixels of a side
SPLITS = ("train", "validation", "test")
_SPLIT_ENDS = (0.75, 0.85, 1.0)  # train, validation and test: 75, 10 and 15 % of the characters
_FORMAT = 2  # part of the cache's key: raise it whenever the drawing below, or the form of the file, changes


@dataclass(frozen=True)
class Face:
    """One font file and what only a picture in it can tell: none of this is in the caption."""

    file: str
    family: str
    serif: bool = False
    mono: bool = False
    bold: bool = False
    italic: bool = False


# Left out, of what matplotlib ships: cm*10 (TeX's own encoding: the glyph at "A" need not be an A), STIXNonUni*
# (private numbers, so no names), STIXSiz* (the same brackets in larger sizes, which 32 x 32 pixels do not hold),
# DejaVu*Display (some fifty arrows and brackets, redrawn: too few to be a face) and LastResort (a box per block).
FACES: tuple[Face, ...] = (
    Face("DejaVuSans.ttf", "DejaVu Sans"),
    Face("DejaVuSans-Bold.ttf", "DejaVu Sans", bold=True),
    Face("DejaVuSans-Oblique.ttf", "DejaVu Sans", italic=True),
    Face("DejaVuSans-BoldOblique.ttf", "DejaVu Sans", bold=True, italic=True),
    Face("DejaVuSerif.ttf", "DejaVu Serif", serif=True),
    Face("DejaVuSerif-Bold.ttf", "DejaVu Serif", serif=True, bold=True),
    Face("DejaVuSerif-Italic.ttf", "DejaVu Serif", serif=True, italic=True),
    Face("DejaVuSerif-BoldItalic.ttf", "DejaVu Serif", serif=True, bold=True, italic=True),
    Face("DejaVuSansMono.ttf", "DejaVu Sans Mono", mono=True),
    Face("DejaVuSansMono-Bold.ttf", "DejaVu Sans Mono", mono=True, bold=True),
    Face("DejaVuSansMono-Oblique.ttf", "DejaVu Sans Mono", mono=True, italic=True),
    Face("DejaVuSansMono-BoldOblique.ttf", "DejaVu Sans Mono", mono=True, bold=True, italic=True),
    Face("STIXGeneral.ttf", "STIX General", serif=True),
    Face("STIXGeneralBol.ttf", "STIX General", serif=True, bold=True),
    Face("STIXGeneralItalic.ttf", "STIX General", serif=True, italic=True),
    Face("STIXGeneralBolIta.ttf", "STIX General", serif=True, bold=True, italic=True),
)


@dataclass(frozen=True, eq=False)
class GlyphData:
    """Pictures of characters, sorted by character, and tables of what is known about each character.

    Attributes
    ----------
    images : uint8 array [P, 32, 32]
        0 is paper, 255 is ink.
    character : int64 array [P]
        Row of the tables below; does not decrease.
    face : int64 array [P]
        Index into ``FACES``.
    codepoints : int64 array [C]
        The characters' numbers in Unicode, ascending.
    split : int64 array [C]
        Index into ``SPLITS``: a hash of the number alone, so that a character keeps its side on every machine,
        whatever fonts and faces are there.
    """

    images: npt.NDArray[np.uint8]
    character: npt.NDArray[np.int64]
    face: npt.NDArray[np.int64]
    codepoints: npt.NDArray[np.int64]

    def __len__(self) -> int:
        """Count of pictures, P."""
        return len(self.images)

    @cached_property
    def captions(self) -> list[str]:
        """Unicode names, [C]."""
        return [unicodedata.name(chr(c)) for c in self.codepoints]

    @cached_property
    def categories(self) -> list[str]:
        """Unicode general categories ("Lu", "Sm", ...), [C]."""
        return [unicodedata.category(chr(c)) for c in self.codepoints]

    @cached_property
    def scripts(self) -> npt.NDArray[np.int64]:
        """Index into ``unicode_scripts.SCRIPTS`` or -1, [C]."""
        return np.array([script_index(int(c)) for c in self.codepoints], dtype=np.int64)

    @cached_property
    def split(self) -> npt.NDArray[np.int64]:
        """Index into ``SPLITS``, [C]."""
        return np.searchsorted(_SPLIT_ENDS, [_unit_hash(int(c)) for c in self.codepoints], side="right")

    @cached_property
    def checksum(self) -> str:
        """Of all four arrays: a run goes on with the data that it began with, or not at all."""
        found = hashlib.blake2b(digest_size=16)
        for table in (self.images, self.character, self.face, self.codepoints):
            found.update(np.ascontiguousarray(table).data)
        return found.hexdigest()

    @cached_property
    def first(self) -> npt.NDArray[np.int64]:
        """Pictures of character c are ``first[c]`` up to, not including, ``first[c + 1]``; [C + 1]."""
        return np.searchsorted(self.character, np.arange(len(self.codepoints) + 1))

    def characters(self, split: str) -> npt.NDArray[np.int64]:
        """Rows of the characters of "train", "validation" or "test"."""
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {SPLITS}, got {split!r}")
        return np.flatnonzero(self.split == SPLITS.index(split))

    def one_each(self, characters: npt.NDArray[np.int64], seed: int = 0) -> npt.NDArray[np.int64]:
        """One picture of each character, in a face drawn by ``seed``: row of ``images`` for each, [len(characters)]."""
        first, count = self.first[characters], self.first[characters + 1] - self.first[characters]
        return first + (np.random.default_rng(seed).random(len(characters)) * count).astype(np.int64)

    def subset(self, characters: npt.NDArray[np.int64] | None = None, faces: Iterable[int] | None = None) -> GlyphData:
        """The same data set with some characters (rows of the tables) or faces (indices into ``FACES``) only."""
        keep = np.ones(len(self), dtype=bool)
        if characters is not None:
            keep &= np.isin(self.character, characters)
        if faces is not None:
            keep &= np.isin(self.face, list(faces))
        kept, character = np.unique(self.character[keep], return_inverse=True)
        return GlyphData(self.images[keep], character.astype(np.int64), self.face[keep], self.codepoints[kept])


def _unit_hash(codepoint: int) -> float:
    """A number in [0, 1) that depends on the character alone."""
    return int.from_bytes(hashlib.blake2b(codepoint.to_bytes(4, "big"), digest_size=6).digest(), "big") / 2**48


# Drawing


def _font_folder() -> Path:
    """Where matplotlib keeps its fonts."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def _characters_of(path: Path) -> list[int]:
    """Numbers of the characters that a font has and that have a name, ascending.

    Unnamed are control characters, private numbers and surrogates. Spaces and format characters have a name and no ink,
    and are left out when they turn out blank.
    """
    from matplotlib.ft2font import FT2Font

    charmap = FT2Font(str(path)).get_charmap()
    return sorted(int(c) for c, glyph in charmap.items() if glyph > 0 and unicodedata.name(chr(c), "") != "")


class _Pen:
    """Draws characters of one font file on 32 x 32 pixels.

    All characters stand on the same line at the same size, so that capitals are larger than small letters and a
    superscript is high. What is centred is the width that the font reserves, not the ink, so that the left half of a
    box stays left. One too large for the page is drawn smaller.
    """

    EM = 23  # pixels; with it 99.5 % of all glyphs fit
    BASELINE = 24  # row

    def __init__(self, path: Path) -> None:
        from PIL import ImageFont

        # The basic layout draws one glyph per character on every machine; Raqm, where present, would shape Arabic.
        self._font = {
            em: ImageFont.truetype(str(path), em, layout_engine=ImageFont.Layout.BASIC) for em in range(4, self.EM + 1)
        }

    def draw(self, codepoint: int) -> npt.NDArray[np.uint8] | None:
        """The picture [32, 32], or None when nothing is drawn."""
        em = self.EM
        while True:
            mask, (left, top) = self._font[em].getmask2(chr(codepoint), mode="L", anchor="ls")
            width, height = mask.size
            if max(width, height) <= SIZE or em == min(self._font):
                break
            em = max(min(self._font), min(em - 1, em * SIZE // max(width, height)))
        if not width or not height:
            return None
        ink = np.asarray(mask, dtype=np.uint8).reshape(height, width)[:SIZE, :SIZE]
        if not ink.any():
            return None
        height, width = ink.shape
        y = min(max(self.BASELINE + top, 0), SIZE - height)
        x = min(max(round((SIZE - self._font[em].getlength(chr(codepoint))) / 2) + left, 0), SIZE - width)
        image = np.zeros((SIZE, SIZE), dtype=np.uint8)
        image[y : y + height, x : x + width] = ink
        return image


def _draw(fonts: Path, faces: Sequence[int], progress: bool) -> GlyphData:
    """Draw every character of the faces (indices into ``FACES``)."""
    jobs = [(face, c) for face in faces for c in _characters_of(fonts / FACES[face].file)]
    pens = {face: _Pen(fonts / FACES[face].file) for face in faces}
    console = Console()
    images = np.empty((len(jobs), SIZE, SIZE), dtype=np.uint8)
    kept: list[tuple[int, int, int]] = []  # character's number, face, row of images
    missing = {face: pens[face].draw(0x10FFFF) for face in faces}  # never assigned: draws .notdef
    for face, codepoint in track(
        jobs, "drawing glyphs", disable=not (progress and console.is_terminal), console=console, transient=True
    ):
        image, notdef = pens[face].draw(codepoint), missing[face]
        if image is not None and (notdef is None or not np.array_equal(image, notdef)):
            images[len(kept)] = image
            kept.append((codepoint, face, len(kept)))
    kept.sort()
    table = np.array(kept, dtype=np.int64).reshape(-1, 3)
    codepoints, character = np.unique(table[:, 0], return_inverse=True)
    return GlyphData(images[table[:, 2]], character.astype(np.int64), table[:, 1], codepoints)


# The copy on disk


def default_folder() -> Path:
    """``contrastive-kernels`` in ``XDG_CACHE_HOME``, else in ``~/.cache``; without a home, in a temporary folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    try:
        return cache.expanduser() / "contrastive-kernels"
    except RuntimeError:  # a user without a home, as containers have them
        return Path(tempfile.gettempdir()) / "contrastive-kernels"


def _cache_name(fonts: Path, faces: Sequence[int]) -> str:
    """File name that changes with anything that could change the pictures or the names."""
    import PIL
    from PIL import features

    versions = (_FORMAT, SIZE, PIL.__version__, features.version("freetype2"), unicodedata.unidata_version)
    key = hashlib.blake2b(repr(versions).encode(), digest_size=8)
    for face in faces:
        key.update(f"{face} {FACES[face]}".encode())
        key.update((fonts / FACES[face].file).read_bytes())
    return f"glyphs-{key.hexdigest()}.npz"


def _read(path: Path) -> GlyphData | None:
    """The data set kept at ``path``, or None when there is none or, said in a word, the file is of no use."""
    try:
        with np.load(io.BytesIO(read_sealed(path))) as kept:
            return GlyphData(kept["images"], kept["character"], kept["face"], kept["codepoints"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Mistake as damaged:
        _say(f"{damaged}; the characters are drawn again")
    except OSError as error:
        _say(f"{path} cannot be read ({reason(error)}); the characters are drawn again")
    return None


def _write(path: Path, data: GlyphData) -> None:
    """Keeps the data set; where it cannot be kept, the run has it all the same."""
    content = io.BytesIO()
    np.savez(content, images=data.images, character=data.character, face=data.face, codepoints=data.codepoints)
    try:
        write_sealed(path, content.getvalue())
    except OSError as error:
        _say(f"{path.parent} cannot keep the characters ({reason(error)}); the next run draws them again (--cache)")


def _say(message: str) -> None:
    """A line beside whatever the command prints."""
    print(f"glyphs: {message}", file=sys.stderr)


def load_glyphs(
    folder: str | os.PathLike[str] | None = None, *, faces: Sequence[int] | None = None, progress: bool = True
) -> GlyphData:
    """The data set; drawn on the first call, read from disk afterwards.

    Parameters
    ----------
    folder : path, optional
        Where the drawn set is kept (about 60 MB). Default: ``default_folder()``.
    faces : sequence of int, optional
        Indices into ``FACES``. Default: all.
    progress : bool
        Show a progress bar while drawing.

    Returns
    -------
    GlyphData
    """
    numbers = sorted(set(range(len(FACES)) if faces is None else faces))
    if not numbers or not 0 <= numbers[0] <= numbers[-1] < len(FACES):
        raise ValueError(f"faces: expected some of 0 ... {len(FACES) - 1}, got {faces!r}")
    fonts = _font_folder()
    path = Path(folder or default_folder()) / _cache_name(fonts, numbers)
    data = _read(path)
    if data is None:
        data = _draw(fonts, numbers, progress)
        _write(path, data)
    return data


# Batches


@dataclass(frozen=True)
class Batch:
    """Pictures [V, B, 32, 32] uint8 of distinct characters [B], each view in the face [V, B]."""

    images: npt.NDArray[np.uint8]
    characters: npt.NDArray[np.int64]
    faces: npt.NDArray[np.int64]


class BatchSampler:
    """Batches of *distinct* characters, each in a face and with a shift drawn anew.

    In a batch of 4,096 pictures drawn without that care, more than half would meet another picture of their own
    character among their negatives. ``sampler[step]`` depends on the seed and the step alone, so that a run which
    resumes at any step draws what it would have drawn.

    Parameters
    ----------
    data : GlyphData
    batch : int
        Characters a batch; lowered to the number of characters of the split if there are fewer.
    split : str
        "train", "validation" or "test".
    seed : int
    views : int
        Independent pictures of every character, [V, B, ...].
    max_shift : int
        Shifts are uniform in -max_shift ... max_shift, in both directions, in pixels.
    share : (int, int)
        (k, P): of each batch the k-th of P parts, 0 <= k < P, for one of several processes; the parts make up the batch
        of one process, and differ by one character at most.
    """

    def __init__(
        self,
        data: GlyphData,
        batch: int,
        *,
        split: str = "train",
        seed: int = 0,
        views: int = 1,
        max_shift: int = 2,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch: expected at least 1, got {batch}")
        self.data = data
        self.characters = data.characters(split)
        self.batch = min(batch, len(self.characters))
        if self.batch < share[1]:
            raise Mistake(f"batch: expected a character for each of {share[1]} processes, got {self.batch}")
        self._own = slice(*(self.batch * k // share[1] for k in (share[0], share[0] + 1)))
        self.seed, self.views, self.max_shift = seed, views, max_shift
        self._epoch = -1
        self._order = self.characters

    def __len__(self) -> int:
        """Steps of an epoch: one pass over the characters, less a last batch that would not be full."""
        return len(self.characters) // self.batch

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step, 0, 1, 2, ... without end; of several processes', the own share."""
        epoch, part = divmod(step, len(self))
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, 0, epoch]).permutation(self.characters)
            self._epoch = epoch
        chosen = self._order[part * self.batch : (part + 1) * self.batch]
        random = np.random.default_rng([self.seed, 1, step])
        first, count = self.data.first[chosen], self.data.first[chosen + 1] - self.data.first[chosen]
        pairs = first + (random.random((self.views, len(chosen))) * count).astype(np.int64)
        shifts = random.integers(-self.max_shift, self.max_shift + 1, (2, self.views, len(chosen)))
        pairs, (down, right) = pairs[:, self._own], shifts[:, :, self._own]  # the draws are those of the whole batch
        return Batch(shift(self.data.images[pairs], down, right), chosen[self._own], self.data.face[pairs])


def shift(
    images: npt.NDArray[np.uint8], down: npt.NDArray[np.int64], right: npt.NDArray[np.int64]
) -> npt.NDArray[np.uint8]:
    """Pictures [..., H, W] moved by whole pixels [...], paper moving in."""
    height, width = images.shape[-2:]
    pad = int(max(np.abs(down).max(initial=0), np.abs(right).max(initial=0)))
    padded = np.zeros((down.size, height + 2 * pad, width + 2 * pad), dtype=images.dtype)
    padded[:, pad : pad + height, pad : pad + width] = images.reshape(-1, height, width)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(1, 2))
    return windows[np.arange(down.size), pad - down.ravel(), pad - right.ravel()].reshape(images.shape)


def summary(data: GlyphData) -> str:
    """What is in the set, as text."""
    sizes = ", ".join(f"{len(data.characters(split)):,} {split}" for split in SPLITS)
    rows = [f"{len(data):,} pictures of {len(data.codepoints):,} characters ({sizes})"]
    rows += [f"{np.sum(data.face == i):7,}  {face.file}" for i, face in enumerate(FACES)]
    rows += [f"{np.sum(data.scripts == i):7,}  {script.name}" for i, script in enumerate(SCRIPTS)]
    rows += [f"{np.sum(data.scripts == -1):7,}  in no class"]
    return "\n".join(rows)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Draw the data set, once, and print what is in it.")
    parser.add_argument("folder", type=Path, nargs="?", default=default_folder(), help="where it is kept")
    folder = parser.parse_args().folder
    print(summary(load_glyphs(folder)))
    if os.access(folder / _cache_name(_font_folder(), range(len(FACES))), os.R_OK):
        print(f"kept in {folder}")


if __name__ == "__main__":
    run(main)
