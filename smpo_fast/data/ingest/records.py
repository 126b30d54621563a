"""Records of a source, whatever container they come in: cells by column, or the reason why a record is unreadable."""

from __future__ import annotations

import json
import lzma
import re
import tarfile
import zlib
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

TEXT_SUFFIXES = ("txt", "text", "caption", "cls")
MAX_RECORD_BYTES = 64 << 20  # of a record of JSON or CSV
DAMAGE_ERRORS = (OSError, EOFError, UnicodeDecodeError, zlib.error, lzma.LZMAError, tarfile.TarError, pa.ArrowException)

Cells = dict[str, Any]  # by column


@dataclass(frozen=True)
class UnreadableRecord:
    """A record that cannot be read; ``reason`` is 'kind: detail'."""

    reason: str


@dataclass(frozen=True)
class UnreadableCell:
    """A cell that cannot be read, in a record that otherwise can; ``reason`` follows the column's name."""

    reason: str


@dataclass(frozen=True)
class Record:
    """One record: its number over the whole source, a name for reports, and its cells."""

    number: int
    name: str
    cells: Cells | UnreadableRecord


def parse_object(text: bytes) -> Cells | UnreadableRecord:
    """The cells of a JSON object."""
    try:
        return as_cells(json.loads(text.decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        return UnreadableRecord(f"not UTF-8 text: {error.reason}")
    except RecursionError:
        return UnreadableRecord("not JSON: it is nested too deeply")
    except ValueError as error:
        return UnreadableRecord(f"not JSON: {error}")


def as_cells(value: Any) -> Cells | UnreadableRecord:
    """A JSON value as a record: it must be an object."""
    if isinstance(value, dict):
        return value
    return UnreadableRecord(f"no record: a JSON {type(value).__name__}, not an object")


def decode_text(content: bytes) -> str | UnreadableCell:
    """The text of a file, without a byte order mark and line ends around it."""
    try:
        return content.decode("utf-8-sig").strip("\r\n")
    except UnicodeDecodeError as error:
        return UnreadableCell(f"is not UTF-8 text: {error.reason}")


def reject_surrogates(text: str) -> str | UnreadableCell:
    """The text, unless it contains surrogates, which stand for bytes that were not UTF-8 (``surrogateescape``)."""
    return UnreadableCell("is not UTF-8 text: invalid bytes") if re.search("[\udc80-\udcff]", text) else text
