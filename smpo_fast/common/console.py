"""Printing text that others wrote: captions, file names, column names, and what model files say."""

from __future__ import annotations

import unicodedata

_JOINERS = "\u200c\u200d"  # invisible, but part of the spelling of Persian words and of some emoji


def printable(text: object, *, lines: bool = False) -> str:
    """Text in which every character is visible, so that it cannot move a terminal's cursor or forge other output.

    Control characters, terminal escape sequences, line separators, bidirectional overrides and lone surrogates appear
    as Python escapes, such as ``\\x1b``.  lines: keep line breaks and tabs, for text that this program laid out.
    """
    return "".join(c if _is_visible(c) or (lines and c in "\n\t") else _escape(c) for c in str(text))


def _is_visible(character: str) -> bool:
    return character.isprintable() or character in _JOINERS or unicodedata.category(character) == "Zs"


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
