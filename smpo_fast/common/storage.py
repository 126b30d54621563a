"""Durable files: written completely or not at all, hashed, locked; and JSON in one canonical form.

A file that is being written has the suffix ``.tmp``; cleaning up after a killed process may remove such files.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from smpo_fast.common.errors import EnvironmentProblem

SEAL = "seal"  # key of the hash of all other values of a description


@contextmanager
def atomic_write(file: Path) -> Iterator[Path]:
    """Yield a temporary path to write to. On success it is synced and renamed to ``file``; on an error, removed.

    Its name is unique, so that processes that write the same file do not write into each other's.
    """
    draft = file.with_name(f"{file.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield draft
        sync(draft)
        os.replace(draft, file)
    except Exception:
        draft.unlink(missing_ok=True)
        raise


def user_cache() -> Path:
    """The folder for what can be made again: ``smpo_fast`` in XDG_CACHE_HOME or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smpo_fast"


def remove_drafts(folder: Path) -> None:
    """Remove what killed processes left of ``atomic_write`` in a folder in which nobody else writes."""
    for draft in folder.glob("*.tmp"):
        if draft.is_file():
            draft.unlink()


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(file) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(file: Path, value: Any, indent: int | None = None) -> None:
    """Write a JSON file atomically."""
    write_text(file, json.dumps(value, indent=indent))


def publish_folder(building: Path, target: Path) -> None:
    """Rename a finished folder to ``target``. Its files must have been synced; its folders are synced here."""
    _sync_folders(building)
    os.rename(building, target)
    sync(target.parent)


def replace_folder(building: Path, target: Path) -> None:
    """Like ``publish_folder`` for a name that may be taken: until the new folder is there, the earlier one is.

    Linux exchanges the two folders in one operation, on file systems that support it. On others there is a moment in
    which the earlier folder is called ``.<name>.old`` and nothing has the name.
    """
    earlier = target.with_name(f".{target.name}.old")
    if target.exists():
        shutil.rmtree(earlier, ignore_errors=True)
        _sync_folders(building)
        if not _exchange(building, target):
            os.rename(target, earlier)
            os.rename(building, target)
        sync(target.parent)
    else:
        publish_folder(building, target)
    for replaced in (building, earlier):
        shutil.rmtree(replaced, ignore_errors=True)


def _sync_folders(building: Path) -> None:
    for folder in [p for p in building.rglob("*") if p.is_dir()] + [building]:
        sync(folder)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders at once; False, and nothing done, where that is not possible."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    return renameat2 is not None and renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def default_mode(folder: Path) -> int:
    """The permissions that the umask gives to a new file in a folder."""
    probe = folder / f".mode.{os.getpid()}.tmp"
    probe.touch()
    try:
        return probe.stat().st_mode & 0o777
    finally:
        probe.unlink()


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(file: Path) -> str:
    """The SHA-256 hash of a file's content, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of(content: bytes) -> bytes:
    """The SHA-256 hash of some bytes: 32 bytes."""
    return hashlib.sha256(content).digest()


def file_facts(file: Path) -> dict[str, Any]:
    """Size and hash of a file, as manifests record them: 'bytes' and 'sha256'."""
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


def canonical_json(value: Any) -> str:
    """JSON text that is equal for equal values: keys sorted, tuples as lists."""
    return json.dumps(value, sort_keys=True)


def json_hash(value: Any) -> str:
    """The SHA-256 hash of a JSON value, in hexadecimal: equal for equal values, however they are written."""
    return sha256_of(canonical_json(as_json(value)).encode()).hex()


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values with their own hash under ``SEAL``, by which ``unsealed`` notices that one has changed."""
    return {**values, SEAL: json_hash(values)}


def unsealed(values: Any) -> dict[str, Any]:
    """Sealed values without their seal. Values that were never sealed, by an earlier version, are taken as they are.

    Raises ValueError for what is no JSON object, and where a value has changed since they were sealed.
    """
    if not isinstance(values, dict):
        raise ValueError("it holds no JSON object")
    kept = {key: value for key, value in values.items() if key != SEAL}
    if SEAL in values and values[SEAL] != json_hash(kept):
        raise ValueError(f"a value in it has changed since it was written ({SEAL} differs)")
    return kept


def as_json(value: Any) -> Any:
    """A value as it reads back from JSON: tuples become lists, keys become strings."""
    return json.loads(json.dumps(value))


def take_lock(file: IO[str], *, wait: bool, shared: bool = False) -> bool:
    """Lock an open file until it is closed or its process ends, however it ends.

    Returns False if another process holds the lock and ``wait`` is false. Raises EnvironmentProblem where the file
    system has no locks.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        return True
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise EnvironmentProblem(
            f"{file.name} cannot be locked ({error.strerror}), so processes cannot share the work: choose a folder on "
            "a file system with locks, and copy the result afterwards"
        ) from error
