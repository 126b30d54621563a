"""Whether a source is still what was imported: a digest over the sizes, times and contents that an import depends on.

It covers the source's files (of JSON and CSV also their content), and the images that are files of their own: those
in a folder layout, or those that records name by path. Nothing but manifests is read; images are only looked up.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

from smpo_fast.common import storage
from smpo_fast.data import images
from smpo_fast.data.ingest.columns import EXAMINED_RECORDS, ColumnMapping, unpack_list
from smpo_fast.data.ingest.folders import FOLDER_LAYOUTS
from smpo_fast.data.ingest.records import Record, UnreadableRecord
from smpo_fast.data.ingest.sources import PairSource, remote_stamp

_IMAGE_ROLES = ("image_0", "image_1", "chosen", "rejected", "images", "image")
_MANIFESTS = ("json", "csv")


def fingerprint(source: PairSource, mapping: ColumnMapping) -> dict[str, Any]:
    """A digest of what an import of the source reads, and the number of image files it covers.

    Where the first records hold all images as bytes, the source's files are all there is to look at.
    """
    digest, files = hashlib.sha256(), 0
    look_up = _LocalFiles(source.root) if source.local else _RemoteFiles(source)
    for file in source.files if source.container not in FOLDER_LAYOUTS else ():
        content = storage.sha256(Path(file)) if source.local and source.container in _MANIFESTS else ""
        _update(digest, [file, look_up.stamp(file), content])
    for path in _image_files(source, mapping):
        files += 1
        _update(digest, [path, look_up.stamp(path)])
    return {"image_files": files, "sha256": digest.hexdigest()}


class _LocalFiles:
    def __init__(self, root: str) -> None:
        self._root = root

    def stamp(self, path: str) -> list[Any] | None:
        """Size and time in ns of a file; None where there is none."""
        try:
            facts = os.stat(os.path.join(self._root, path))
        except (OSError, ValueError):  # ValueError: a null character or half a surrogate pair in the name
            return None
        return [facts.st_size, facts.st_mtime_ns]


class _RemoteFiles:
    """One request for each folder, not for each file, as long as neighbouring records name files of the same folder."""

    def __init__(self, source: PairSource) -> None:
        self._source = source
        self._folder: str | None = None
        self._stamps: dict[str, list[Any]] = {}

    def stamp(self, path: str) -> list[Any] | None:
        fs = self._source.fs
        path = fs._strip_protocol(path if path.startswith("/") or "://" in path else f"{self._source.root}/{path}")
        folder = posixpath.dirname(path)
        if folder != self._folder:
            try:
                entries = fs.ls(folder, detail=True)
            except (OSError, ValueError):
                entries = []
            self._stamps = {entry["name"]: [entry.get("size") or 0, remote_stamp(entry)] for entry in entries}
            self._folder = folder
        return self._stamps.get(path)


def _image_files(source: PairSource, mapping: ColumnMapping) -> Iterator[str]:
    if source.container in FOLDER_LAYOUTS:
        for side in ("", "w", "l") if source.container == "w-l" else ("",):
            for path in sorted(source.fs.ls(posixpath.join(source.root, side), detail=False)):
                if path.lower().endswith((*images.SUFFIXES, ".txt")):
                    yield path
        return
    columns = [column for role, column in mapping.columns.items() if role in _IMAGE_ROLES]
    with closing(source.records(0, columns)) as records:
        named = [list(_paths_in(record, columns)) for record in islice(records, EXAMINED_RECORDS)]
        if any(named):
            for paths in named:
                yield from paths
            for record in records:
                yield from _paths_in(record, columns)


def _paths_in(record: Record, columns: list[str]) -> Iterator[str]:
    """The paths in the image columns of a record, as ``mapped_records.to_image`` understands them."""
    if isinstance(record.cells, UnreadableRecord):
        return
    for column in columns:
        value = unpack_list(record.cells.get(column))
        for element in value if isinstance(value, list) else [value]:
            if isinstance(element, dict):
                content = element.get("bytes")
                element = element.get("path") if content is None else content
            if isinstance(element, str) and element:
                yield element


def _update(digest: Any, facts: list[Any]) -> None:
    digest.update(json.dumps(facts).encode() + b"\n")
