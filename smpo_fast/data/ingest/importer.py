"""``smpo import``: preference data of any source into one pair table, streamed, counted and checked.

A source is located, the meaning of its columns detected, its records turned into candidate pairs, their images
inspected, and what is usable is written. Memory is bounded whatever the size of the source.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from smpo_fast.common.console import printable
from smpo_fast.common.errors import ConfigError, DataError
from smpo_fast.config.commands import ImportOptions
from smpo_fast.data.ingest.candidates import Candidates, make_candidates
from smpo_fast.data.ingest.columns import ColumnMapping, detect_columns
from smpo_fast.data.ingest.fingerprint import fingerprint
from smpo_fast.data.ingest.inspection import inspect_images
from smpo_fast.data.ingest.locate import locate
from smpo_fast.data.ingest.ranking import PAIRINGS
from smpo_fast.data.ingest.records import Record
from smpo_fast.data.ingest.sources import PairSource
from smpo_fast.data.pairs import summary as pairs_summary
from smpo_fast.data.pairs.pair import Rejected, UsablePair
from smpo_fast.data.pairs.rules import reason_kind
from smpo_fast.data.pairs.schema import table_schema
from smpo_fast.data.pairs.writer import PART_BYTES, TableWriter, remove_working_files

FORMAT = 1
_DRY_RUN_RECORDS = 200


def import_pairs(given: str, out: Path, options: ImportOptions, *, part_bytes: int = PART_BYTES) -> dict[str, Any]:
    """Import the source ``given`` into the folder ``out``, print a report and return what ``import.json`` says.

    An ``out`` that holds the result of this very import is returned as it is. Raises DataError for a source that is
    not understood, an ``out`` that holds something else, an import without a usable pair, and with ``strict`` for the
    first rejected row; ConfigError for impossible options; EnvironmentProblem for what the machine lacks.
    """
    source, mapping, pairing = _understand(given, options)
    identity = _identity(source, mapping, pairing, options)
    if pairs_summary.exists(out):
        summary = _read_finished(out, identity)
        remove_working_files(out)
        print(f"{out}: imported already\n{pairs_summary.report(summary)}", flush=True)
        return summary
    split = f", split {source.split}" if source.split else ""
    print(printable(f"{given}: {source.container}{split}; {mapping}"), flush=True)
    schema = table_schema(out, source.root if options.paths else "")
    # closed here, so that the progress bar is: an error is printed on a line of its own
    with (
        TableWriter(out, identity, schema, part_bytes) as table,
        closing(_candidates(source, mapping, pairing, table)) as candidates,
    ):
        if table.next_unit:
            print(f"{out}: resuming an interrupted import after {table.pairs} pairs", flush=True)
        for unit in inspect_images(candidates, decode=options.check):
            if options.strict:
                _refuse_rejected(given, unit)
            table.add(unit)
        rejected = dict(table.rejected_by_kind.most_common())
        summary = {**identity, "given": given, "rejected": rejected, **table.finish()}
        if not summary["pairs"]:
            counts = pairs_summary.list_counts(rejected)
            raise DataError(printable(f"{given}: no usable pair; rejected: {counts}. {table.first_rejected}"))
        table.publish(summary)
    print(pairs_summary.report(summary), flush=True)
    return summary


@dataclass(frozen=True)
class Understanding:
    """How an import would understand a source, from its first records.

    records: None if their number is unknown until all are read.  read: at most how many were read; pairs, rejected:
    what they gave, and counts of what they did not, by reason.  rows: the first of them in words.
    """

    given: str
    container: str
    files: int
    split: str
    format: str
    pairing: str  # a key of PAIRINGS
    columns: dict[str, str]
    records: int | None
    read: int
    pairs: int
    rejected: dict[str, int]
    rows: list[str]

    def __str__(self) -> str:
        total = "number of records unknown until they are read" if self.records is None else f"{self.records} records"
        counts = pairs_summary.list_counts(self.rejected)
        lines = [
            f"{self.given}: {self.container}, {self.files} file(s)" + (f", split {self.split}" if self.split else ""),
            f"format {self.format}, pairs: {self.pairing} ({PAIRINGS[self.pairing]})",
            *(f"  {role:<9} = column '{column}'" for role, column in self.columns.items()),
            "first rows:",
            *(f"  {row}" for row in self.rows),
            f"{total}; in the first {self.read}: {self.pairs} pairs, rejected: {counts}",
        ]
        return "\n".join(map(printable, lines))


def dry_run(given: str, options: ImportOptions, rows: int = 5) -> Understanding:
    """What an import would understand, and the first ``rows`` rows, from the first records; writes nothing.

    Raises the errors of ``import_pairs`` about the source and the options.
    """
    source, mapping, pairing = _understand(given, options)
    records = source.count()
    rejected: Counter[str] = Counter()
    shown: list[str] = []
    made = 0
    with tempfile.TemporaryDirectory() as spool, closing(_records(source, mapping)) as stream:
        found = make_candidates(source, mapping, pairing, islice(stream, _DRY_RUN_RECORDS), Path(spool))
        for unit in inspect_images(found, decode=options.check):
            for item in unit:
                if isinstance(item, Rejected):
                    rejected[reason_kind(item.reason)] += 1
                else:
                    made += 1
                if len(shown) < rows:
                    shown.append(_describe(item))
    return Understanding(
        given, source.container, len(source.files), source.split, mapping.format, pairing, dict(mapping.columns),
        records, _DRY_RUN_RECORDS, made, dict(rejected), shown,
    )  # fmt: skip


def _understand(given: str, options: ImportOptions) -> tuple[PairSource, ColumnMapping, str]:
    """The source, the meaning of its columns, and the key of PAIRINGS to use."""
    source = locate(
        given, container=options.container, split=options.split, revision=options.revision, root=options.root
    )
    if options.paths and (not source.local or source.boundary != source.root):
        raise ConfigError(
            printable(
                f"--paths: the images of {given} are not in a permanent folder on this machine: leave --paths out"
            )
        )
    mapping = detect_columns(source, options.format, options.columns)
    return (source, mapping, options.pairs or ("once" if mapping.format == "single" else "all"))


def _identity(source: PairSource, mapping: ColumnMapping, pairing: str, options: ImportOptions) -> dict[str, Any]:
    """What decides the table's content: compared before an import is resumed, and kept in its summary."""
    return {
        "format_version": FORMAT,
        "source": {
            "root": source.root,
            "split": source.split,
            "files": source.stamps(),
            "fingerprint": fingerprint(source, mapping),
        },
        "container": source.container,
        "format": mapping.format,
        "columns": mapping.columns,
        "pairing": pairing,
        "paths": options.paths,
        "check": options.check,
        "strict": options.strict,
    }


def _read_finished(out: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The summary of a finished import. Raises DataError if it is, or may be, another than that of ``identity``."""
    summary, source = pairs_summary.read(out), dict(identity["source"])
    if "fingerprint" in (summary.get("source") or {}):
        pairs_summary.check_identity(out, summary, identity)
        return summary
    found = source.pop("fingerprint")  # an earlier version did not write one
    pairs_summary.check_identity(out, summary, {**identity, "source": source})
    if found["image_files"]:
        raise DataError(
            f"{out} was imported by an earlier version, which did not record the state of its {found['image_files']} "
            f"image files, so changes to them cannot be noticed: remove {out} to import again, or use it as it is"
        )
    return summary


def _records(source: PairSource, mapping: ColumnMapping, start: int = 0) -> Generator[Record, None, None]:
    return source.records(start, list(mapping.columns.values()))


def _candidates(
    source: PairSource, mapping: ColumnMapping, pairing: str, table: TableWriter
) -> Generator[Candidates, None, None]:
    """The candidates that are not in a finished part yet, with a progress bar over the records."""
    # One list of candidates for each record, except for single images, of which all records must be read first.
    start = 0 if mapping.format == "single" else table.next_unit
    with (
        closing(_records(source, mapping, start)) as records,
        tqdm(records, total=source.count(), initial=start, unit=" records", desc="import", mininterval=0.5) as bar,
    ):
        found = make_candidates(source, mapping, pairing, bar, table.folder)
        yield from islice(found, table.next_unit - start, None)


def _refuse_rejected(given: str, unit: Sequence[UsablePair | Rejected]) -> None:
    for item in unit:
        if isinstance(item, Rejected):
            raise DataError(printable(f"{given}: row {item.row} ({item.uid}) cannot be used: {item.reason} (--strict)"))


def _describe(item: UsablePair | Rejected) -> str:
    if isinstance(item, Rejected):
        return f"row {item.row} ({item.uid}) rejected: {item.reason}"
    candidate = item.candidate
    sizes = " and ".join("{}x{}".format(*image.size) for image in item.images)
    return (
        f"row {candidate.row} ({candidate.uid}): label_0 = {candidate.label}, rewards = {candidate.rewards}, "
        f"{sizes} px, '{candidate.prompt[:60]}'"
    )
