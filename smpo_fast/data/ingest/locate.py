"""Finds the files that a user's name for a source means: their container, their split, and their folder.

A name is a file, a folder, an address that fsspec knows, or a hub id; no code of a source is run.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from pathlib import Path

import fsspec
from fsspec.core import url_to_fs

from smpo_fast.common import remote
from smpo_fast.common.console import printable
from smpo_fast.common.errors import DataError, EnvironmentProblem, environment_problem
from smpo_fast.data import images
from smpo_fast.data.ingest.folders import FOLDER_LAYOUTS, image_stem, winner_stem
from smpo_fast.data.ingest.source_folder import URL, is_local
from smpo_fast.data.ingest.sources import PairSource
from smpo_fast.data.pairs.schema import REJECTED_FILE
from smpo_fast.data.pairs.summary import SUMMARY_FILE

SUFFIXES = {
    "parquet": (".parquet",),
    "arrow": (".arrow", ".feather"),
    "tar": (".tar", ".tar.gz", ".tgz"),
    "json": (".jsonl", ".ndjson", ".json"),
    "csv": (".csv", ".tsv"),
}
_WITHOUT_RECORDS = (
    "dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json", SUMMARY_FILE, REJECTED_FILE,
)  # fmt: skip
_SPLIT = re.compile(r"^(train|test|validation|valid|val|dev|(?!(?:data|part|pairs|shard)-)[a-z_]+(?=-\d{5}))(?=[-.]|$)")


def locate(given: str, *, container: str = "", split: str = "", revision: str = "", root: str = "") -> PairSource:
    """The source that ``given`` means: a file, a folder, an address that fsspec knows, or a hub id (owner/name).

    Raises DataError, saying what was found and how to choose, for a source that does not exist, holds nothing that can
    be imported, or holds several containers or splits; EnvironmentProblem where the package for an address is missing.
    """
    here, boundary = given, ""
    if not URL.match(given):
        here, boundary = _on_disk(given, revision, split)
    try:
        fs, path = url_to_fs(here) if URL.match(here) else (fsspec.filesystem("file"), here)
        facts = fs.info(path)
    except ImportError as error:
        raise EnvironmentProblem(f"{given}: {error}") from error
    except ValueError as error:  # no such protocol
        raise DataError(f"{given}: {error}") from error
    except OSError as error:
        raise environment_problem(error, given) or DataError(f"{given} cannot be opened: {error}") from error
    if facts["type"] != "directory":
        container = container or _container_of(fs, path, given)
        folder = posixpath.dirname(path)
        files, split = [path], ""
    else:
        folder = path
        container, files, split = _in_folder(fs, path, given, container, split)
        places = {posixpath.dirname(file) for file in files}
        if container in ("json", "csv") and len(places) == 1:  # paths in a manifest start from its own folder
            folder = places.pop()
    if root:
        folder = boundary = fs._strip_protocol(str(Path(root).expanduser()) if is_local(fs) else root)
    return PairSource(fs, folder, boundary or folder, given, container, tuple(files), split)


def _on_disk(given: str, revision: str, split: str) -> tuple[str, str]:
    """A path on this machine, after downloading a data set of the hub if need be; and what its links may not leave."""
    path = Path(given).expanduser()
    if path.exists():
        return str(path.absolute()), ""
    if not remote.is_hub_id(given):
        raise DataError(f"{given} does not exist: give a file, a folder, an address such as s3://, or a hub id")
    tables = [f"*{split}*{suffix}" if split else f"*{suffix}" for kind in SUFFIXES.values() for suffix in kind]
    wanted = [*tables, *(f"*{suffix}" for suffix in (*images.SUFFIXES, ".txt"))]
    folder = remote.fetch_repository(given, kind="dataset", revision=revision, only=wanted)
    return str(folder), str(folder.parent.parent)  # a snapshot is links into blobs/, a neighbour of snapshots/


def _container_by_name(name: str) -> str:
    name = posixpath.basename(name).lower()
    if name in _WITHOUT_RECORDS:
        return ""
    return next((container for container, suffixes in SUFFIXES.items() if name.endswith(suffixes)), "")


def _container_of(fs: fsspec.AbstractFileSystem, path: str, given: str) -> str:
    """A file's container, by the end of its name or else by its first bytes."""
    if container := _container_by_name(path):
        return container
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
    raise DataError(
        printable(
            f"{given}: neither its name nor its first bytes ({head[:8]!r}) tell which container it is: name it with "
            f"--container, one of {', '.join(SUFFIXES)}"
        )
    )


def _in_folder(
    fs: fsspec.AbstractFileSystem, folder: str, given: str, container: str, split: str
) -> tuple[str, list[str], str]:
    """Container, files and split of a folder. Raises DataError where that is not one answer."""
    found = _files_by_container(fs, folder)
    if container:
        found = {kind: files for kind, files in found.items() if kind == container}
    if not found:
        looked = container or "parquet, arrow, tar, json, csv, folders w/ and l/, or x.png with x-rejected.png"
        raise DataError(
            printable(
                f"the folder {given} holds nothing to import (looked for {looked}); it holds: {_list_names(fs, folder)}"
            )
        )
    if len(found) > 1:
        listed = "; ".join(f"{kind}: {posixpath.basename(files[0])} .." for kind, files in found.items())
        raise DataError(
            printable(
                f"the folder {given} holds several kinds of data ({listed}): choose with --container, or give one file"
            )
        )
    ((kind, files),) = found.items()
    if kind in FOLDER_LAYOUTS:
        return kind, files, ""
    chosen, split = _choose_split(folder, sorted(files), split, given)
    return kind, chosen, split


def _list_names(fs: fsspec.AbstractFileSystem, folder: str) -> str:
    names = sorted(posixpath.basename(name.rstrip("/")) for name in fs.ls(folder, detail=False))
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") or "nothing"


def _files_by_container(fs: fsspec.AbstractFileSystem, folder: str) -> dict[str, list[str]]:
    """The files in a folder, or if none of them can be imported, in its subfolders (data/, one for each split)."""
    entries = fs.ls(folder, detail=True)
    files = [entry["name"] for entry in entries if entry["type"] != "directory"]
    folders = {posixpath.basename(e["name"].rstrip("/")): e["name"] for e in entries if e["type"] == "directory"}
    found = _group_by_container(files)
    if {"w", "l"} <= folders.keys():
        found["w-l"] = [folder]
    elif not found:
        inner = [name for path in folders.values() for name in fs.ls(path, detail=False)]
        found = _group_by_container(inner)
    if any(winner_stem(stem) for stem in map(image_stem, files)):
        found["suffix"] = [folder]
    return found


def _group_by_container(names: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        if container := _container_by_name(name):
            found.setdefault(container, []).append(name)
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
        raise DataError(printable(f"{given} has the splits {named}: choose one with --split"))
    return by_split[split], split


def _split_of(relative: str) -> str:
    """The split named by a file (train-00000-of-00004.parquet, test.jsonl) or else by its folder, or ''."""
    folder, name = posixpath.split(relative)
    if found := _SPLIT.match(name):
        return found[1]
    return "" if folder in ("", "data") else folder.split("/")[0]
