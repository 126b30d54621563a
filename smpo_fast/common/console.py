"""Printing: text that others wrote (captions, file names, what model files say), and colours on terminals."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Mapping
from typing import TextIO

GOOD, DOUBTFUL, BAD = "32", "33", "1;31"  # green, yellow, bold red: parameters of a terminal's colour sequence
_JOINERS = "\u200c\u200d"  # invisible, but part of the spelling of Persian words and of some emoji


def printable(text: object, *, lines: bool = False) -> str:
    """Text in which every character is visible, so that it cannot move a terminal's cursor or forge other output.

    Control characters, terminal escape sequences, line separators, bidirectional overrides and lone surrogates appear
    as Python escapes, such as ``\\x1b``.  lines: keep line breaks and tabs, for text that this program laid out.
    """
    return "".join(c if _is_visible(c) or (lines and c in "\n\t") else _escape(c) for c in str(text))


def coloured(text: str, colour: str, stream: TextIO | None = None) -> str:
    """Text in a colour, if the stream that it is for (default: standard output) shows colours.

    A terminal does, unless NO_COLOR is set (no-color.org) or TERM is 'dumb'; with CLICOLOR_FORCE anything does.
    """
    return f"\x1b[{colour}m{text}\x1b[0m" if _shows_colours(stream or sys.stdout) else text


def highlighted(text: str, marks: Mapping[str, str]) -> str:
    """Text for standard output in which some words are coloured. marks: the colour of each of these words."""
    for word, colour in marks.items():
        text = text.replace(word, coloured(word, colour))
    return text


def _shows_colours(stream: TextIO) -> bool:
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("CLICOLOR_FORCE", "0") != "0":
        return True
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _is_visible(character: str) -> bool:
    return character.isprintable() or character in _JOINERS or unicodedata.category(character) == "Zs"


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
