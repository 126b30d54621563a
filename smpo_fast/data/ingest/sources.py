"""Where pairs come from: the files that a name means, on disk, on the hub or in a bucket, as one stream of records.

A name is a file, a folder, an address that fsspec knows, or a hub id; no code of a source is run.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.core import url_to_fs

from smpo_fast.common import remote
from smpo_fast.common.errors import UserError
from smpo_fast.data.ingest import containers
from smpo_fast.data.ingest.folders import FOLDERS, is_rejected, picture_stem
from smpo_fast.data.ingest.records import PICTURES, URL, Place, Problem, Values, protocols
from smpo_fast.data.pairs import reader

SUFFIXES = {
    "parquet": (".parquet",),
    "arrow": (".arrow", ".feather"),
    "tar": (".tar", ".tar.gz", ".tgz"),
    "json": (".jsonl", ".ndjson", ".json"),
    "csv": (".csv", ".tsv"),
}
CONTAINERS = (*containers.FILES, *FOLDERS)
_NO_ROWS = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json", reader.IMPORT_INFO)
_SPLIT = re.compile(r"^(train|test|validation|valid|val|dev|(?!(?:data|part|pairs|shard)-)[a-z_]+(?=-\d{5}))(?=[-.]|$)")


@dataclass(frozen=True)
class Record:
    """One record: its number over the whole source, a name for reports, and its cells by column."""

    number: int
    name: str
    values: Values | Problem


@dataclass(frozen=True)
class PairSource(Place):
    """Files of one container, and the folder that the paths in them start from."""

    given: str
    container: str
    files: tuple[str, ...]
    split: str  # '' where the files name none

    def records(self, start: int = 0, columns: Sequence[str] | None = None) -> Generator[Record, None, None]:
        """Records ``start`` .. in order; ``columns`` saves reading others where the container allows it."""
        first = 0
        for file in self.files:
            rows = containers.rows(self, self.container, file) if first < start else None
            if rows is None or first + rows > start:
                i = first - 1
                for i, values in enumerate(containers.read(self, self.container, file, columns), first):
                    if i >= start:
                        key = values.get("__key__") if isinstance(values, dict) else None
                        yield Record(i, str(key or "") or f"{posixpath.basename(file)}#{i - first}", values)
                first = i + 1
            else:
                first += rows

    def count(self) -> int | None:
        """Number of records, where that is known without reading them."""
        rows = [containers.rows(self, self.container, file) for file in self.files]
        return None if None in rows else sum(n for n in rows if n is not None)

    def facts(self) -> list[dict[str, Any]]:
        """Name, size and time (or entity tag) of every file: what tells this source from a later one."""
        beside = [posixpath.join(self.root, side) for side in ("w", "l")] if self.container == "w-l" else []
        return [_facts(self.fs, file) for file in (*self.files, *beside)]


# --- finding the files ------------------------------------------------------------------------------------------


def locate(given: str, *, container: str = "", split: str = "", revision: str = "", root: str = "") -> PairSource:
    """The source that ``given`` means: a file, a folder, an address that fsspec knows, or a hub id (owner/name).

    Raises SettingsError, saying what was found and how to name it, for what is not there, holds nothing known, or
    holds several kinds or splits.
    """
    here, fence = given, ""
    if not URL.match(given):
        here, fence = _on_disk(given, revision, split)
    try:
        fs, path = url_to_fs(here) if URL.match(here) else (fsspec.filesystem("file"), here)
        facts = fs.info(path)
    except (ImportError, ValueError) as error:  # no such protocol, or its package is not installed
        raise UserError(f"{given}: {error}") from error
    except OSError as error:
        raise UserError(f"{given} cannot be opened: {error}") from error
    if facts["type"] != "directory":
        container = container or _kind_of(fs, path, given)
        folder = posixpath.dirname(path)
        files, split = [path], ""
    else:
        folder = path
        container, files, split = _in_folder(fs, path, given, container, split)
        places = {posixpath.dirname(file) for file in files}
        if container in ("json", "csv") and len(places) == 1:  # a manifest's paths start where it lies
            folder = places.pop()
    if root:
        folder = fence = fs._strip_protocol(str(Path(root).expanduser()) if "file" in protocols(fs) else root)
    return PairSource(fs, folder, fence or folder, given, container, tuple(files), split)


def _on_disk(given: str, revision: str, split: str) -> tuple[str, str]:
    """A path here, if need be after downloading a data set of the hub; and what its links may not leave."""
    path = Path(given).expanduser()
    if path.exists():
        return str(path.absolute()), ""
    if not remote.is_hub_id(given):
        raise UserError(f"{given} is not there: give a file, a folder, an address such as s3://, or a hub id")
    tables = [f"*{split}*{suffix}" if split else f"*{suffix}" for kind in SUFFIXES.values() for suffix in kind]
    wanted = [*tables, *(f"*{suffix}" for suffix in (*PICTURES, ".txt"))]
    folder = remote.fetch_repository(given, kind="dataset", revision=revision, only=wanted)
    return str(folder), str(folder.parent.parent)  # a snapshot holds links to blobs/ beside snapshots/


def _facts(fs: fsspec.AbstractFileSystem, path: str) -> dict[str, Any]:
    info = fs.info(path)
    stamp = next((str(info[key]) for key in ("ETag", "etag", "mtime", "LastModified", "created") if info.get(key)), "")
    return {"name": posixpath.basename(path.rstrip("/")), "bytes": info.get("size") or 0, "stamp": stamp}


def _suffix_kind(name: str) -> str:
    name = posixpath.basename(name).lower()
    if name in _NO_ROWS or name == reader.REJECTED_FILE:
        return ""
    return next((kind for kind, suffixes in SUFFIXES.items() if name.endswith(suffixes)), "")


def _kind_of(fs: fsspec.AbstractFileSystem, path: str, given: str) -> str:
    """A file's container, by the end of its name or by its first bytes."""
    if kind := _suffix_kind(path):
        return kind
    with fs.open(path, "rb") as stream:
        head = stream.read(512)
    if head[:4] == b"PAR1":
        return "parquet"
    if head[:6] == b"ARROW1" or head[:4] == b"\xff\xff\xff\xff":
        return "arrow"
    if head[257:262] == b"ustar":
        return "tar"
    if head.lstrip()[:1] in (b"{", b"["):
        return "json"
    raise UserError(
        f"{given} is no container that is known by its name or first bytes ({head[:8]!r}): name it with --container, "
        f"one of {', '.join(SUFFIXES)}"
    )


def _in_folder(
    fs: fsspec.AbstractFileSystem, folder: str, given: str, container: str, split: str
) -> tuple[str, list[str], str]:
    """Container, files and split of a folder; raises SettingsError where that is not one answer."""
    found = _kinds(fs, folder)
    if container:
        found = {kind: files for kind, files in found.items() if kind == container}
    if not found:
        looked = container or "parquet, arrow, tar, json, csv, folders w/ and l/, or x.png with x-rejected.png"
        raise UserError(
            f"the folder {given} holds nothing to import (looked for {looked}); it holds: {_ls(fs, folder)}"
        )
    if len(found) > 1:
        listed = "; ".join(f"{kind}: {posixpath.basename(files[0])} .." for kind, files in found.items())
        raise UserError(
            f"the folder {given} holds several kinds of data ({listed}): choose with --container, or give one file"
        )
    ((kind, files),) = found.items()
    if kind in FOLDERS:
        return kind, files, ""
    chosen, split = _choose_split(folder, sorted(files), split, given)
    return kind, chosen, split


def _ls(fs: fsspec.AbstractFileSystem, folder: str) -> str:
    names = sorted(posixpath.basename(name.rstrip("/")) for name in fs.ls(folder, detail=False))
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") or "nothing"


def _kinds(fs: fsspec.AbstractFileSystem, folder: str) -> dict[str, list[str]]:
    """Files by container, from a folder or else from the folders in it (data/, a folder a split)."""
    entries = fs.ls(folder, detail=True)
    files = [entry["name"] for entry in entries if entry["type"] != "directory"]
    folders = {posixpath.basename(e["name"].rstrip("/")): e["name"] for e in entries if e["type"] == "directory"}
    found = _by_kind(files)
    if {"w", "l"} <= folders.keys():
        found["w-l"] = [folder]
    elif not found:
        inner = [name for path in folders.values() for name in fs.ls(path, detail=False)]
        found = _by_kind(inner)
    if any(is_rejected(stem) for stem in map(picture_stem, files)):
        found["suffix"] = [folder]
    return found


def _by_kind(names: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        if kind := _suffix_kind(name):
            found.setdefault(kind, []).append(name)
    return found


def _choose_split(folder: str, files: list[str], split: str, given: str) -> tuple[list[str], str]:
    by_split: dict[str, list[str]] = {}
    for file in files:
        by_split.setdefault(_split_of(posixpath.relpath(file, folder)), []).append(file)
    if split or (len(by_split) > 1 and "train" in by_split):
        split = split or "train"
    elif len(by_split) == 1:
        split = next(iter(by_split))
    if split not in by_split:
        named = ", ".join(name or "(none)" for name in by_split)
        raise UserError(f"{given} has the splits {named}: choose one with --split")
    return by_split[split], split


def _split_of(relative: str) -> str:
    """The split that a file's name (train-00000-of-00004.parquet, test.jsonl) or its folder's states, or ''."""
    folder, name = posixpath.split(relative)
    if found := _SPLIT.match(name):
        return found[1]
    return "" if folder in ("", "data") else folder.split("/")[0]
