"""Records of tar files in the webdataset layout."""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Iterator

import fsspec

from smpo_fast.data import images
from smpo_fast.data.ingest.manifests import _parsed
from smpo_fast.data.ingest.records import _DAMAGE, PICTURES, TEXTS, Problem, Values, _decoded


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
    if member.size > images.MAX_FILE_BYTES:
        return f"has {member.size >> 20} MB, the limit is {images.MAX_FILE_BYTES >> 20}"
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
