"""Records of JSON and CSV files, which usually name images by path."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

import fsspec

from smpo_fast.data.ingest.records import (
    MAX_RECORD_BYTES,
    Cells,
    UnreadableRecord,
    as_cells,
    parse_object,
    reject_surrogates,
)

_CHUNK = 1 << 20


def read_json(fs: fsspec.AbstractFileSystem, file: str) -> Iterator[Cells | UnreadableRecord]:
    """The objects of a JSON array, or of a file with one object a line."""
    with fs.open(file, "rb") as stream:
        head = stream.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        stream.seek(0)
        yield from _json_array(stream) if head == b"[" else _json_lines(stream)


def read_csv(fs: fsspec.AbstractFileSystem, file: str) -> Iterator[Cells | UnreadableRecord]:
    """The rows of a CSV file below its header; the separator is the most frequent of tab, semicolon and comma there."""
    csv.field_size_limit(MAX_RECORD_BYTES)
    with fs.open(file, "rb") as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        head = text.readline(_CHUNK)
        delimiter = max("\t;,", key=head.count)
        names = next(csv.reader([head], delimiter=delimiter), [])
        rows = csv.reader(text, delimiter=delimiter)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield UnreadableRecord(f"not CSV: {error}")
                continue
            if row:
                yield _csv_row(names, row)


def _json_lines(stream: Any) -> Iterator[Cells | UnreadableRecord]:
    rest, too_long = b"", False
    while chunk := stream.read(_CHUNK):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield from _line(line, too_long)
            too_long = False
        if len(rest) > MAX_RECORD_BYTES:
            rest, too_long = b"", True
    yield from _line(rest, too_long)


def _line(line: bytes, too_long: bool) -> Iterator[Cells | UnreadableRecord]:
    if too_long:
        yield UnreadableRecord(f"too large: a line of more than {MAX_RECORD_BYTES >> 20} MB")
    elif line.strip(b"\xef\xbb\xbf \t\r\n"):
        yield parse_object(line)


def _json_array(stream: Any) -> Iterator[Cells | UnreadableRecord]:
    """The elements of one array, of which no more than a record and a chunk are in memory."""
    chunks = io.TextIOWrapper(stream, encoding="utf-8-sig")
    decoder, text, at, more = json.JSONDecoder(), chunks.read(_CHUNK), 0, True
    at = text.index("[") + 1
    while True:
        while at < len(text) and text[at] in ", \t\r\n":
            at += 1
        if text[at : at + 1] == "]":
            return
        try:
            value, end = decoder.raw_decode(text, at)
            if end == len(text) and more:
                raise ValueError("the element may go on in the next chunk")
            yield as_cells(value)
            at = end
        except RecursionError:
            yield UnreadableRecord("damaged: the rest of the JSON array cannot be read (it is nested too deeply)")
            return
        except ValueError as error:
            chunk = chunks.read(_CHUNK) if more and len(text) - at < MAX_RECORD_BYTES else ""
            if not chunk:
                yield UnreadableRecord(f"damaged: the rest of the JSON array cannot be read ({error})")
                return
            text, at, more = text[at:] + chunk, 0, True


def _csv_row(names: Sequence[str], row: Sequence[str]) -> Cells | UnreadableRecord:
    if len(row) != len(names):
        return UnreadableRecord(f"not CSV: {len(row)} fields where the head has {len(names)}")
    return {name: reject_surrogates(cell) for name, cell in zip(names, row, strict=True)}
