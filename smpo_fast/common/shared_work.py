"""Work that any number of processes share through a folder, and that survives kills at any point.

The work is divided into named parts. The folder of the work holds, besides the results::

    work.json       what is being made; leftovers of different work are removed
    NAME.json       the manifest of a finished part: JSON values that the part's function returned
    NAME.lock       locked by the process that is doing the part; the system releases the lock however it ends
    NAME.log        the draft of an unfinished part: one line per finished record,
    NAME.data       ... and the records' bytes, one after the other
    kept_NAME.data  bytes of a finished part that the last part needs (``SharedWork.keep``)
    agreed.json     values that one process computed for all (``agreed_values``)
    all.lock        shared by all processes that work here; exclusive while leftovers are cleaned up
    last.lock       held while the finished folder is published under its final name

A process takes any part whose manifest is missing and whose lock is free, and resumes it from its draft. When all
parts are finished, one process writes the results' index, and ``publish`` renames the folder.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from smpo_fast.common.errors import DataError
from smpo_fast.common.storage import atomic_write, canonical_json, sync, take_lock, write_json, write_text

WORK_FILE = "work.json"
_ALL_LOCK, _PUBLISH_LOCK = "all.lock", "last.lock"
_AGREED = "agreed"  # agreed.json and agreed.lock survive a change of the work


class AlreadyFinished(Exception):
    """Another process has completed the whole work; the folder is published or about to be."""


def agreed_values(folder: Path, compute: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """JSON values on which all processes that work in the folder agree, such as hashes of the sources.

    Processes call ``compute`` one after the other. It receives the values that the previous process computed ({} for
    the first) and should reuse those that still hold. Raises AlreadyFinished if the folder has been published.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with (folder / f"{_AGREED}.lock").open("w") as lock:
            take_lock(lock, wait=True)
            file = folder / f"{_AGREED}.json"
            values = compute(json.loads(file.read_text()) if file.is_file() else {})
            write_json(file, values)
            return values
    except FileNotFoundError as error:
        if folder.is_dir():
            raise
        raise AlreadyFinished from error


class SharedWork:
    """A folder of shared work. Entering it as a context manager joins the processes that already work there.

    work: describes what is being made. Leftovers of different work are removed; DataError is raised while another
    process is doing different work in the folder.  is_intact: whether the files of a finished part are still as its
    manifest says (default: those that ``keep`` stored have their size); the part is done again otherwise.
    Raises AlreadyFinished if the work has been completed meanwhile, and EnvironmentProblem if files cannot be locked.
    """

    def __init__(
        self, folder: Path, work: Mapping[str, Any], is_intact: Callable[[dict[str, Any]], bool] | None = None
    ) -> None:
        self.folder, self._is_intact = folder, is_intact or self._kept_files_are_whole
        self._work = canonical_json(work)

    def __enter__(self) -> SharedWork:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = (self.folder / _ALL_LOCK).open("w")
        except FileNotFoundError as error:
            raise AlreadyFinished from error
        try:
            self._join()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not any(_is_manifest(file) or file.suffix == ".log" for file in _files(self.folder)):
            self.discard()  # nothing has been finished that a later run could resume from
        self._lock.close()

    @property
    def mode(self) -> int:
        """Permissions that new files get in this folder."""
        return os.fstat(self._lock.fileno()).st_mode & 0o777

    def do_parts(self, names: Sequence[str], do: Callable[[str], dict[str, Any]]) -> None:
        """Do the parts that no other process is doing, then wait for the others and finish what they left undone.

        do: does the part of a name and returns its manifest, JSON values.  Returns when all the parts are finished.
        """
        for wait in (False, True):
            for name in names:
                if self.is_finished(name):
                    continue
                with self.claim(name, wait=wait) as claimed:
                    if claimed and not self.is_finished(name):
                        write_json(self.folder / f"{name}.json", do(name))
                        Draft(self.folder, name).remove()

    @contextmanager
    def claim(self, name: str, *, wait: bool) -> Iterator[bool]:
        """Hold the lock of a part. Yields False if another process holds it and ``wait`` is false.

        Raises AlreadyFinished if the whole work has been published.
        """
        try:
            file = (self.folder / f"{name}.lock").open("w")
        except FileNotFoundError as error:
            raise AlreadyFinished from error
        with file:
            claimed = take_lock(file, wait=wait)
            if claimed and not (self.folder / WORK_FILE).is_file():
                raise AlreadyFinished
            yield claimed

    def is_finished(self, name: str) -> bool:
        """Whether a part is finished."""
        return (self.folder / f"{name}.json").is_file()

    def manifest(self, name: str) -> dict[str, Any]:
        """The manifest of a finished part. Raises AlreadyFinished if the whole work has been published."""
        try:
            return json.loads((self.folder / f"{name}.json").read_text())
        except FileNotFoundError as error:
            raise AlreadyFinished from error

    def keep(self, name: str, content: bytes) -> dict[str, Any]:
        """Store bytes of a finished part until the folder is published; returns an entry for the part's manifest."""
        file = self.kept(name)
        with atomic_write(file) as draft:
            draft.write_bytes(content)
        return {"kept": {file.name: len(content)}}

    def kept(self, name: str) -> Path:
        """Where ``keep`` stored the bytes of a part."""
        return self.folder / f"kept_{name}.data"

    def draft(self, name: str) -> Draft:
        """The draft of a part that this process has claimed."""
        return Draft(self.folder, name)

    def discard(self) -> None:
        """Remove the folder unless another process is working in it."""
        file = self.folder / _ALL_LOCK
        is_ours = file.is_file() and os.path.samestat(file.stat(), os.fstat(self._lock.fileno()))
        if is_ours and take_lock(self._lock, wait=False):
            shutil.rmtree(self.folder, ignore_errors=True)

    def _join(self) -> None:
        if take_lock(self._lock, wait=False):  # nobody else is here
            self._clean_up()
        take_lock(self._lock, wait=True, shared=True)
        try:
            work = (self.folder / WORK_FILE).read_text()
        except FileNotFoundError as error:
            raise AlreadyFinished from error
        if work != self._work:
            raise DataError(
                f"another process is working in {self.folder} with other settings: wait until it ends, or end it"
            )

    def _clean_up(self) -> None:
        """Keep what has been finished of the same work and remove everything else."""
        file = self.folder / WORK_FILE
        same = file.is_file() and file.read_text() == self._work
        for leftover in _files(self.folder):
            keep = leftover.name == _ALL_LOCK or leftover.stem == _AGREED or (same and leftover.suffix != ".tmp")
            if not keep:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        for manifest in filter(_is_manifest, _files(self.folder)):
            if not self._is_still_intact(manifest):
                manifest.unlink()
        write_text(file, self._work)

    def _kept_files_are_whole(self, manifest: Mapping[str, Any]) -> bool:
        return all((self.folder / name).stat().st_size == size for name, size in manifest.get("kept", {}).items())

    def _is_still_intact(self, manifest: Path) -> bool:
        try:
            return self._is_intact(json.loads(manifest.read_text()))
        except (OSError, ValueError, KeyError, TypeError):
            return False


def publish(folder: Path, target: Path, proof: str) -> None:
    """Remove the files that served the work and rename the folder to ``target``, if the work is complete.

    proof: the file whose presence says that the work is complete.  Any process may call this, any number of times;
    it waits while another process is publishing the same folder.
    """
    try:
        with (folder / _PUBLISH_LOCK).open("w") as lock:
            take_lock(lock, wait=True)
            if not (folder / proof).is_file():
                return
            (folder / WORK_FILE).unlink(missing_ok=True)  # first: from here on no part can be claimed
            for file in _files(folder):
                if file.name not in (_ALL_LOCK, _PUBLISH_LOCK) and _serves_the_work(file):
                    file.unlink()
            os.replace(folder, target)
            for name in (_ALL_LOCK, _PUBLISH_LOCK):
                (target / name).unlink(missing_ok=True)
            sync(target.parent)
    except FileNotFoundError:  # another process has published it
        return


class Draft:
    """The finished records of an unfinished part. Opening it drops a record that a kill left half-written."""

    def __init__(self, folder: Path, name: str) -> None:
        self._log, self._data = folder / f"{name}.log", folder / f"{name}.data"
        self.records: list[dict[str, Any]] = []
        if self._log.is_file() and self._data.is_file():
            self._resume()

    def append(self, record: Mapping[str, Any], blobs: Sequence[bytes] = ()) -> None:
        """Add a record (JSON values) and its bytes. Once this returns, a kill of the process loses neither."""
        crc = 0
        with self._data.open("ab") as data:
            for blob in blobs:
                data.write(blob)
                crc = zlib.crc32(blob, crc)
        facts = {"bytes": sum(len(blob) for blob in blobs), "crc": crc}
        with self._log.open("ab") as log:
            log.write(json.dumps([facts, record]).encode() + b"\n")
        self.records.append(dict(record))

    def data(self) -> bytes:
        """The bytes of all records."""
        return bytes(self.mapped())

    def mapped(self) -> memoryview:
        """The bytes of all records, as a memory map."""
        if not self._data.is_file() or not self._data.stat().st_size:
            return memoryview(b"")
        with self._data.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def remove(self) -> None:
        """Remove the files of the draft: the part is finished."""
        self._log.unlink(missing_ok=True)
        self._data.unlink(missing_ok=True)

    def _resume(self) -> None:
        """Read the complete records and cut off what follows them."""
        log_bytes = data_bytes = 0
        with self._data.open("rb") as data:
            for line in self._log.read_bytes().splitlines(keepends=True):
                try:
                    facts, record = json.loads(line)
                except ValueError:
                    break
                found = data.read(facts["bytes"])
                if not line.endswith(b"\n") or len(found) < facts["bytes"] or zlib.crc32(found) != facts["crc"]:
                    break
                self.records.append(record)
                log_bytes, data_bytes = log_bytes + len(line), data_bytes + len(found)
        os.truncate(self._log, log_bytes)
        os.truncate(self._data, data_bytes)


def _files(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _is_manifest(file: Path) -> bool:
    """Whether a file is a part's manifest: names of parts contain a '-', other JSON files' names do not."""
    return file.suffix == ".json" and "-" in file.stem


def _serves_the_work(file: Path) -> bool:
    return (
        _is_manifest(file)
        or file.suffix in (".lock", ".log", ".data", ".tmp")
        or (file.suffix == ".json" and file.stem == _AGREED)
    )
