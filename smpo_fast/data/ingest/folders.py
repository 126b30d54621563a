"""Records of two layouts of a folder of images."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator

from smpo_fast.data.images import BadImage
from smpo_fast.data.ingest.records import PICTURES, Broken, Place, Problem, Values, _decoded

FOLDERS = ("w-l", "suffix")  # w/x.png against l/x.png; x.png against x-rejected.png
_REJECTED = re.compile(r"(.+)-rejected[^/]*")


def picture_stem(name: str) -> str:
    """'cat' of 'cat.png', '' of what is no picture."""
    stem, ending = posixpath.splitext(posixpath.basename(name))
    return stem if ending.lower() in PICTURES else ""


def is_rejected(stem: str) -> str:
    """'cat' of 'cat-rejected' and 'cat-rejected2', '' of another stem."""
    match = _REJECTED.fullmatch(stem)
    return match[1] if match else ""


def _listing(place: Place, side: str = "") -> tuple[dict[str, list[str]], set[str]]:
    """Pictures of a folder by their stem, in order, and the stems of its .txt files; names start from the root."""
    pictures: dict[str, list[str]] = {}
    texts: set[str] = set()
    for path in sorted(place.fs.ls(posixpath.join(place.root, side), detail=False)):
        name = posixpath.basename(path)
        if stem := picture_stem(name):
            pictures.setdefault(stem, []).append(posixpath.join(side, name))
        elif name.endswith(".txt"):
            texts.add(posixpath.join(side, name[: -len(".txt")]))
    return pictures, texts


def _text(place: Place, texts: set[str], *stems: str) -> str | Broken:
    """What the first of some text files says; empty where there is none."""
    for stem in stems:
        if stem in texts:
            try:
                return _decoded(place.picture(f"{stem}.txt"))
            except BadImage as error:
                return Broken(str(error))
    return ""


def _winners_and_losers(place: Place) -> Iterator[Values | Problem]:
    (_, top), (winners, beside_w), (losers, beside_l) = (_listing(place, side) for side in ("", "w", "l"))
    texts = top | beside_w | beside_l
    for stem in sorted({*winners, *losers}):
        names = [*winners.get(stem, ()), *losers.get(stem, ())]
        if stem not in winners or stem not in losers:
            yield Problem(f"unpaired: {names[0]} has no partner in {'l' if stem in winners else 'w'}/")
        elif len(names) > 2:
            yield Problem(f"unpaired: more than two pictures are named '{stem}' ({', '.join(names)})")
        else:
            text = _text(place, texts, stem, f"w/{stem}", f"l/{stem}")
            yield {"chosen": names[0], "rejected": names[1], "prompt": text}


def _suffixes(place: Place) -> Iterator[Values | Problem]:
    found, texts = _listing(place)
    losers: dict[str, list[str]] = {}
    for stem, names in found.items():
        if base := is_rejected(stem):
            losers.setdefault(base, []).extend(names)
    for stem in sorted({*losers, *(stem for stem in found if not is_rejected(stem))}):
        winners = found.get(stem, [])
        if len(winners) != 1 or stem not in losers:
            names = [*winners, *losers.get(stem, [])]
            yield Problem(f"unpaired: {', '.join(names)}: one '{stem}' and at least one '{stem}-rejected' are wanted")
            continue
        text = _text(place, texts, stem)
        for loser in losers[stem]:
            yield {"chosen": winners[0], "rejected": loser, "prompt": text}
