"""From records to candidate pairs."""

from __future__ import annotations

import json
import math
import os
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from smpo_fast.data import images
from smpo_fast.data.images import BadImage
from smpo_fast.data.ingest.columns import _ORDERS, Reading, _unpacked
from smpo_fast.data.ingest.records import Broken, Problem, Values
from smpo_fast.data.ingest.sources import PairSource, Record
from smpo_fast.data.pairs import rules
from smpo_fast.data.pairs.rules import Unusable
from smpo_fast.data.pairs.schema import Candidate, FoundImage, Rejected
from smpo_fast.method.labels import TIE

PAIRINGS = {
    "all": "every two pictures of which one is better",
    "ends": "the best against the worst",
    "once": "each picture at most once: best against worst, second best against second worst, ..",
}
_WORDS = {
    **dict.fromkeys(("true", "yes", "win", "w", "chosen", "good", "exclusive_win"), 1.0),
    **dict.fromkeys(("false", "no", "lose", "l", "rejected", "bad", "exclusive_lose"), 0.0),
    "tie": 0.5,
}


Unit = list[Candidate | Rejected]  # what follows from a record, or from two of one prompt


def units(
    source: PairSource, reading: Reading, pairing: str, records: Iterable[Record], folder: Path
) -> Iterator[Unit]:
    """The pairs of some records, a list a record (of 'single': a list a pair), in an order that is always the same.

    folder: where the pictures of 'single' wait, outside of memory, until all of their prompt are known.
    Of a record that cannot be used there is a Rejected in place of pairs.
    """
    if reading.format == "single":
        yield from _grouped(source, reading, pairing, records, folder)
        return
    makers: dict[str, Callable[[_Row], Unit]] = {"pairs": _two, "chosen": _chosen, "ranking": partial(_ranked, pairing)}
    for record in records:
        try:
            yield makers[reading.format](_Row(source, reading, record))
        except Unusable as error:
            yield [Rejected(record.number, record.name, str(error))]


class _Row:
    """A record seen through the reading; everything raises Unusable where a value is not what it should be."""

    def __init__(self, source: PairSource, reading: Reading, record: Record) -> None:
        if isinstance(record.values, Problem):
            raise Unusable(record.values.reason)
        self.source, self.record, self._columns = source, record, reading.columns
        self._values: Values = record.values

    def has(self, role: str) -> bool:
        return role in self._columns

    def value(self, role: str) -> Any:
        value = self._values.get(self._columns[role]) if role in self._columns else None
        if isinstance(value, Broken):
            name = "caption" if role == "prompt" else role
            raise Unusable(f"{name} is {value.reason}" if value.reason.startswith("not") else f"{name} {value.reason}")
        return value

    def prompt(self) -> str:
        value = self.value("prompt")
        if value is None:
            raise Unusable("no caption: it is null (an empty one is allowed)")
        if not isinstance(value, str):
            raise Unusable(f"caption is not text: it is {type(value).__name__}")
        return _utf8(value, "caption")

    def number(self, role: str) -> float | None:
        return number(self.value(role), role)

    def picture(self, role: str, uid_role: str = "") -> FoundImage:
        uid = self.value(uid_role) if uid_role else None
        return picture(self.source, self.value(role), role, uid if isinstance(uid, str) else None)

    def candidate(
        self, pictures: tuple[FoundImage, FoundImage], label: float | None, rewards: tuple[float, float] | None
    ) -> Candidate:
        named = [p.uid or p.path for p in pictures]
        uid = "/".join(str(name) for name in named) if all(named) else self.record.name
        return Candidate(self.record.number, uid, self.prompt(), pictures, label, rewards)


def number(value: Any, name: str) -> float | None:
    """A number, a word for one, or a list of one; None for null, NaN and empty text. Raises Unusable."""
    value = _unpacked(value)
    if isinstance(value, list):
        if len(value) > 1:
            raise Unusable(f"more than one number: {name} is a list of {len(value)}")
        value = value[0] if value else None
    if isinstance(value, str):
        value = _WORDS.get(value.strip().lower(), value.strip() or None)
    if value is None:
        return None
    if not isinstance(value, (int, float, str, Decimal)):
        raise Unusable(f"{name} is no number: it is {type(value).__name__}")
    try:
        found = float(value)
    except (ValueError, OverflowError) as error:
        raise Unusable(f"{name} is no number: '{str(value)[:40]}'") from error
    return None if math.isnan(found) else found


def picture(source: PairSource, value: Any, name: str, uid: str | None = None) -> FoundImage:
    """The picture that a cell means: bytes, a path, or Hugging Face's {bytes, path}. Raises Unusable."""
    content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if isinstance(content, str):
        content, path = None, content
    if isinstance(content, bytes) and content:
        return FoundImage(partial(bytes, content), None, uid or (path if isinstance(path, str) else None))
    if content is None and isinstance(path, str) and path:
        return FoundImage(partial(source.picture, _utf8(path, f"path of {name}")), path, uid or path)
    if content is None or content == b"":
        raise Unusable(f"{name} holds no bytes: it is {'null' if content is None else 'empty'}")
    raise Unusable(f"{name} is no picture: it is {type(content).__name__}")


def _utf8(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half a pair of surrogates, as JSON can write it
        raise Unusable(f"{name} is not UTF-8 text: {error.reason}") from error
    return text


def pairings(values: Sequence[float], how: str) -> Iterator[tuple[int, int]]:
    """Positions (better, worse) of the pairs that ``values`` (higher is better) give; see PAIRINGS."""
    order = sorted(range(len(values)), key=lambda i: -values[i])
    if how == "all":
        found: Iterable[tuple[int, int]] = combinations(order, 2)
    elif how == "ends":
        found = [(order[0], order[-1])] if order else []
    else:
        half = len(order) // 2
        found = zip(order[:half], reversed(order[-half:] if half else []), strict=True)
    return ((better, worse) for better, worse in found if values[better] > values[worse])


def _two(row: _Row) -> Unit:
    pictures = (row.picture("image_0", "uid_0"), row.picture("image_1", "uid_1"))
    label = rules.label_of(lambda name: row.number(name))
    rewards = rules.rewards_of(lambda name: row.number(name), ("reward_0",) if row.has("reward_0") else ())
    return [row.candidate(pictures, label, rewards)]


def _chosen(row: _Row) -> Unit:
    return [row.candidate((row.picture("chosen"), row.picture("rejected")), 1.0, None)]


def _ranked(pairing: str, row: _Row) -> Unit:
    cells = _list(row, "images")
    role = next(role for role in _ORDERS if row.has(role))
    values = [number(value, role) for value in _list(row, role)]
    scores = [number(value, "score") for value in _list(row, "score")] if row.has("score") else [None] * len(cells)
    if not len(cells) == len(values) == len(scores):
        raise Unusable(f"lists of unequal length: {len(cells)} images, {len(values)} {role}, {len(scores)} scores")
    left_out: Unit = []
    usable: list[tuple[FoundImage, float, float | None]] = []
    for i, (cell, value, score) in enumerate(zip(cells, values, scores, strict=True)):
        try:
            if value is None or math.isinf(value):
                raise Unusable(f"no {role}: that of picture {i} is {'missing' if value is None else 'infinite'}")
            usable.append((picture(row.source, cell, f"images[{i}]"), -value if role == "rank" else value, score))
        except Unusable as error:
            left_out.append(Rejected(row.record.number, row.record.name, str(error)))
    return left_out + _pairs_of(row, usable, pairing)


def _pairs_of(row: _Row, usable: Sequence[tuple[FoundImage, float, float | None]], pairing: str) -> Unit:
    made: Unit = []
    values = [value for _, value, _ in usable]
    if len(values) == 2 and values[0] == values[1]:
        (one, _, a), (two, _, b) = usable
        return [row.candidate((one, two), TIE, _scores(a, b))]
    for better, worse in pairings(values, pairing):
        (one, _, a), (two, _, b) = usable[better], usable[worse]
        made.append(row.candidate((one, two), 1.0, _scores(a, b)))
    if not made:
        raise Unusable(f"nothing is better: {len(values)} usable pictures, all of one rank")
    return made


def _scores(one: float | None, two: float | None) -> tuple[float, float] | None:
    return rules.rewards_of({"reward_0": one, "reward_1": two}.get, ("reward_0",))


def _list(row: _Row, role: str) -> list[Any]:
    value = _unpacked(row.value(role))
    if not isinstance(value, list):
        raise Unusable(f"no {role}: {'it is null' if value is None else 'it is no list'}")
    return value


class _Shelf:
    """Pictures of one prompt each, in an unnamed file, with 16 bytes a picture in memory."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._prompts, self._starts = array("Q"), array("Q", [0])

    def add(self, prompt: str, facts: Mapping[str, Any], content: bytes) -> None:
        head = json.dumps([prompt, facts, len(content)]).encode() + b"\n"
        self._file.write(head)
        self._file.write(content)
        self._prompts.append(images.content_hash(prompt.encode()))
        self._starts.append(self._starts[-1] + len(head) + len(content))

    def groups(self) -> Iterator[list[tuple[str, dict[str, Any], Callable[[], bytes]]]]:
        """All that was added, by prompt, in the order in which the prompts came first."""
        self._file.flush()
        hashes = np.frombuffer(self._prompts, np.uint64)
        _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
        order = np.lexsort((np.arange(len(hashes)), first[group]))
        bounds = np.flatnonzero(np.diff(first[group][order])) + 1
        for members in np.split(order, bounds) if len(order) else ():
            by_prompt: dict[str, list[tuple[str, dict[str, Any], Callable[[], bytes]]]] = {}
            for i in members.tolist():
                prompt, facts, read = self._get(i)
                by_prompt.setdefault(prompt, []).append((prompt, facts, read))
            yield from by_prompt.values()

    def _get(self, i: int) -> tuple[str, dict[str, Any], Callable[[], bytes]]:
        start, end = self._starts[i], self._starts[i + 1]
        head = b""
        while b"\n" not in head:
            head += self._read(4096, start + len(head))
        head = head[: head.index(b"\n") + 1]
        prompt, facts, length = json.loads(head)
        return prompt, facts, partial(self._read, length, end - length)

    def _read(self, length: int, start: int) -> bytes:
        return os.pread(self._file.fileno(), length, start)


def _grouped(
    source: PairSource, reading: Reading, pairing: str, records: Iterable[Record], folder: Path
) -> Iterator[Unit]:
    role = next(role for role in _ORDERS if role in reading.columns)
    shelf = _Shelf(folder)
    for record in records:
        try:
            row = _Row(source, reading, record)
            value, score, found = row.number(role), row.number("score"), row.picture("image")
            if value is None or math.isinf(value):
                raise Unusable(f"no {role}: it is {'missing' if value is None else 'infinite'}")
            facts = {"row": record.number, "name": record.name, "value": -value if role == "rank" else value}
            facts |= {"score": score, "path": found.path, "uid": found.uid}
            shelf.add(row.prompt(), facts, b"" if found.path else found.read())
        except (Unusable, BadImage) as error:
            yield [Rejected(record.number, record.name, str(error))]
    for group in shelf.groups():
        yield from _pairs_in(source, group, pairing)


def _pairs_in(
    source: PairSource, group: Sequence[tuple[str, dict[str, Any], Callable[[], bytes]]], pairing: str
) -> Iterator[Unit]:
    paired: set[int] = set()
    for better, worse in pairings([facts["value"] for _, facts, _ in group], pairing):
        paired |= {better, worse}
        yield [_pair_of_singles(source, group[better], group[worse])]
    alone = [facts for i, (_, facts, _) in enumerate(group) if i not in paired]
    reason = f"unpaired: of the {len(group)} pictures of its prompt none is left to set against it (--pairs {pairing})"
    for facts in alone:
        yield [Rejected(facts["row"], facts["name"], reason)]


def _pair_of_singles(
    source: PairSource,
    better: tuple[str, dict[str, Any], Callable[[], bytes]],
    worse: tuple[str, dict[str, Any], Callable[[], bytes]],
) -> Candidate | Rejected:
    pictures = []
    for _, facts, read in (better, worse):
        path = facts["path"]
        pictures.append(FoundImage(partial(source.picture, path) if path else read, path, facts["uid"]))
    prompt, facts, _ = better
    named = [p.uid or f["name"] for p, (_, f, _) in zip(pictures, (better, worse), strict=True)]
    try:
        rewards = _scores(facts["score"], worse[1]["score"])
    except Unusable as error:
        return Rejected(facts["row"], facts["name"], str(error))
    return Candidate(facts["row"], "/".join(named), prompt, (pictures[0], pictures[1]), 1.0, rewards)
