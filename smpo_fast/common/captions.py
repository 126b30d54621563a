"""Bounding the length of captions before they are tokenized."""

from __future__ import annotations

import re

# Text encoders and reward models read at most 77 tokens, of at most 64 characters each; tokenizing megabytes takes
# minutes.
MAX_CHARACTERS = 10_000


def bounded(caption: str) -> str:
    """The beginning of a very long caption; all tokens that a text encoder reads are in it.

    Runs of white space are one space to the tokenizers, however long, so they become one here.
    """
    if len(caption) <= MAX_CHARACTERS:
        return caption
    words, length = [], 0
    for match in re.finditer(r"\S+", caption):
        words.append(match[0])
        length += len(words[-1]) + 1
        if length > MAX_CHARACTERS:
            break
    return " ".join(words)[:MAX_CHARACTERS]
