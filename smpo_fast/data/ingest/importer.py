"""Program: preference pairs of any source into one canonical table, streamed, counted and checked.

Records become pairs (smpo_fast.formats), every picture is read and looked at, and what is usable is written
(smpo_fast.table).  Memory is bounded whatever the size of the source.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from smpo_fast.common.errors import UserError
from smpo_fast.common.pools import map_ahead
from smpo_fast.data import images
from smpo_fast.data.images import BadImage
from smpo_fast.data.ingest import columns as ingest_columns
from smpo_fast.data.ingest import pairing as ingest_pairing
from smpo_fast.data.ingest import sources
from smpo_fast.data.ingest.columns import Reading
from smpo_fast.data.ingest.pairing import Unit
from smpo_fast.data.ingest.sources import PairSource, Record
from smpo_fast.data.pairs import reader
from smpo_fast.data.pairs.rules import reason_kind, same_image
from smpo_fast.data.pairs.schema import Candidate, FoundImage, Rejected
from smpo_fast.data.pairs.writer import PART_BYTES, Pair, Seen, TableWriter, schema

FORMAT = 1
_LOOK = 200  # records of a dry run
_WORKERS = 4  # threads that read, hash and look at pictures; more do not help where pictures are in the records


@dataclass(frozen=True)
class ImportOptions:
    """How to import; the defaults find out what they can."""

    format: str = ""
    container: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)  # meaning -> column
    split: str = ""
    revision: str = ""
    root: str = ""  # folder that paths start from, where it is not the source's own
    pairs: str = ""  # formats.PAIRINGS; '': all of a ranking, single pictures once
    paths: bool = False  # store paths, not bytes
    check: bool = False  # decode every picture
    strict: bool = False


def import_pairs(given: str, out: Path, options: ImportOptions, *, part_bytes: int = PART_BYTES) -> dict[str, Any]:
    """Import ``given`` into the folder ``out`` and return what ``import.json`` says; print a report.

    An ``out`` that holds this very import is returned as it is.  Raises SettingsError for a source that is not
    understood, an ``out`` that holds something else, no usable pair, and with ``strict`` for the first bad row.
    """
    source, reading, pairing = _understand(given, options)
    identity = _identity(source, reading, pairing, options)
    if (out / reader.IMPORT_INFO).is_file():
        return _finished(out, identity)
    print(f"{given}: {source.container}{f', split {source.split}' if source.split else ''}; {reading}", flush=True)
    columns = schema(out, source.root if options.paths else "")
    with TableWriter(out, identity, columns, part_bytes) as output:
        if output.next_unit:
            print(f"{out}: going on with an interrupted import after {output.pairs} pairs", flush=True)
        for unit in _checked(_units(source, reading, pairing, output), options.check):
            if options.strict:
                _refuse(given, unit)
            output.add(unit)
        summary = {**identity, "given": given, "rejected": dict(output.reasons.most_common()), **output.finish()}
        if not summary["pairs"]:
            raise UserError(f"{given}: no usable pair; rejected: {_listed(output.reasons)}. {output.example}")
        output.publish(summary)
    print(report(summary), flush=True)
    return summary


def dry_run(given: str, options: ImportOptions, rows: int = 5) -> str:
    """What would be understood and the first ``rows`` pairs, from the first records; writes nothing."""
    source, reading, pairing = _understand(given, options)
    records = source.count()
    lines = [
        f"{given}: {source.container}, {len(source.files)} file(s)"
        + (f", split {source.split}" if source.split else ""),
        f"format {reading.format}, pairs: {pairing} ({ingest_pairing.PAIRINGS[pairing]})",
        *(f"  {role:<9} = column '{column}'" for role, column in reading.columns.items()),
    ]
    reasons: Counter[str] = Counter()
    shown: list[str] = []
    made = 0
    with tempfile.TemporaryDirectory() as folder, closing(_records(source, reading)) as stream:
        found = ingest_pairing.units(source, reading, pairing, islice(stream, _LOOK), Path(folder))
        for unit in _checked(found, options.check):
            for item in unit:
                if isinstance(item, Rejected):
                    reasons[reason_kind(item.reason)] += 1
                else:
                    made += 1
                if len(shown) < rows:
                    shown.append(_shown(item))
    total = "number of records unknown until they are read" if records is None else f"{records} records"
    lines += ["first rows:", *shown, f"{total}; of the first {_LOOK}: {made} pairs, rejected: {_listed(reasons)}"]
    return "\n".join(lines)


def report(summary: Mapping[str, Any]) -> str:
    """What an import came to, as a few lines of text."""
    facts = summary["statistics"]
    small, middle, large = facts["shorter_side"]
    rejected = _listed(Counter(summary["rejected"]))
    lines = [
        f"{summary['pairs']} pairs in {len(summary['parts'])} part(s), rejected: {rejected}",
        f"  labels: {facts['labelled']}, of these {facts['ties']} ties; picture 0 is preferred in "
        f"{facts['first_preferred']:.1%} of the others; rewards: {facts['scored']}",
        f"  pictures: {facts['pictures']} different ones, {facts['pictures_in_several_pairs']} in several pairs; "
        f"shorter side {small} to {large} px, median {middle}; {facts['unequal_sizes']} pairs of unequal sizes",
        f"  prompts: {facts['prompts']} different ones, {facts['empty_prompts']} pairs with the empty one, "
        f"{facts['pairs_of_commonest_prompt']} with the most frequent one",
        f"  repeated pairs: {facts['repeated_pairs']}, of these {facts['swapped_pairs']} in the other order and "
        f"{facts['contradicting_pairs']} with the other picture preferred",
    ]
    if facts["undecided"]:
        lines.append(f"  {facts['undecided']} pairs have neither label nor rewards: score them (data.scorer)")
    return "\n".join(lines)


# --- what is asked for ------------------------------------------------------------------------------------------


def _understand(given: str, options: ImportOptions) -> tuple[PairSource, Reading, str]:
    for name, value, allowed in (
        ("--format", options.format, ingest_columns.FORMATS),
        ("--container", options.container, sources.CONTAINERS),
        ("--pairs", options.pairs, ingest_pairing.PAIRINGS),
    ):
        if value and value not in allowed:
            raise UserError(f"{name}: '{value}' is none of {', '.join(allowed)}")
    source = sources.locate(
        given, container=options.container, split=options.split, revision=options.revision, root=options.root
    )
    if options.paths and (not source.local or source.fence != source.root):
        raise UserError(f"--paths: the pictures of {given} are not in a folder here that will stay: leave it out")
    reading = ingest_columns.understand(source, options.format, options.columns)
    return source, reading, options.pairs or ("once" if reading.format == "single" else "all")


def _identity(source: PairSource, reading: Reading, pairing: str, options: ImportOptions) -> dict[str, Any]:
    """What decides the table's content: compared before an import is taken up, and kept in its summary."""
    return {
        "format_version": FORMAT,
        "source": {"root": source.root, "split": source.split, "files": source.facts()},
        "container": source.container,
        "format": reading.format,
        "columns": reading.columns,
        "pairing": pairing,
        "paths": options.paths,
        "check": options.check,
        "strict": options.strict,
    }


def _finished(out: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    try:
        summary = json.loads((out / reader.IMPORT_INFO).read_text())
    except ValueError as error:
        raise UserError(f"{out / reader.IMPORT_INFO} is damaged ({error}): remove {out}") from error
    other = [key for key, value in identity.items() if summary.get(key) != value]
    if other:
        raise UserError(f"{out} holds another import (it differs in {', '.join(other)}): remove it, or name another")
    print(f"{out}: imported already\n{report(summary)}", flush=True)
    return summary


def _records(source: PairSource, reading: Reading, start: int = 0) -> Generator[Record, None, None]:
    return source.records(start, list(reading.columns.values()))


def _units(source: PairSource, reading: Reading, pairing: str, output: TableWriter) -> Iterator[Unit]:
    """The units that are not in a finished part yet, with a progress bar over the records."""
    # A unit is a record, except of single pictures, which must all be known first.
    start = 0 if reading.format == "single" else output.next_unit
    with (
        closing(_records(source, reading, start)) as records,
        tqdm(records, total=source.count(), initial=start, unit=" records", desc="import", mininterval=0.5) as bar,
    ):
        found = ingest_pairing.units(source, reading, pairing, bar, output.folder)
        yield from islice(found, output.next_unit - start, None)


def _refuse(given: str, unit: Sequence[Pair | Rejected]) -> None:
    for item in unit:
        if isinstance(item, Rejected):
            raise UserError(f"{given}: row {item.row} ({item.uid}) cannot be used: {item.reason} (--strict)")


def _listed(reasons: Counter[str]) -> str:
    listed = ", ".join(f"{kind} ({count})" for kind, count in reasons.most_common())
    return f"{reasons.total()}: {listed}" if listed else "none"


# --- looking at pictures ----------------------------------------------------------------------------------------


def _checked(units: Iterable[Unit], check: bool) -> Iterator[list[Pair | Rejected]]:
    """Units whose pictures were read and looked at, in order, in threads, a bounded number ahead."""
    look = partial(_look_at, check=check)
    return map_ahead(look, units, _WORKERS, ahead=2 * _WORKERS)


def _look_at(unit: Unit, *, check: bool) -> list[Pair | Rejected]:
    seen: dict[int, Seen | BadImage] = {}
    found: list[Pair | Rejected] = []
    for item in unit:
        found.append(item if isinstance(item, Rejected) else _look_at_pair(item, seen, check))
    return found


def _look_at_pair(candidate: Candidate, seen: dict[int, Seen | BadImage], check: bool) -> Pair | Rejected:
    pictures = []
    for name, picture in zip(("jpg_0", "jpg_1"), candidate.pictures, strict=True):
        if id(picture) not in seen:
            seen[id(picture)] = _see(picture, check)
        one = seen[id(picture)]
        if isinstance(one, BadImage):
            return Rejected(candidate.row, candidate.uid, f"{name} {one}")
        pictures.append(one)
    if reason := same_image(pictures[0].hash, pictures[1].hash):
        return Rejected(candidate.row, candidate.uid, reason)
    return Pair(candidate, (pictures[0], pictures[1]))


def _see(picture: FoundImage, check: bool) -> Seen | BadImage:
    try:
        content = picture.read()
        size = images.decode(content).size if check else images.sniff(content)
        return Seen(content, picture.path, images.content_hash(content), size)
    except BadImage as error:
        return error


def _shown(item: Pair | Rejected) -> str:
    if isinstance(item, Rejected):
        return f"  row {item.row} ({item.uid}) rejected: {item.reason}"
    candidate, (one, two) = item.candidate, item.pictures
    sizes = " and ".join("{}x{}".format(*seen.size) for seen in (one, two))
    return (
        f"  row {candidate.row} ({candidate.uid}): label_0 = {candidate.label}, rewards = {candidate.rewards}, "
        f"{sizes} px, '{candidate.prompt[:60]}'"
    )
