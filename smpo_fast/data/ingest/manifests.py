"""Records of JSON and CSV files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

import fsspec

from smpo_fast.data.ingest.records import _MAX_RECORD, Problem, Values, _no_surrogates


def _json(fs: fsspec.AbstractFileSystem, file: str) -> Iterator[Values | Problem]:
    with fs.open(file, "rb") as stream:
        head = stream.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        stream.seek(0)
        yield from _json_array(stream) if head == b"[" else _json_lines(stream)


def _json_lines(stream: Any) -> Iterator[Values | Problem]:
    rest, too_long = b"", False
    while chunk := stream.read(1 << 20):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield from _line(line, too_long)
            too_long = False
        if len(rest) > _MAX_RECORD:
            rest, too_long = b"", True
    yield from _line(rest, too_long)


def _line(line: bytes, too_long: bool) -> Iterator[Values | Problem]:
    if too_long:
        yield Problem(f"too large: a line of more than {_MAX_RECORD >> 20} MB")
    elif line.strip(b"\xef\xbb\xbf \t\r\n"):
        yield _parsed(line)


def _parsed(text: bytes) -> Values | Problem:
    try:
        return _mapping(json.loads(text.decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        return Problem(f"not UTF-8 text: {error.reason}")
    except (ValueError, RecursionError) as error:
        return Problem(f"not JSON: {error}")


def _mapping(value: Any) -> Values | Problem:
    return value if isinstance(value, dict) else Problem(f"no record: a JSON {type(value).__name__}, not an object")


def _json_array(stream: Any) -> Iterator[Values | Problem]:
    """The elements of one array, of which no more than a chunk is in memory."""
    chunks = io.TextIOWrapper(stream, encoding="utf-8-sig")
    decoder, text, at, more = json.JSONDecoder(), chunks.read(1 << 20), 0, True
    at = text.index("[") + 1
    while True:
        while at < len(text) and text[at] in ", \t\r\n":
            at += 1
        if text[at : at + 1] == "]":
            return
        try:
            value, end = decoder.raw_decode(text, at)
            if end == len(text) and more:
                raise ValueError("a number may go on")
            yield _mapping(value)
            at = end
        except ValueError as error:
            chunk = chunks.read(1 << 20) if more and len(text) - at < _MAX_RECORD else ""
            if not chunk:
                yield Problem(f"damaged: the rest of the JSON array cannot be read ({error})")
                return
            text, at, more = text[at:] + chunk, 0, True


def _csv(fs: fsspec.AbstractFileSystem, file: str) -> Iterator[Values | Problem]:
    csv.field_size_limit(_MAX_RECORD)
    with fs.open(file, "rb") as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        head = text.readline(1 << 20)
        delimiter = max("\t;,", key=head.count)
        names = next(csv.reader([head], delimiter=delimiter), [])
        rows = csv.reader(text, delimiter=delimiter)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield Problem(f"not CSV: {error}")
                continue
            if row:
                yield _csv_row(names, row)


def _csv_row(names: Sequence[str], row: Sequence[str]) -> Values | Problem:
    if len(row) != len(names):
        return Problem(f"not CSV: {len(row)} fields where the head has {len(names)}")
    return {name: _no_surrogates(cell) for name, cell in zip(names, row, strict=True)}
