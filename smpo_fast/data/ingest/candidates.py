"""From records to candidate pairs, by the format of the records."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from smpo_fast.data.ingest import single_images
from smpo_fast.data.ingest.columns import ColumnMapping
from smpo_fast.data.ingest.mapped_records import MappedRecord, to_image, to_number
from smpo_fast.data.ingest.ranking import better_and_worse
from smpo_fast.data.ingest.records import Record
from smpo_fast.data.ingest.source_folder import SourceFolder
from smpo_fast.data.pairs.pair import CandidatePair, ImageRef, Rejected
from smpo_fast.data.pairs.rules import Unusable, label_of, rewards_of
from smpo_fast.method.labels import TIE

Candidates = list[CandidatePair | Rejected]  # what one record gives; for 'single', one pair or one rejected record


def make_candidates(
    folder: SourceFolder, mapping: ColumnMapping, pairing: str, records: Iterable[Record], spool: Path
) -> Iterator[Candidates]:
    """The candidate pairs of some records, in an order that is always the same.

    A record that cannot be used gives a Rejected instead. pairing: a key of ``ranking.PAIRINGS``.  spool: the folder
    for a temporary file in which the images of 'single' wait until all images of their prompt are known.
    """
    if mapping.format == "single":
        yield from single_images.make_candidates(folder, mapping, pairing, records, spool)
        return
    makers: dict[str, Callable[[MappedRecord], Candidates]] = {
        "pairs": _from_two_images,
        "chosen": _from_chosen_and_rejected,
        "ranking": partial(_from_ranking, mapping.order_role if mapping.format == "ranking" else "", pairing),
    }
    for record in records:
        try:
            yield makers[mapping.format](MappedRecord(folder, mapping, record))
        except Unusable as error:
            yield [Rejected(record.number, record.name, str(error))]


def _from_two_images(record: MappedRecord) -> Candidates:
    images = (record.image("image_0", "uid_0"), record.image("image_1", "uid_1"))
    label = label_of(record.number)
    rewards = rewards_of(record.number, ("reward_0",) if record.has("reward_0") else ())
    return [record.candidate(images, label, rewards)]


def _from_chosen_and_rejected(record: MappedRecord) -> Candidates:
    return [record.candidate((record.image("chosen"), record.image("rejected")), 1.0, None)]


def _from_ranking(role: str, pairing: str, record: MappedRecord) -> Candidates:
    cells = record.elements("images")
    values = [to_number(value, role) for value in record.elements(role)]
    scores: list[float | None] = [None] * len(cells)
    if record.has("score"):
        scores = [to_number(value, "score") for value in record.elements("score")]
    if not len(cells) == len(values) == len(scores):
        raise Unusable(f"lists of unequal length: {len(cells)} images, {len(values)} {role}, {len(scores)} scores")
    rejected: Candidates = []
    usable: list[tuple[ImageRef, float, float | None]] = []
    for i, (cell, value, score) in enumerate(zip(cells, values, scores, strict=True)):
        try:
            if value is None or math.isinf(value):
                raise Unusable(f"no {role}: that of image {i} is {'missing' if value is None else 'infinite'}")
            usable.append((to_image(record.folder, cell, f"images[{i}]"), -value if role == "rank" else value, score))
        except Unusable as error:
            rejected.append(Rejected(record.record.number, record.record.name, str(error)))
    return rejected + _pairs_of(record, usable, pairing)


def _pairs_of(record: MappedRecord, usable: Sequence[tuple[ImageRef, float, float | None]], pairing: str) -> Candidates:
    """Pairs of (image, value, score); a higher value is better."""
    values = [value for _, value, _ in usable]
    if len(values) == 2 and values[0] == values[1]:
        (zero, _, score_0), (one, _, score_1) = usable
        return [record.candidate((zero, one), TIE, single_images.rewards_from_scores(score_0, score_1))]
    made: Candidates = []
    for better, worse in better_and_worse(values, pairing):
        (zero, _, score_0), (one, _, score_1) = usable[better], usable[worse]
        made.append(record.candidate((zero, one), 1.0, single_images.rewards_from_scores(score_0, score_1)))
    if not made:
        raise Unusable(f"nothing is better: {len(values)} usable images, all of one rank")
    return made
