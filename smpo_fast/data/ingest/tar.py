"""Records of tar files in the webdataset layout."""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Iterator

import fsspec

from smpo_fast.data import images
from smpo_fast.data.ingest.records import (
    DAMAGE_ERRORS,
    TEXT_SUFFIXES,
    Cells,
    UnreadableRecord,
    decode_text,
    parse_object,
)


class _Member(tarfile.TarInfo):
    """A member whose broken header is an error: tarfile takes it for the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _Member:
        try:
            return super().fromtarfile(archive)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(str(error)) from error


def read_tar(fs: fsspec.AbstractFileSystem, file: str) -> Iterator[Cells | UnreadableRecord]:
    """The samples of an archive: neighbouring members with the same name up to its first dot; the rest is the column.

    Raises the errors of ``tarfile`` for what is not a tar archive.
    """
    key, parts = "", {}  # type: str, dict[str, bytes]
    with fs.open(file, "rb") as stream, tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Member) as archive:
        try:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps all of them
                if member.isdir():
                    continue
                if refusal := _refusal(member):
                    yield UnreadableRecord(f"refused: tar member '{member.name}' {refusal}")
                    continue
                folder, name = posixpath.split(posixpath.normpath(member.name))
                stem, _, column = name.partition(".")
                if parts and (posixpath.join(folder, stem) != key or column.lower() in parts):
                    yield _sample(key, parts)
                    parts = {}
                key = posixpath.join(folder, stem)
                content = archive.extractfile(member)
                parts[column.lower()] = content.read() if content else b""
        except DAMAGE_ERRORS as error:
            # the sample that was being read may lack a member, so it is not used
            yield UnreadableRecord(
                f"damaged: {posixpath.basename(file)} cannot be read from sample '{key}' on ({error})"
            )
            return
    if parts:
        yield _sample(key, parts)


def _refusal(member: tarfile.TarInfo) -> str:
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "has a path that leaves the archive"
    if not member.isreg():
        return "is a link or a device"
    if member.size > images.MAX_FILE_BYTES:
        return f"has {member.size >> 20} MB, the limit is {images.MAX_FILE_BYTES >> 20}"
    return ""


def _sample(key: str, parts: dict[str, bytes]) -> Cells | UnreadableRecord:
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
