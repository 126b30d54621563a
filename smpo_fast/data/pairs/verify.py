"""Verifying a pair table: the hashes of its parts, and every row by the rules of a usable pair.

A table that other programs wrote (Pick-a-Pic's parquet files) has no hashes; its rows are verified in the same way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from smpo_fast.common.console import printable
from smpo_fast.common.errors import DataError, environment_problem
from smpo_fast.common.verification import (
    BAD,
    Finding,
    bad,
    caught,
    check_files,
    check_leftovers_of,
    check_unlisted,
    good,
    note,
    read_description,
)
from smpo_fast.data import images
from smpo_fast.data.images import BadImage
from smpo_fast.data.pairs import reader
from smpo_fast.data.pairs.pair import RawPair, Rejected
from smpo_fast.data.pairs.rules import reason_kind, same_image
from smpo_fast.data.pairs.schema import REJECTED_FILE
from smpo_fast.data.pairs.summary import SUMMARY_FILE

_ADVICE = "put back a good copy, or remove this folder and import or generate again"
_UNLISTED = "training does not read it; remove it if it is not yours"
_SHOWN = 5  # unusable rows that are named


def is_table(path: Path) -> bool:
    """Whether a path is a pair table: a parquet file, or a folder of them, even one that has lost a file."""
    if path.is_dir():
        return (path / SUMMARY_FILE).is_file() or any(path.glob("*.parquet"))
    return path.suffix == ".parquet"


def verify_table(path: Path, *, deep: bool) -> Iterator[Finding]:
    """Verify a table: the hashes that ``smpo import`` recorded, then every row and the header of every image.

    deep: decode every image completely.
    """
    damaged = False
    for finding in _check_files(path):
        damaged |= finding.grade == BAD
        yield finding
    if not damaged:
        yield from caught(path, lambda: _check_rows(path, deep=deep))
    yield from check_leftovers_of(path)


def _check_files(path: Path) -> Iterator[Finding]:
    imported = path.is_dir() and ((path / SUMMARY_FILE).is_file() or (path / REJECTED_FILE).is_file())
    if not imported:
        yield note(path, "not written by smpo import, so no hash was recorded; its rows are read")
        return
    summary, found = read_description(path / SUMMARY_FILE, _ADVICE, "parts")
    yield from found
    if not summary:
        return
    files = {part["name"]: part for part in summary["parts"]} | summary.get("files", {})
    yield from check_files(path, files, _ADVICE)
    for part in summary["parts"]:
        if (path / part["name"]).is_file():
            yield from caught(path / part["name"], lambda part=part: _check_part(path, part))  # type: ignore[misc]
    yield from check_unlisted(path, {*files, SUMMARY_FILE, REJECTED_FILE}, _UNLISTED)


def _check_part(path: Path, part: Mapping[str, Any]) -> Iterator[Finding]:
    file = path / part["name"]
    try:
        rows = pq.read_metadata(file).num_rows
    except (pa.ArrowException, OSError) as error:
        raise environment_problem(error, file) or DataError(f"cannot be read ({error}): {_ADVICE}") from error
    if rows != part["pairs"]:
        yield bad(file, f"has {rows} pairs, {SUMMARY_FILE} says {part['pairs']}: {_ADVICE}")


def _check_rows(path: Path, *, deep: bool) -> Iterator[Finding]:
    rows, reasons, shown = 0, Counter[str](), 0
    for item in reader.read_pairs(path):
        rows += 1
        reason = item.reason if isinstance(item, Rejected) else _image_problem(item, deep=deep)
        if reason:
            reasons[reason_kind(reason)] += 1
            if shown < _SHOWN:
                shown += 1
                yield bad(path, printable(f"row {item.row} ({item.uid}) cannot be used: {reason}"))
    looked = "decoded completely" if deep else "with readable headers (--deep decodes them)"
    if reasons:
        listed = ", ".join(f"{kind} ({count})" for kind, count in reasons.most_common())
        yield bad(path, printable(f"{sum(reasons.values())} of {rows} rows cannot be used and are left out: {listed}"))
    elif not rows:
        yield bad(path, "has no rows")
    else:
        yield good(path, f"{rows} usable pairs, {2 * rows} images {looked}")


def _image_problem(pair: RawPair, *, deep: bool) -> str | None:
    for name, content in zip(("jpg_0", "jpg_1"), pair.images, strict=True):
        try:
            images.decode(content) if deep else images.header_size(content)
        except BadImage as error:
            return f"{name} {error}"
    return same_image(*pair.images)
