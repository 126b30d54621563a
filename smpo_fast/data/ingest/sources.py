"""A source of preference data: files of one container, read as one stream of numbered records."""

from __future__ import annotations

import posixpath
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import fsspec

from smpo_fast.data.ingest.containers import count_records, read_records
from smpo_fast.data.ingest.records import Record
from smpo_fast.data.ingest.source_folder import SourceFolder


@dataclass(frozen=True)
class PairSource(SourceFolder):
    """Files of one container, and the folder that the paths in them start from (``locate.locate`` finds both)."""

    given: str  # the name by which the user gave it
    container: str
    files: tuple[str, ...]
    split: str  # '' where the files name none

    def records(self, start: int = 0, columns: Sequence[str] | None = None) -> Generator[Record, None, None]:
        """The records from number ``start`` on; ``columns`` avoids reading others where the container allows it."""
        first = 0
        for file in self.files:
            rows = count_records(self, self.container, file) if first < start else None
            if rows is None or first + rows > start:
                i = first - 1
                for i, cells in enumerate(read_records(self, self.container, file, columns), first):
                    if i >= start:
                        key = cells.get("__key__") if isinstance(cells, dict) else None
                        yield Record(i, str(key or "") or f"{posixpath.basename(file)}#{i - first}", cells)
                first = i + 1
            else:
                first += rows

    def count(self) -> int | None:
        """Number of records, where that is known without reading them."""
        rows = [count_records(self, self.container, file) for file in self.files]
        return None if None in rows else sum(n for n in rows if n is not None)

    def stamps(self) -> list[dict[str, Any]]:
        """Name, size and time (or entity tag) of every file, to tell whether the source has changed."""
        sides = [posixpath.join(self.root, side) for side in ("w", "l")] if self.container == "w-l" else []
        return [_stamp(self.fs, file) for file in (*self.files, *sides)]


def remote_stamp(info: Mapping[str, Any]) -> str:
    """Entity tag or time of a file, whichever its file system knows. info: what fsspec says of the file."""
    return next((str(info[key]) for key in ("ETag", "etag", "mtime", "LastModified", "created") if info.get(key)), "")


def _stamp(fs: fsspec.AbstractFileSystem, path: str) -> dict[str, Any]:
    info = fs.info(path)
    return {"name": posixpath.basename(path.rstrip("/")), "bytes": info.get("size") or 0, "stamp": remote_stamp(info)}
