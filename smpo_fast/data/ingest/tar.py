"""Records of tar files in the webdataset layout, from archives that may be hostile: headers and samples are bounded."""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Iterator
from typing import Any, cast

import fsspec

from smpo_fast.common.errors import check_not_exhausted
from smpo_fast.data import images
from smpo_fast.data.ingest.records import (
    DAMAGE_ERRORS,
    TEXT_SUFFIXES,
    Cells,
    UnreadableRecord,
    decode_text,
    parse_object,
)

_MAX_HEADER_BYTES = 1 << 20  # of an extended header; tarfile reads it whole
_MAX_SAMPLE_MEMBERS = 4096
_MAX_SAMPLE_BYTES = 2 * images.MAX_FILE_BYTES
_MAX_TEXT_BYTES = 16 << 20  # of all text and JSON members of a sample; parsed JSON takes many times as much
_MAX_EMPTY_READS = 16
_HEADER_TYPES = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
)  # fmt: skip
_HEADER_ERRORS = (
    tarfile.InvalidHeaderError,  # type: ignore[attr-defined]
    tarfile.TruncatedHeaderError,  # type: ignore[attr-defined]
    ValueError, ArithmeticError, LookupError, RecursionError,
)  # fmt: skip


class _Member(tarfile.TarInfo):
    """A member whose broken or oversized header is an error; tarfile takes it for the archive's end, or reads it."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _Member:
        try:
            return super().fromtarfile(archive)
        except _HEADER_ERRORS as error:
            raise tarfile.ReadError(f"a broken header: {str(error) or type(error).__name__}") from error

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.size < 0:
            raise tarfile.ReadError("a header that gives a negative size")
        if self.type in _HEADER_TYPES and self.size > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"an extended header of {self.size} bytes, the limit is {_MAX_HEADER_BYTES}")
        return super()._proc_member(archive)  # type: ignore[misc]


class _EndingStream:
    """A stream that raises EOFError when it is read again and again at its end.

    tarfile skips a member by reading blocks until it has counted the member's size, which a header of a truncated or
    hostile archive can put at 2^60 bytes.
    """

    def __init__(self, stream: Any) -> None:
        self._stream, self._empty_reads = stream, 0

    def read(self, size: int = -1) -> bytes:
        chunk = self._stream.read(size)
        self._empty_reads = 0 if chunk else self._empty_reads + 1
        if self._empty_reads > _MAX_EMPTY_READS:
            raise EOFError("the archive ends within a member")
        return chunk


class _Sample:
    """The members of one sample; what exceeds its limits is not kept, and makes the whole sample unreadable."""

    def __init__(self, key: str) -> None:
        self.key = key
        self._parts: dict[str, bytes] = {}
        self._bytes = self._text_bytes = 0
        self._problem = ""

    def has(self, column: str) -> bool:
        return column in self._parts

    def add(self, column: str, member: tarfile.TarInfo, archive: tarfile.TarFile) -> None:
        is_text = column.rpartition(".")[2] in (*TEXT_SUFFIXES, "json")
        self._bytes += member.size
        self._text_bytes += member.size * is_text
        if len(self._parts) >= _MAX_SAMPLE_MEMBERS:
            self._problem = f"more than {_MAX_SAMPLE_MEMBERS} members"
        elif self._text_bytes > _MAX_TEXT_BYTES:
            self._problem = f"more than {_MAX_TEXT_BYTES >> 20} MB of text"
        elif self._bytes > _MAX_SAMPLE_BYTES:
            self._problem = f"more than {_MAX_SAMPLE_BYTES >> 20} MB"
        if self._problem:
            self._parts.clear()
            return
        content = archive.extractfile(member) if is_text or _is_image(column) else None
        self._parts[column] = content.read() if content else b""

    def record(self) -> Cells | UnreadableRecord:
        if self._problem:
            return UnreadableRecord(f"too large: sample '{self.key}' has {self._problem}")
        return _cells(self.key, self._parts)


def read_tar(fs: fsspec.AbstractFileSystem, file: str) -> Iterator[Cells | UnreadableRecord]:
    """The samples of an archive: neighbouring members with the same name up to its first dot; the rest is the column.

    Raises the errors of ``tarfile`` for what is not a tar archive, and EOFError for one that ends in its first header.
    """
    sample: _Sample | None = None
    with (
        fs.open(file, "rb") as stream,
        tarfile.open(fileobj=cast(Any, _EndingStream(stream)), mode="r|*", tarinfo=_Member) as archive,
    ):
        try:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps all of them
                archive.pax_headers = {}  # global headers add up, and say nothing about samples
                if member.isdir():
                    continue
                if refusal := _refusal(member):
                    yield UnreadableRecord(f"refused: tar member '{member.name}' {refusal}")
                    continue
                folder, name = posixpath.split(posixpath.normpath(member.name))
                stem, _, column = name.partition(".")
                key, column = posixpath.join(folder, stem), column.lower()
                if sample is not None and (sample.key != key or sample.has(column)):
                    yield sample.record()
                    sample = None
                sample = sample or _Sample(key)
                sample.add(column, member, archive)
        except DAMAGE_ERRORS as error:
            check_not_exhausted(error, file)
            # the sample that was being read may lack a member, so it is not used
            where = f" from sample '{sample.key}' on" if sample else ""
            yield UnreadableRecord(f"damaged: {posixpath.basename(file)} cannot be read{where} ({error})")
            return
    if sample is not None:
        yield sample.record()


def _is_image(column: str) -> bool:
    return f".{column.rpartition('.')[2]}" in images.SUFFIXES or column in ("jpg_0", "jpg_1")


def _refusal(member: tarfile.TarInfo) -> str:
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "has a path that leaves the archive"
    if not member.isreg():
        return "is a link or a device"
    if member.issparse():
        return "is a sparse file"
    if member.size > images.MAX_FILE_BYTES:
        return f"has {member.size >> 20} MB, the limit is {images.MAX_FILE_BYTES >> 20}"
    return ""


def _cells(key: str, parts: dict[str, bytes]) -> Cells | UnreadableRecord:
    cells: Cells = {"__key__": key}
    numbered: dict[int, bytes] = {}
    for column, content in parts.items():
        name, _, ending = column.rpartition(".")
        if f".{ending}" in images.SUFFIXES:
            cells[name or "image"] = content
            if name.isdecimal():
                numbered[int(name)] = content
        elif ending in TEXT_SUFFIXES:
            cells[name or ending] = decode_text(content)
        elif ending == "json":
            found = parse_object(content)
            if isinstance(found, UnreadableRecord):
                return UnreadableRecord(f"{found.reason} (sample '{key}')")
            cells |= {k: v for k, v in found.items() if k not in cells}
        elif column in ("jpg_0", "jpg_1"):
            cells[column] = content
    if len(numbered) > 1:  # 0.jpg, 1.jpg, ..: a list in this order
        cells["images"] = [numbered[i] for i in sorted(numbered)]
        if len(numbered) == 2:
            cells |= dict(zip(("image_0", "image_1"), cells["images"], strict=True))
    return cells
