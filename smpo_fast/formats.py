"""What the columns of a source mean, and the pairs that follow from its records.

Four formats, whatever container they come in:

    pairs     a prompt, two pictures, and perhaps a label or two scores (Pick-a-Pic)
    chosen    a prompt, the picture that was preferred, the one that was not
    ranking   a prompt, a list of pictures, and a list of ranks, scores or preferences (HPD, ImageReward)
    single    a prompt, one picture, and its label, rank or score (KTO): pairs are made within a prompt
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from smpo_fast import data
from smpo_fast.config import SettingsError
from smpo_fast.containers import Broken, Problem, Values
from smpo_fast.data import BadPicture, Rejected, Unusable
from smpo_fast.sources import Record, Source

ALIASES = {
    "prompt": ("caption", "prompt", "text", "original_prompt", "txt"),
    "image_0": ("jpg_0", "image_0", "img_0"),
    "image_1": ("jpg_1", "image_1", "img_1"),
    "label_0": ("label_0",),
    "label_1": ("label_1",),
    "reward_0": ("reward_0", "ps_score_0", "score_0"),
    "reward_1": ("reward_1", "ps_score_1", "score_1"),
    "uid_0": ("image_0_uid",),
    "uid_1": ("image_1_uid",),
    "chosen": ("chosen", "chosen_image", "image_chosen", "winner", "win", "w"),
    "rejected": ("rejected", "rejected_image", "image_rejected", "loser", "lose", "l"),
    "images": ("images", "image_paths", "image_path", "file_path", "generations"),
    "image": ("image", "jpg", "png", "file_name", "image_path", "file_path", "path"),
    "rank": ("rank", "ranks", "ranking"),
    "preference": ("human_preference", "preference", "label", "labels", "cls"),
    "score": ("score", "scores", "reward", "rewards", "raw_scores"),
}
_ORDERS = ("rank", "preference", "score")  # the first that is there decides which picture is better
# What a format must have, what it may have besides, and which of these are lists.
FORMATS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "pairs": (
        ("prompt", "image_0", "image_1"),
        ("label_0", "label_1", "reward_0", "reward_1", "uid_0", "uid_1"),
    ),
    "chosen": (("prompt", "chosen", "rejected"), ()),
    "ranking": (("prompt", "images"), _ORDERS),
    "single": (("prompt", "image"), _ORDERS),
}
PAIRINGS = {
    "all": "every two pictures of which one is better",
    "ends": "the best against the worst",
    "once": "each picture at most once: best against worst, second best against second worst, ..",
}
TIE = 0.5
_LISTS = ("images", *_ORDERS)
_WORDS = {
    **dict.fromkeys(("true", "yes", "win", "w", "chosen", "good", "exclusive_win"), 1.0),
    **dict.fromkeys(("false", "no", "lose", "l", "rejected", "bad", "exclusive_lose"), 0.0),
    "tie": 0.5,
}


@dataclass(frozen=True)
class Picture:
    """A picture of a record; ``read`` gives its encoded bytes or raises BadPicture."""

    read: Callable[[], bytes]
    path: str | None = None
    uid: str | None = None


@dataclass(frozen=True)
class Candidate:
    """A pair, of which the pictures have not been looked at."""

    row: int  # number of the record; where there are two, that of the better picture's
    uid: str
    prompt: str
    pictures: tuple[Picture, Picture]
    label: float | None
    rewards: tuple[float, float] | None


Unit = list[Candidate | Rejected]  # what follows from a record, or from two of one prompt


@dataclass(frozen=True)
class Reading:
    """What was understood of a source: its format, and the column behind each meaning."""

    format: str
    columns: dict[str, str]

    def __str__(self) -> str:
        return f"{self.format}: " + ", ".join(f"{role} = '{column}'" for role, column in self.columns.items())


def understand(source: Source, name: str = "", given: Mapping[str, str] | None = None) -> Reading:
    """The reading of a source, from its first records.

    name: the format, '' to find it.  given: meaning -> column, where a column's name does not tell.  Raises
    SettingsError, with what was found and what would do, where that leaves no format or more than one.
    """
    given = dict(given or {})
    lists, problem = _columns(source)
    _check_given(source, given, lists, problem)
    readings = [_reading(source, form, given, lists) for form in ([name] if name else FORMATS)]
    fits = [reading for reading in readings if reading is not None]
    decided = [reading for reading in fits if reading.format != "pairs" or _has_preference(reading)]
    fits = decided or fits
    if len(fits) == 1:
        return fits[0]
    listed = ", ".join(f"{column} (a list)" if is_list else column for column, is_list in lists.items())
    if fits:
        raise SettingsError(
            f"{source.given} can be read as {' and as '.join(str(fit) for fit in fits)}: choose with --format"
        )
    wanted = "; ".join(f"{form}: {_wanted(form)}" for form in ([name] if name else FORMATS))
    raise SettingsError(
        f"{source.given} ({source.container}): cannot tell what its columns mean. Found: {listed}. Wanted: {wanted}. "
        "Name them, for example --columns prompt=text,chosen=good,rejected=bad"
    )


def units(source: Source, reading: Reading, pairing: str, records: Iterable[Record], folder: Path) -> Iterator[Unit]:
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


# --- understanding ----------------------------------------------------------------------------------------------


def _columns(source: Source, look: int = 16) -> tuple[dict[str, bool], str]:
    """Columns of the first records, with whether most hold lists; and the reason of a record that was unreadable."""
    votes: dict[str, int] = {}
    problem = ""
    with contextlib.closing(source.records()) as records:
        for record, _ in zip(records, range(look), strict=False):
            if isinstance(record.values, Problem):
                problem = problem or record.values.reason
                continue
            for column, value in record.values.items():
                vote = 0 if value is None else 1 if isinstance(_unpacked(value), list) else -1
                votes[column] = votes.get(column, 0) + vote
    if not votes:
        raise SettingsError(f"{source.given} ({source.container}) has no readable record: {problem or 'it is empty'}")
    return {column: vote > 0 for column, vote in votes.items()}, problem


def _check_given(source: Source, given: Mapping[str, str], lists: Mapping[str, bool], problem: str) -> None:
    for role, column in given.items():
        if role not in ALIASES:
            raise SettingsError(f"--columns {role}={column}: '{role}' is none of {', '.join(ALIASES)}")
        if column not in lists:
            note = f" (and a record that is {problem})" if problem else ""
            raise SettingsError(
                f"--columns {role}={column}: {source.given} has no such column; it has {', '.join(lists)}{note}"
            )


def _reading(source: Source, form: str, given: Mapping[str, str], lists: Mapping[str, bool]) -> Reading | None:
    must, may = FORMATS[form]
    columns: dict[str, str] = {}
    for role in (*must, *may):
        found = [given[role]] if role in given else _found(role, form, given, lists)
        if role in must and len(found) > 1:
            if all(other in given or _found(other, form, given, lists) for other in must):
                raise SettingsError(
                    f"{source.given}: {role} could be {' or '.join(found)}: say which, --columns {role}={found[0]}"
                )
        if role in must and not found:
            return None
        if found:
            columns[role] = found[0]
    if form in ("ranking", "single") and not any(role in columns for role in _ORDERS):
        return None
    unread = _unread_preference(lists, columns)
    if form == "pairs" and unread and not _has_preference(Reading(form, columns)):
        raise SettingsError(
            f"{source.given}: the column '{unread}' may say which picture is better, "
            "but not how: --columns label_0=.. if 1 means the first picture, label_1=.. if 1 means the second"
        )
    return Reading(form, columns)


def _found(role: str, form: str, given: Mapping[str, str], lists: Mapping[str, bool]) -> list[str]:
    is_list = form == "ranking" and role in _LISTS
    free = [column for column in ALIASES[role] if column in lists and column not in given.values()]
    any_kind = role.startswith("reward_")  # a list of one, as the authors' script writes it
    return [column for column in free if any_kind or lists[column] == is_list]


def _unread_preference(lists: Mapping[str, bool], columns: Mapping[str, str]) -> str:
    left = [column for column in lists if column not in columns.values()]
    return next((column for column in left if column in ALIASES["preference"]), "")


def _has_preference(reading: Reading) -> bool:
    return any(role in reading.columns for role in ("label_0", "label_1", "reward_0", "chosen", *_ORDERS))


def _wanted(form: str) -> str:
    must, may = FORMATS[form]
    text = ", ".join(f"{role} ({'/'.join(ALIASES[role])})" for role in must)
    return f"{text} and one of {', '.join(may)}" if form in ("ranking", "single") else text


# --- records to pairs -------------------------------------------------------------------------------------------


class _Row:
    """A record seen through the reading; everything raises Unusable where a value is not what it should be."""

    def __init__(self, source: Source, reading: Reading, record: Record) -> None:
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

    def picture(self, role: str, uid_role: str = "") -> Picture:
        uid = self.value(uid_role) if uid_role else None
        return picture(self.source, self.value(role), role, uid if isinstance(uid, str) else None)

    def candidate(
        self, pictures: tuple[Picture, Picture], label: float | None, rewards: tuple[float, float] | None
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


def picture(source: Source, value: Any, name: str, uid: str | None = None) -> Picture:
    """The picture that a cell means: bytes, a path, or Hugging Face's {bytes, path}. Raises Unusable."""
    content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if isinstance(content, str):
        content, path = None, content
    if isinstance(content, bytes) and content:
        return Picture(partial(bytes, content), None, uid or (path if isinstance(path, str) else None))
    if content is None and isinstance(path, str) and path:
        return Picture(partial(source.picture, _utf8(path, f"path of {name}")), path, uid or path)
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


def _unpacked(value: Any) -> Any:
    """A list that a CSV cell holds as text."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _two(row: _Row) -> Unit:
    pictures = (row.picture("image_0", "uid_0"), row.picture("image_1", "uid_1"))
    label = data.label_of(lambda name: row.number(name))
    rewards = data.rewards_of(lambda name: row.number(name), ("reward_0",) if row.has("reward_0") else ())
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
    usable: list[tuple[Picture, float, float | None]] = []
    for i, (cell, value, score) in enumerate(zip(cells, values, scores, strict=True)):
        try:
            if value is None or math.isinf(value):
                raise Unusable(f"no {role}: that of picture {i} is {'missing' if value is None else 'infinite'}")
            usable.append((picture(row.source, cell, f"images[{i}]"), -value if role == "rank" else value, score))
        except Unusable as error:
            left_out.append(Rejected(row.record.number, row.record.name, str(error)))
    return left_out + _pairs_of(row, usable, pairing)


def _pairs_of(row: _Row, usable: Sequence[tuple[Picture, float, float | None]], pairing: str) -> Unit:
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
    return data.rewards_of({"reward_0": one, "reward_1": two}.get, ("reward_0",))


def _list(row: _Row, role: str) -> list[Any]:
    value = _unpacked(row.value(role))
    if not isinstance(value, list):
        raise Unusable(f"no {role}: {'it is null' if value is None else 'it is no list'}")
    return value


# --- single pictures --------------------------------------------------------------------------------------------


class _Shelf:
    """Pictures of one prompt each, in an unnamed file, with 16 bytes a picture in memory."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._prompts, self._starts = array("Q"), array("Q", [0])

    def add(self, prompt: str, facts: Mapping[str, Any], content: bytes) -> None:
        head = json.dumps([prompt, facts, len(content)]).encode() + b"\n"
        self._file.write(head)
        self._file.write(content)
        self._prompts.append(data.content_hash(prompt.encode()))
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


def _grouped(source: Source, reading: Reading, pairing: str, records: Iterable[Record], folder: Path) -> Iterator[Unit]:
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
        except (Unusable, BadPicture) as error:
            yield [Rejected(record.number, record.name, str(error))]
    for group in shelf.groups():
        yield from _pairs_in(source, group, pairing)


def _pairs_in(
    source: Source, group: Sequence[tuple[str, dict[str, Any], Callable[[], bytes]]], pairing: str
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
    source: Source,
    better: tuple[str, dict[str, Any], Callable[[], bytes]],
    worse: tuple[str, dict[str, Any], Callable[[], bytes]],
) -> Candidate | Rejected:
    pictures = []
    for _, facts, read in (better, worse):
        path = facts["path"]
        pictures.append(Picture(partial(source.picture, path) if path else read, path, facts["uid"]))
    prompt, facts, _ = better
    named = [p.uid or f["name"] for p, (_, f, _) in zip(pictures, (better, worse), strict=True)]
    try:
        rewards = _scores(facts["score"], worse[1]["score"])
    except Unusable as error:
        return Rejected(facts["row"], facts["name"], str(error))
    return Candidate(facts["row"], "/".join(named), prompt, (pictures[0], pictures[1]), 1.0, rewards)
