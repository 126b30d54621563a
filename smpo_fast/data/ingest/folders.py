"""Records of two layouts of a folder of images: w/x.png and l/x.png; x.png and x-rejected.png."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator

from smpo_fast.data import images
from smpo_fast.data.images import BadImage
from smpo_fast.data.ingest.records import Cells, UnreadableCell, UnreadableRecord, decode_text
from smpo_fast.data.ingest.source_folder import SourceFolder

FOLDER_LAYOUTS = ("w-l", "suffix")
_REJECTED = re.compile(r"(.+)-rejected[^/]*")


def image_stem(name: str) -> str:
    """'cat' for 'cat.png', '' for a file that is not an image."""
    stem, ending = posixpath.splitext(posixpath.basename(name))
    return stem if ending.lower() in images.SUFFIXES else ""


def winner_stem(stem: str) -> str:
    """'cat' for 'cat-rejected' and 'cat-rejected2', '' for the stem of a winner."""
    match = _REJECTED.fullmatch(stem)
    return match[1] if match else ""


def read_winner_loser_layout(folder: SourceFolder) -> Iterator[Cells | UnreadableRecord]:
    """A record for each name of an image in w/ or l/; the prompt is in NAME.txt, in either or in the folder itself."""
    (_, top), (winners, texts_w), (losers, texts_l) = (_list_images(folder, side) for side in ("", "w", "l"))
    texts = top | texts_w | texts_l
    for stem in sorted({*winners, *losers}):
        names = [*winners.get(stem, ()), *losers.get(stem, ())]
        if stem not in winners or stem not in losers:
            yield UnreadableRecord(f"unpaired: {names[0]} has no partner in {'l' if stem in winners else 'w'}/")
        elif len(names) > 2:
            yield UnreadableRecord(f"unpaired: more than two images are named '{stem}' ({', '.join(names)})")
        else:
            text = _text(folder, texts, stem, f"w/{stem}", f"l/{stem}")
            yield {"chosen": names[0], "rejected": names[1], "prompt": text}


def read_suffix_layout(folder: SourceFolder) -> Iterator[Cells | UnreadableRecord]:
    """A record for each x-rejected*.png with its x.png; the prompt is in x.txt."""
    found, texts = _list_images(folder)
    losers: dict[str, list[str]] = {}
    for stem, names in found.items():
        if winner := winner_stem(stem):
            losers.setdefault(winner, []).extend(names)
    for stem in sorted({*losers, *(stem for stem in found if not winner_stem(stem))}):
        winners = found.get(stem, [])
        if len(winners) != 1 or stem not in losers:
            names = [*winners, *losers.get(stem, [])]
            yield UnreadableRecord(
                f"unpaired: {', '.join(names)}: one '{stem}' and at least one '{stem}-rejected' are needed"
            )
            continue
        text = _text(folder, texts, stem)
        for loser in losers[stem]:
            yield {"chosen": winners[0], "rejected": loser, "prompt": text}


def _list_images(folder: SourceFolder, side: str = "") -> tuple[dict[str, list[str]], set[str]]:
    """Images of a subfolder by their stem, in order, and the stems of its .txt files, as paths from the root."""
    found: dict[str, list[str]] = {}
    texts: set[str] = set()
    for path in sorted(folder.fs.ls(posixpath.join(folder.root, side), detail=False)):
        name = posixpath.basename(path)
        if stem := image_stem(name):
            found.setdefault(stem, []).append(posixpath.join(side, name))
        elif name.endswith(".txt"):
            texts.add(posixpath.join(side, name[: -len(".txt")]))
    return found, texts


def _text(folder: SourceFolder, texts: set[str], *stems: str) -> str | UnreadableCell:
    """The content of the first text file that exists; empty where none does."""
    for stem in stems:
        if stem in texts:
            try:
                return decode_text(folder.read_file(f"{stem}.txt"))
            except BadImage as error:
                return UnreadableCell(str(error))
    return ""
