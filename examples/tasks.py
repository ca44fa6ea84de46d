"""What can be asked about a character and its picture, with answers from Unicode's tables and the face alone.

Everything here is a label or a question; no model. ``fusion_tasks.py`` draws questions from it, ``probes.py`` classes.
A question about a held-out character is never asked in training: each split asks about its own characters.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from glyphs import FACES, GlyphData
from unicode_scripts import SCRIPTS

__all__ = [
    "ATTRIBUTES", "CATEGORIES", "DEJAVU", "RELATIONS", "STIX", "Category", "SplitTables", "attribute", "base_and_marks",
    "category_index", "hide", "question_words", "relation", "script_title", "tells_face",
]  # fmt: skip

DEJAVU = tuple(i for i, face in enumerate(FACES) if face.family.startswith("DejaVu"))  # what towers are trained on
STIX = tuple(i for i, face in enumerate(FACES) if face.family.startswith("STIX"))  # what they never see
ATTRIBUTES = ("bold", "italic", "serif", "mono")  # of a face: no caption tells them
MOST_MARKS = 2  # three marks on one letter do not occur often enough to be an answer


Key = TypeVar("Key", int, str)

# Classes


@dataclass(frozen=True)
class Category:
    """A general category of Unicode and how a text encoder is asked for it."""

    code: str
    prompts: tuple[str, ...]


CATEGORIES: tuple[Category, ...] = (
    Category("Lu", ("LATIN CAPITAL LETTER", "CYRILLIC CAPITAL LETTER", "GREEK CAPITAL LETTER", "CAPITAL LETTER")),
    Category("Ll", ("LATIN SMALL LETTER", "CYRILLIC SMALL LETTER", "GREEK SMALL LETTER", "SMALL LETTER")),
    Category("Lm", ("MODIFIER LETTER", "MODIFIER LETTER SMALL", "SUPERSCRIPT LATIN SMALL LETTER")),
    Category("Lo", ("ARABIC LETTER", "CANADIAN SYLLABICS", "HEBREW LETTER", "TIFINAGH LETTER", "LETTER")),
    Category("Mn", ("COMBINING", "COMBINING MARK ABOVE", "COMBINING MARK BELOW")),
    Category("Nd", ("DIGIT", "MATHEMATICAL DIGIT", "ARABIC-INDIC DIGIT")),
    Category("No", ("CIRCLED DIGIT", "VULGAR FRACTION", "SUPERSCRIPT", "CIRCLED NUMBER")),
    Category("Pd", ("DASH", "EN DASH")),
    Category("Po", ("PUNCTUATION", "MARK", "QUESTION MARK", "COMMA")),
    Category("Ps", ("LEFT PARENTHESIS", "LEFT BRACKET")),
    Category("Pe", ("RIGHT PARENTHESIS", "RIGHT BRACKET")),
    Category("Sc", ("SIGN", "CURRENCY SIGN")),
    Category("Sk", ("MODIFIER LETTER", "ACCENT")),
    Category("Sm", ("OPERATOR", "EQUAL TO", "LESS-THAN", "SUBSET OF", "INTEGRAL WITH")),
    Category("So", ("BLACK", "WHITE", "BRAILLE PATTERN", "BOX DRAWINGS", "HEXAGRAM FOR", "SQUARE")),
)
_CATEGORY_INDEX = {category.code: i for i, category in enumerate(CATEGORIES)}


def category_index(codepoint: int) -> int:
    """Index into ``CATEGORIES``, or -1.

    Examples
    --------
    >>> CATEGORIES[category_index(ord("Ж"))].code, category_index(0xAB)
    ('Lu', -1)
    """
    return _CATEGORY_INDEX.get(unicodedata.category(chr(codepoint)), -1)


def script_title(index: int) -> str:
    """A script's name as questions and answers write it."""
    return SCRIPTS[index].name.upper()


def attribute(name: str, faces: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Whether faces [N] (indices into ``FACES``) are "bold", "italic", "serif" or "mono"."""
    if name not in ATTRIBUTES:
        raise ValueError(f"name: expected one of {ATTRIBUTES}, got {name!r}")
    return np.array([getattr(face, name) for face in FACES], dtype=bool)[faces]


# Questions to the fusion model

WHICH, MANY, CLAIM = "WHICH SCRIPT", "HOW MANY MARKS", "IT IS"


def tells_face(data: GlyphData) -> npt.NDArray[np.bool_]:
    """Characters [C] whose pictures tell their face: letters that every face has.

    An arrow or a box looks the same in many faces; and that a character is not in the bold faces at all, its caption
    would tell.
    """
    faces = np.diff(data.first)
    letters = [unicodedata.category(chr(c)).startswith("L") for c in data.codepoints]
    everywhere: npt.NDArray[np.bool_] = faces == faces.max()
    return everywhere & np.array(letters)


def question_words() -> list[str]:
    """Texts with every word of a question that need not occur in a caption."""
    asked = [f"IS IT {name} BOTH ARE {name}" for name in map(str.upper, ATTRIBUTES)]
    return [WHICH, MANY, CLAIM, *asked, *(script_title(i) for i in range(len(SCRIPTS)))]


# Marks, and what follows from a partly hidden picture

ABOVE, BELOW = "above", "below"
_SIDES = {230: ABOVE, 232: ABOVE, 234: ABOVE, 202: BELOW, 220: BELOW, 233: BELOW, 240: BELOW}  # by combining class
RELATIONS = ("ENTAILS", "NEUTRAL", "CONTRADICTS")


def base_and_marks(codepoint: int) -> tuple[str, tuple[str, ...]]:
    """The letter below a character's marks, and the marks: its canonical decomposition.

    Examples
    --------
    >>> base_and_marks(ord("ế")) == ("e", ("\\u0302", "\\u0301"))
    True
    """
    decomposed = unicodedata.normalize("NFD", chr(codepoint))
    return decomposed[0], tuple(decomposed[1:])


def sided(codepoint: int) -> bool:
    """Whether every mark of a character stands above or below its letter (there may be none)."""
    return all(unicodedata.combining(mark) in _SIDES for mark in base_and_marks(codepoint)[1])


def relation(shown: int, claimed: int, hidden: str | None) -> str:
    """What the picture of ``shown``, one side of it hidden, says about the claim "this is at least ``claimed``".

    A claim holds a letter and its marks. The letter is always to be seen. A wrong letter, or a mark that is missing on
    a visible side, contradicts the claim; otherwise a mark on the hidden side leaves it open; else it is entailed.

    Examples
    --------
    >>> relation(ord("é"), ord("é"), None), relation(ord("é"), ord("è"), None), relation(ord("é"), ord("e"), None)
    ('ENTAILS', 'CONTRADICTS', 'ENTAILS')
    >>> relation(ord("é"), ord("é"), "above"), relation(ord("é"), ord("ę"), "above"), relation(ord("é"), 97, "above")
    ('NEUTRAL', 'CONTRADICTS', 'CONTRADICTS')
    """
    (base, marks), (claimed_base, claimed_marks) = base_and_marks(shown), base_and_marks(claimed)
    visible = [mark for mark in claimed_marks if _SIDES[unicodedata.combining(mark)] != hidden]
    if base != claimed_base or not set(visible) <= set(marks):
        return "CONTRADICTS"
    return "NEUTRAL" if len(visible) < len(claimed_marks) else "ENTAILS"


# Fonts' x-height is row 12 and their baseline row 24 (glyphs.py). A capital loses its upper third with its marks; which
# letter it is can still be seen.
_HIDDEN_ROWS = {ABOVE: slice(0, 11), BELOW: slice(25, 32)}
GREY = 128


def hide(image: npt.NDArray[np.uint8], side: str | None) -> npt.NDArray[np.uint8]:
    """A picture [32, 32] with what is above or below its letter painted grey; None hides nothing."""
    if side is None:
        return image
    image = image.copy()
    image[_HIDDEN_ROWS[side]] = GREY
    return image


class SplitTables:
    """The characters of one split of a data set, sorted by what is asked about them.

    Parameters
    ----------
    data : GlyphData
    split : str
        "train", "validation" or "test".
    """

    def __init__(self, data: GlyphData, split: str) -> None:
        self.data = data
        self.characters = data.characters(split)
        codepoints = data.codepoints[self.characters]
        self.faced = np.intersect1d(self.characters, np.flatnonzero(tells_face(data)))
        self.by_script = _groups(self.characters, data.scripts[self.characters].tolist())
        self.by_script.pop(-1, None)
        marks = [len(base_and_marks(int(c))[1]) for c in codepoints]
        letters = [unicodedata.category(chr(c)).startswith("L") for c in codepoints]
        self.by_marks = _groups(self.characters, [m if is_letter else -1 for m, is_letter in zip(marks, letters)])
        self.by_marks = {m: rows for m, rows in self.by_marks.items() if 0 <= m <= MOST_MARKS}
        bases = [base_and_marks(int(c))[0] if sided(int(c)) else "" for c in codepoints]
        groups = _groups(self.characters, bases)
        groups.pop("", None)
        self.by_base = {base: rows for base, rows in groups.items() if len(rows) > 1}  # letters with and without marks


def _groups(rows: npt.NDArray[np.int64], keys: Sequence[Key]) -> dict[Key, npt.NDArray[np.int64]]:
    """{key: its rows}."""
    found: dict[Key, list[int]] = {}
    for row, key in zip(rows.tolist(), keys):
        found.setdefault(key, []).append(row)
    return {key: np.array(value) for key, value in found.items()}
