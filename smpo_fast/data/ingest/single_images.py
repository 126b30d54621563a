"""Candidate pairs from records of single images: images of one prompt are collected on disk, then paired."""

from __future__ import annotations

import json
import math
import os
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from smpo_fast.data.images import BadImage, content_hash
from smpo_fast.data.ingest.columns import ColumnMapping
from smpo_fast.data.ingest.mapped_records import MappedRecord
from smpo_fast.data.ingest.ranking import better_and_worse
from smpo_fast.data.ingest.records import Record
from smpo_fast.data.ingest.source_folder import SourceFolder
from smpo_fast.data.pairs.pair import CandidatePair, ImageRef, Rejected
from smpo_fast.data.pairs.rules import Unusable, rewards_of


@dataclass(frozen=True)
class _SingleImage:
    """A spooled image. facts: row, name, value (higher is better), score, path and uid of its record."""

    prompt: str
    facts: dict[str, Any]
    read: Callable[[], bytes]


def make_candidates(
    folder: SourceFolder, mapping: ColumnMapping, pairing: str, records: Iterable[Record], spool: Path
) -> Iterator[list[CandidatePair | Rejected]]:
    """Lists of one pair or one rejected record each: unusable records first, then by prompt in order of appearance.

    The arguments are those of ``candidates.make_candidates``.
    """
    spooled = _ImageSpool(spool)
    for record in records:
        try:
            _add_to(spooled, MappedRecord(folder, mapping, record), mapping.order_role)
        except (Unusable, BadImage) as error:
            yield [Rejected(record.number, record.name, str(error))]
    for group in spooled.by_prompt():
        yield from _pairs_in(folder, group, pairing)


def rewards_from_scores(score_0: float | None, score_1: float | None) -> tuple[float, float] | None:
    """The scores of a better and a worse image as the rewards of their pair. Raises Unusable where one is missing."""
    return rewards_of({"reward_0": score_0, "reward_1": score_1}.get, ("reward_0",))


class _ImageSpool:
    """Images with their prompts in an unnamed file, of which only 16 bytes an image are kept in memory."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._prompts, self._starts = array("Q"), array("Q", [0])

    def add(self, prompt: str, facts: Mapping[str, Any], content: bytes) -> None:
        head = json.dumps([prompt, facts, len(content)]).encode() + b"\n"
        self._file.write(head)
        self._file.write(content)
        self._prompts.append(content_hash(prompt.encode()))
        self._starts.append(self._starts[-1] + len(head) + len(content))

    def by_prompt(self) -> Iterator[list[_SingleImage]]:
        """The images of each prompt, in the order in which the prompts appeared first."""
        self._file.flush()
        hashes = np.frombuffer(self._prompts, np.uint64)
        _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
        order = np.lexsort((np.arange(len(hashes)), first[group]))
        bounds = np.flatnonzero(np.diff(first[group][order])) + 1
        for members in np.split(order, bounds) if len(order) else ():
            same_prompt: dict[str, list[_SingleImage]] = {}  # more than one only where hashes collide
            for i in members.tolist():
                image = self._get(i)
                same_prompt.setdefault(image.prompt, []).append(image)
            yield from same_prompt.values()

    def _get(self, i: int) -> _SingleImage:
        start, end = self._starts[i], self._starts[i + 1]
        head = b""
        while b"\n" not in head:
            head += self._read(4096, start + len(head))
        prompt, facts, length = json.loads(head[: head.index(b"\n") + 1])
        return _SingleImage(prompt, facts, partial(self._read, length, end - length))

    def _read(self, length: int, start: int) -> bytes:
        return os.pread(self._file.fileno(), length, start)


def _add_to(spool: _ImageSpool, record: MappedRecord, role: str) -> None:
    value, score, image = (record.number(role), record.number("score"), record.image("image"))
    if value is None or math.isinf(value):
        raise Unusable(f"no {role}: it is {'missing' if value is None else 'infinite'}")
    facts = {"row": record.record.number, "name": record.record.name, "value": -value if role == "rank" else value}
    facts |= {"score": score, "path": image.path, "uid": image.uid}
    spool.add(record.prompt(), facts, b"" if image.path else image.read())


def _pairs_in(
    folder: SourceFolder, group: Sequence[_SingleImage], pairing: str
) -> Iterator[list[CandidatePair | Rejected]]:
    paired: set[int] = set()
    for better, worse in better_and_worse([image.facts["value"] for image in group], pairing):
        paired |= {better, worse}
        yield [_pair_of(folder, group[better], group[worse])]
    reason = f"unpaired: none of the {len(group)} images of its prompt is left as a partner (--pairs {pairing})"
    for i, image in enumerate(group):
        if i not in paired:
            yield [Rejected(image.facts["row"], image.facts["name"], reason)]


def _pair_of(folder: SourceFolder, better: _SingleImage, worse: _SingleImage) -> CandidatePair | Rejected:
    row, name = better.facts["row"], better.facts["name"]
    try:
        rewards = rewards_from_scores(better.facts["score"], worse.facts["score"])
    except Unusable as error:
        return Rejected(row, name, str(error))
    refs = (_image_ref(folder, better), _image_ref(folder, worse))
    uid = "/".join(ref.uid or image.facts["name"] for ref, image in zip(refs, (better, worse), strict=True))
    return CandidatePair(row, uid, better.prompt, refs, 1.0, rewards)


def _image_ref(folder: SourceFolder, image: _SingleImage) -> ImageRef:
    path = image.facts["path"]
    return ImageRef(partial(folder.read_file, path) if path else image.read, path, image.facts["uid"])
