"""Script of a Unicode character, as a class for zero-shot classification, from Python's ``unicodedata`` alone.

Python knows a character's name, general category and number, not its script or its block; the first words of the name
and a few ranges give both closely enough. ``SCRIPTS`` also holds the words by which a text encoder is asked for each.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import cache

__all__ = ["OTHER", "SCRIPTS", "Script", "script_index"]

OTHER = -1


@dataclass(frozen=True)
class Script:
    """A class of characters: how it is called, how a text encoder is asked for it, and how it is recognised.

    A character belongs to the first entry of ``SCRIPTS`` of which *all* given conditions hold.

    Parameters
    ----------
    name : str
        What tables print.
    prompts : tuple of str
        Captions without the character's own part; their features are averaged into the class.
    starts : tuple of str, optional
        The character's name starts with one of these words.
    words : tuple of str, optional
        The character's name contains one of these words.
    categories : tuple of str, optional
        Its general category starts with one of these.
    ranges : tuple of (int, int), optional
        Its number lies in one of these, both ends included.
    """

    name: str
    prompts: tuple[str, ...]
    starts: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    ranges: tuple[tuple[int, int], ...] = ()

    def holds(self, codepoint: int, name: str, category: str) -> bool:
        """Whether the character meets every condition that is given."""
        parts = set(name.replace("-", " ").split())
        return (
            (not self.starts or any(name == start or name.startswith(start + " ") for start in self.starts))
            and (not self.words or not parts.isdisjoint(self.words))
            and (not self.categories or category.startswith(self.categories))
            and (not self.ranges or any(low <= codepoint <= high for low, high in self.ranges))
        )


def _alphabet(name: str, *prompts: str) -> Script:
    """A writing system whose characters' names start with its own."""
    word = name.upper()
    return Script(name, prompts or (f"{word} LETTER", f"{word} SMALL LETTER", f"{word} CAPITAL LETTER"), starts=(word,))


# Order matters: the first that holds wins. What holds for none ("SOFT HYPHEN", a lone musical sign) has no class.
SCRIPTS: tuple[Script, ...] = (
    Script("combining marks", ("COMBINING", "COMBINING MARK ABOVE", "COMBINING MARK BELOW"), starts=("COMBINING",)),
    Script("mathematical letters", ("MATHEMATICAL SMALL", "MATHEMATICAL CAPITAL", "MATHEMATICAL DIGIT"),
           ranges=((0x1D400, 0x1D7FF),)),
    _alphabet("Latin"),
    _alphabet("Greek"),
    _alphabet("Cyrillic"),
    _alphabet("Arabic", "ARABIC LETTER", "ARABIC LETTER ISOLATED FORM", "ARABIC LETTER FINAL FORM"),
    _alphabet("Hebrew", "HEBREW LETTER", "HEBREW LETTER WITH", "HEBREW POINT"),
    _alphabet("Armenian"),
    _alphabet("Georgian", "GEORGIAN LETTER", "GEORGIAN SMALL LETTER", "GEORGIAN CAPITAL LETTER"),
    _alphabet("Canadian Syllabics", "CANADIAN SYLLABICS"),
    _alphabet("Tifinagh", "TIFINAGH LETTER"),
    _alphabet("Lao", "LAO LETTER", "LAO VOWEL SIGN", "LAO DIGIT"),
    _alphabet("Nko", "NKO LETTER", "NKO DIGIT"),
    _alphabet("Lisu", "LISU LETTER"),
    _alphabet("Old Italic", "OLD ITALIC LETTER"),
    _alphabet("Ogham", "OGHAM LETTER"),
    _alphabet("Braille", "BRAILLE PATTERN", "BRAILLE PATTERN DOTS"),
    Script("box drawing", ("BOX DRAWINGS", "BOX DRAWINGS LIGHT", "BOX DRAWINGS HEAVY", "BOX DRAWINGS DOUBLE"),
           starts=("BOX DRAWINGS",)),
    Script("domino tiles", ("DOMINO TILE", "DOMINO TILE HORIZONTAL", "DOMINO TILE VERTICAL"), starts=("DOMINO TILE",)),
    Script("playing cards", ("PLAYING CARD", "PLAYING CARD OF"), starts=("PLAYING CARD",)),
    Script("hexagrams", ("HEXAGRAM FOR", "HEXAGRAM FOR THE"), starts=("HEXAGRAM",)),
    Script("tetragrams", ("TETRAGRAM FOR",), starts=("TETRAGRAM",)),
    Script("APL symbols", ("APL FUNCTIONAL SYMBOL",), starts=("APL",)),
    Script("modifier letters", ("MODIFIER LETTER", "MODIFIER LETTER SMALL", "MODIFIER LETTER CAPITAL"),
           starts=("MODIFIER LETTER",)),
    Script("currency signs", ("SIGN", "CURRENCY SIGN"), categories=("Sc",)),
    Script("arrows", ("ARROW", "LEFTWARDS ARROW", "RIGHTWARDS ARROW", "UPWARDS ARROW", "DOWNWARDS ARROW", "HARPOON"),
           words=("ARROW", "ARROWS", "ARROWHEAD", "HARPOON"), categories=("S",)),
    Script("circled", ("CIRCLED", "CIRCLED LATIN CAPITAL LETTER", "CIRCLED DIGIT", "NEGATIVE CIRCLED DIGIT"),
           words=("CIRCLED", "PARENTHESIZED"), categories=("N", "So")),
    Script("block elements", ("BLOCK", "UPPER BLOCK", "LOWER BLOCK", "QUADRANT"), ranges=((0x2580, 0x259F),)),
    Script("geometric shapes", ("BLACK SQUARE", "WHITE CIRCLE", "TRIANGLE", "WHITE SQUARE WITH", "DIAMOND"),
           ranges=((0x25A0, 0x25FF), (0x2B12, 0x2B2F))),
    Script("mathematical operators", ("OPERATOR", "EQUAL TO", "LESS-THAN", "SUBSET OF", "INTEGRAL WITH", "PLUS SIGN"),
           categories=("Sm",)),
    Script("emoticons", ("FACE", "FACE WITH", "SMILING FACE WITH"), ranges=((0x1F600, 0x1F64F),)),
    Script("numbers", ("DIGIT", "NUMERAL", "ROMAN NUMERAL", "VULGAR FRACTION"), categories=("N",)),
    Script("punctuation", ("MARK", "BRACKET", "QUOTATION MARK", "PARENTHESIS", "DASH", "PUNCTUATION"),
           categories=("P",)),
    Script("pictures", ("BLACK", "WHITE", "SYMBOL", "HEAVY", "SIGN"), ranges=((0x2600, 0x27BF),)),
)  # fmt: skip


@cache
def script_index(codepoint: int) -> int:
    """Index into ``SCRIPTS`` of a character's class, or ``OTHER``.

    Examples
    --------
    >>> SCRIPTS[script_index(ord("ж"))].name
    'Cyrillic'
    """
    name, category = unicodedata.name(chr(codepoint), ""), unicodedata.category(chr(codepoint))
    return next((i for i, script in enumerate(SCRIPTS) if script.holds(codepoint, name, category)), OTHER)
