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

import io
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

from smpo_fast.common.errors import DataError, EnvironmentProblem
from smpo_fast.common.storage import atomic_write, canonical_json, sync, take_lock, write_json, write_text

WORK_FILE = "work.json"
_ALL_LOCK, _PUBLISH_LOCK = "all.lock", "last.lock"
_AGREED = "agreed"  # agreed.json and agreed.lock survive a change of the work, and are written before joining it


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
            keep = leftover.name == _ALL_LOCK or _is_agreed(leftover) or (same and not _is_temporary(leftover))
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
            remove_locks(target)
            sync(target.parent)
    except FileNotFoundError:  # another process has published it
        return


def remove_locks(target: Path) -> None:
    """Remove the lock files from a published folder, which a kill just after publishing leaves there."""
    for name in (_ALL_LOCK, _PUBLISH_LOCK):
        (target / name).unlink(missing_ok=True)


class Draft:
    """The finished records of an unfinished part. Opening it drops what a kill or a full disk left half-written."""

    def __init__(self, folder: Path, name: str) -> None:
        self._log, self._data = folder / f"{name}.log", folder / f"{name}.data"
        self.records: list[dict[str, Any]] = []
        self._blobs: list[tuple[int, int]] = []  # length and CRC-32 of each record's bytes
        self._log_bytes = 0  # of the complete records
        self._resume()

    def append(self, record: Mapping[str, Any], blobs: Sequence[bytes] = ()) -> None:
        """Add a record (JSON values) and its bytes. Once this returns, a kill of the process loses neither.

        The bytes come first: a record whose line is complete has all of them.
        """
        content = b"".join(blobs)
        facts = {"bytes": len(content), "crc": zlib.crc32(content)}
        line = json.dumps([facts, record]).encode() + b"\n"
        _write_at(self._data, self._data_bytes, content)
        _write_at(self._log, self._log_bytes, line)
        self.records.append(dict(record))
        self._blobs.append((facts["bytes"], facts["crc"]))
        self._log_bytes += len(line)

    def data(self) -> bytes:
        """The bytes of all records. Raises EnvironmentProblem if they are not what was appended."""
        return bytes(self.mapped())

    def mapped(self) -> memoryview:
        """The bytes of all records, as a memory map. Raises EnvironmentProblem if they are not what was appended."""
        size = self._data.stat().st_size if self._data.is_file() else 0
        content = memoryview(b"")
        if size:
            with self._data.open("rb") as file:
                content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        if size != self._data_bytes or not self._is_as_appended(content):
            raise EnvironmentProblem(
                f"{self._data} has changed since it was written ({size} bytes, {self._data_bytes} were written): check "
                f"the disk, remove {self._data.parent} and start again"
            )
        return content

    def remove(self) -> None:
        """Remove the files of the draft: the part is finished."""
        self._log.unlink(missing_ok=True)
        self._data.unlink(missing_ok=True)

    @property
    def _data_bytes(self) -> int:
        return sum(size for size, _ in self._blobs)

    def _resume(self) -> None:
        """Read the complete records and cut off what follows them, in either file."""
        log = self._log.read_bytes() if self._log.is_file() else b""
        with self._data.open("rb") if self._data.is_file() else io.BytesIO() as data:
            for line in log.splitlines(keepends=True):
                try:
                    facts, record = json.loads(line)
                except ValueError:
                    break
                found = data.read(facts["bytes"])
                if not line.endswith(b"\n") or len(found) < facts["bytes"] or zlib.crc32(found) != facts["crc"]:
                    break
                self.records.append(record)
                self._blobs.append((facts["bytes"], facts["crc"]))
                self._log_bytes += len(line)
        for file, size in ((self._log, self._log_bytes), (self._data, self._data_bytes)):
            if file.is_file():
                os.truncate(file, size)

    def _is_as_appended(self, content: memoryview) -> bool:
        offset = 0
        for size, crc in self._blobs:
            if zlib.crc32(content[offset : offset + size]) != crc:
                return False
            offset += size
        return True


def _write_at(file: Path, offset: int, content: bytes) -> None:
    """Write at the end of what is complete, over anything that an earlier attempt left there."""
    with open(os.open(file, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as stream:
        stream.truncate(offset)
        stream.seek(offset)
        stream.write(content)


def _files(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _is_manifest(file: Path) -> bool:
    """Whether a file is a part's manifest: names of parts contain a '-', other JSON files' names do not."""
    return file.suffix == ".json" and "-" in file.stem


def _is_agreed(file: Path) -> bool:
    """Whether a file belongs to ``agreed_values``, which a process may be writing that has not joined the work yet."""
    return file.name.partition(".")[0] == _AGREED


def _is_temporary(file: Path) -> bool:
    """Whether a file was being written: by ``atomic_write``, or by safetensors, which calls it .tmpXXXXXX."""
    return file.suffix == ".tmp" or file.name.startswith(".tmp")


def _serves_the_work(file: Path) -> bool:
    return _is_manifest(file) or _is_temporary(file) or file.suffix in (".lock", ".log", ".data") or _is_agreed(file)
