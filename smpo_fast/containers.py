"""The containers that pairs come in, each read as a stream of records: a record is a mapping from column to value.

parquet, arrow (``save_to_disk`` of Hugging Face's datasets), tar (webdataset), json (an array, or a record a line),
csv, and two layouts of a folder of pictures.  What the columns mean is not asked here (smpo_fast.formats).  A record
that cannot be read takes its place as a ``Problem``.  Nothing is unpickled.
"""

from __future__ import annotations

import csv
import io
import json
import lzma
import posixpath
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from smpo_fast import data
from smpo_fast.data import BadPicture

FILES = ("parquet", "arrow", "tar", "json", "csv")
FOLDERS = ("w-l", "suffix")  # w/x.png against l/x.png; x.png against x-rejected.png
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
TEXTS = ("txt", "text", "caption", "cls")
URL = re.compile(r"[a-zA-Z][\w+.-]*://")
_REJECTED = re.compile(r"(.+)-rejected[^/]*")
_BATCH_ROWS = 16
_MAX_RECORD = 64 << 20  # bytes of a record of JSON or CSV
_DAMAGE = (OSError, EOFError, UnicodeDecodeError, zlib.error, lzma.LZMAError, tarfile.TarError, pa.ArrowException)


@dataclass(frozen=True)
class Problem:
    """A record that cannot be read; ``reason`` is 'what: detail'."""

    reason: str


@dataclass(frozen=True)
class Broken:
    """A cell that cannot be read, in a record that otherwise can."""

    reason: str


Values = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """A folder, here or elsewhere, that the paths in a source start from."""

    fs: fsspec.AbstractFileSystem
    root: str
    fence: str  # what paths and links may not leave; on disk only

    @property
    def local(self) -> bool:
        return "file" in protocols(self.fs)

    def picture(self, name: str) -> bytes:
        """The bytes of a picture that a record names by a path; raises BadPicture."""
        if self.local:
            if URL.match(name):
                raise BadPicture(f"not here: '{name}' is an address; download the pictures first")
            return data.read_inside(Path(self.root), name, Path(self.fence))
        path = self.fs._strip_protocol(name) if URL.match(name) else posixpath.join(self.root, name)
        clean = posixpath.normpath(path)
        if "\0" in name or not clean.startswith(posixpath.normpath(self.root).rstrip("/") + "/"):
            raise BadPicture(f"leaves its folder: '{name}' is not below {self.root}")
        try:
            size = self.fs.size(path)
            if size is not None and size > data.MAX_FILE_BYTES:
                raise BadPicture(f"too large: '{name}' has {size >> 20} MB, the limit is {data.MAX_FILE_BYTES >> 20}")
            return self.fs.cat_file(path)
        except OSError as error:
            raise BadPicture(f"no file: '{name}' cannot be read ({error})") from error


def rows(place: Place, container: str, file: str) -> int | None:
    """Number of a file's records, where that is known without reading them."""
    if container != "parquet":
        return None
    try:
        with _bytes_of(place, file) as stream:
            return pq.ParquetFile(stream).metadata.num_rows
    except _DAMAGE:
        return 1  # the record that says so


def read(place: Place, container: str, file: str, columns: Sequence[str] | None) -> Iterator[Values | Problem]:
    """The records of a file in order; ``columns`` saves reading others where the container allows it."""
    reader: Callable[[], Iterator[Values | Problem]] = {
        "parquet": lambda: _parquet(place, file, columns),
        "arrow": lambda: _arrow(place, file, columns),
        "tar": lambda: _tar(place.fs, file),
        "json": lambda: _json(place.fs, file),
        "csv": lambda: _csv(place.fs, file),
        "w-l": lambda: _winners_and_losers(place),
        "suffix": lambda: _suffixes(place),
    }[container]
    try:
        yield from reader()
    except _DAMAGE as error:
        yield Problem(f"damaged: the rest of {posixpath.basename(file)} cannot be read ({error})")


def picture_stem(name: str) -> str:
    """'cat' of 'cat.png', '' of what is no picture."""
    stem, ending = posixpath.splitext(posixpath.basename(name))
    return stem if ending.lower() in PICTURES else ""


def is_rejected(stem: str) -> str:
    """'cat' of 'cat-rejected' and 'cat-rejected2', '' of another stem."""
    match = _REJECTED.fullmatch(stem)
    return match[1] if match else ""


def protocols(fs: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    """The names that addresses of a file system begin with."""
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


# --- tables -----------------------------------------------------------------------------------------------------


@contextmanager
def _bytes_of(place: Place, file: str) -> Iterator[Any]:
    """What pyarrow reads from: a file of its own on disk, else a Python object of fsspec's."""
    with pa.OSFile(file) if place.local else place.fs.open(file, "rb") as stream:
        yield stream


def _parquet(place: Place, file: str, columns: Sequence[str] | None) -> Iterator[Values | Problem]:
    with _bytes_of(place, file) as stream:
        # A buffered stream per column: without it a row group's pictures, gigabytes at times, are read at once.
        table = pq.ParquetFile(stream, pre_buffer=False, buffer_size=1 << 20)
        used = None if columns is None else [name for name in table.schema_arrow.names if name in columns]
        for group in range(table.num_row_groups):
            left = table.metadata.row_group(group).num_rows
            try:
                for batch in table.iter_batches(_BATCH_ROWS, row_groups=[group], columns=used):
                    yield from _rows_of(batch)
                    left -= batch.num_rows
            except _DAMAGE as error:  # each row of the group keeps its number
                reason = Problem(f"damaged: row group {group} of {posixpath.basename(file)} ({error})")
                yield from [reason] * left


def _arrow(place: Place, file: str, columns: Sequence[str] | None) -> Iterator[Values | Problem]:
    with _arrow_stream(place, file) as stream:
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        if is_file:
            table = pa.ipc.open_file(stream)
            batches = (table.get_batch(i) for i in range(table.num_record_batches))
        else:
            batches = iter(pa.ipc.open_stream(stream))
        for batch in batches:
            used = batch.schema.names if columns is None else [n for n in batch.schema.names if n in columns]
            yield from _rows_of(batch.select(used))


@contextmanager
def _arrow_stream(place: Place, file: str) -> Iterator[Any]:
    """On disk the file is mapped, so that a batch of a thousand pictures is not in memory at once."""
    if place.local:
        with pa.memory_map(file) as mapped:
            yield mapped
    else:
        with place.fs.open(file, "rb") as stream:
            yield stream


def _rows_of(batch: pa.RecordBatch) -> Iterator[Values]:
    cells = list(zip(batch.schema.names, batch.columns, strict=True))
    for i in range(batch.num_rows):
        yield {name: _cell(column, i) for name, column in cells}


def _cell(column: pa.Array, i: int) -> Any:
    try:
        return column[i].as_py()
    except UnicodeDecodeError as error:
        return Broken(f"not UTF-8 text: {error.reason}")


# --- manifests --------------------------------------------------------------------------------------------------


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


def _no_surrogates(text: str) -> str | Broken:
    return Broken("not UTF-8 text: bytes that are none") if re.search("[\udc80-\udcff]", text) else text


# --- tars -------------------------------------------------------------------------------------------------------


class _Member(tarfile.TarInfo):
    """A member whose broken header is an error: tarfile takes one for the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _Member:
        try:
            return super().fromtarfile(archive)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(str(error)) from error


def _tar(fs: fsspec.AbstractFileSystem, file: str) -> Iterator[Values | Problem]:
    """Samples of webdataset: neighbours with the same name before its first dot. The rest names the column."""
    key, parts = "", {}  # type: str, dict[str, bytes]
    with fs.open(file, "rb") as stream, tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Member) as archive:
        try:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps them all
                if member.isdir():
                    continue
                if refusal := _refusal(member):
                    yield Problem(f"refused: tar member '{member.name}' {refusal}")
                    continue
                folder, name = posixpath.split(posixpath.normpath(member.name))
                stem, _, column = name.partition(".")
                if parts and (posixpath.join(folder, stem) != key or column.lower() in parts):
                    yield _sample(key, parts)
                    parts = {}
                key = posixpath.join(folder, stem)
                content = archive.extractfile(member)
                parts[column.lower()] = content.read() if content else b""
        except _DAMAGE as error:
            # the sample that was being read may lack a file, so it is not believed
            yield Problem(f"damaged: {posixpath.basename(file)} cannot be read from sample '{key}' on ({error})")
            return
    if parts:
        yield _sample(key, parts)


def _refusal(member: tarfile.TarInfo) -> str:
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "has a path that leaves the archive"
    if not member.isreg():
        return "is a link or a device"
    if member.size > data.MAX_FILE_BYTES:
        return f"has {member.size >> 20} MB, the limit is {data.MAX_FILE_BYTES >> 20}"
    return ""


def _sample(key: str, parts: dict[str, bytes]) -> Values | Problem:
    values: Values = {"__key__": key}
    numbered: dict[int, bytes] = {}
    for column, content in parts.items():
        name, _, ending = column.rpartition(".")
        if f".{ending}" in PICTURES:
            values[name or "image"] = content
            if name.isdecimal():
                numbered[int(name)] = content
        elif ending in TEXTS:
            values[name or ending] = _decoded(content)
        elif ending == "json":
            found = _parsed(content)
            if isinstance(found, Problem):
                return Problem(f"{found.reason} (sample '{key}')")
            values |= {k: v for k, v in found.items() if k not in values}
        elif column in ("jpg_0", "jpg_1"):
            values[column] = content
    if len(numbered) > 1:  # 0.jpg, 1.jpg, ..: in this order
        values["images"] = [numbered[i] for i in sorted(numbered)]
        if len(numbered) == 2:
            values |= dict(zip(("image_0", "image_1"), values["images"], strict=True))
    return values


def _decoded(content: bytes) -> str | Broken:
    try:
        return content.decode("utf-8-sig").strip("\r\n")
    except UnicodeDecodeError as error:
        return Broken(f"not UTF-8 text: {error.reason}")


# --- folders of pictures ----------------------------------------------------------------------------------------


def _listing(place: Place, side: str = "") -> tuple[dict[str, list[str]], set[str]]:
    """Pictures of a folder by their stem, in order, and the stems of its .txt files; names start from the root."""
    pictures: dict[str, list[str]] = {}
    texts: set[str] = set()
    for path in sorted(place.fs.ls(posixpath.join(place.root, side), detail=False)):
        name = posixpath.basename(path)
        if stem := picture_stem(name):
            pictures.setdefault(stem, []).append(posixpath.join(side, name))
        elif name.endswith(".txt"):
            texts.add(posixpath.join(side, name[: -len(".txt")]))
    return pictures, texts


def _text(place: Place, texts: set[str], *stems: str) -> str | Broken:
    """What the first of some text files says; empty where there is none."""
    for stem in stems:
        if stem in texts:
            try:
                return _decoded(place.picture(f"{stem}.txt"))
            except BadPicture as error:
                return Broken(str(error))
    return ""


def _winners_and_losers(place: Place) -> Iterator[Values | Problem]:
    (_, top), (winners, beside_w), (losers, beside_l) = (_listing(place, side) for side in ("", "w", "l"))
    texts = top | beside_w | beside_l
    for stem in sorted({*winners, *losers}):
        names = [*winners.get(stem, ()), *losers.get(stem, ())]
        if stem not in winners or stem not in losers:
            yield Problem(f"unpaired: {names[0]} has no partner in {'l' if stem in winners else 'w'}/")
        elif len(names) > 2:
            yield Problem(f"unpaired: more than two pictures are named '{stem}' ({', '.join(names)})")
        else:
            text = _text(place, texts, stem, f"w/{stem}", f"l/{stem}")
            yield {"chosen": names[0], "rejected": names[1], "prompt": text}


def _suffixes(place: Place) -> Iterator[Values | Problem]:
    found, texts = _listing(place)
    losers: dict[str, list[str]] = {}
    for stem, names in found.items():
        if base := is_rejected(stem):
            losers.setdefault(base, []).extend(names)
    for stem in sorted({*losers, *(stem for stem in found if not is_rejected(stem))}):
        winners = found.get(stem, [])
        if len(winners) != 1 or stem not in losers:
            names = [*winners, *losers.get(stem, [])]
            yield Problem(f"unpaired: {', '.join(names)}: one '{stem}' and at least one '{stem}-rejected' are wanted")
            continue
        text = _text(place, texts, stem)
        for loser in losers[stem]:
            yield {"chosen": winners[0], "rejected": loser, "prompt": text}
