"""Work that any number of processes share through a folder: who does which part, and what outlives a kill.

A part is done when its note ``NAME.json`` is there. A process does a part while it holds the lock of ``NAME.lock``,
which the system releases however the process ends; whoever finds the lock free then goes on with the part. What is
finished of it is in its draft: ``NAME.log`` has a line a record, ``NAME.data`` the records' bytes behind one another.
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

from smpo_fast.common.errors import UserError
from smpo_fast.common.storage import canonical_json, sync, take_lock, write_json, write_text

MARK = "work.json"  # what the work in the folder is
_LOCK, _LAST = "all.lock", "last.lock"
_AGREED = "agreed"  # what belongs to no work: agreed.json, agreed.lock


class Finished(Exception):
    """Another process has completed the whole work, and the folder is gone or about to go."""


def agree(folder: Path, find_out: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """JSON values that one process finds out for all who work in the folder, and for those who come later.

    find_out: makes them from what was found out before ({}: nothing), which it checks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with (folder / f"{_AGREED}.lock").open("w") as lock:
            take_lock(lock, wait=True)
            file = folder / f"{_AGREED}.json"
            values = find_out(json.loads(file.read_text()) if file.is_file() else {})
            write_json(file, values)
            return values
    except FileNotFoundError as error:
        if folder.is_dir():
            raise
        raise Finished from error


class SharedWork:
    """A folder of shared work. As a context manager it joins those who work there already.

    work: what is being made; leftovers of anything else are removed, and SettingsError is raised while a process is
    busy with it.  intact: whether a noted part is still what its note says; it is done again otherwise.
    Raises Finished where everything has been done meanwhile, and SettingsError where files cannot be locked.
    """

    def __init__(self, folder: Path, work: Mapping[str, Any], intact: Callable[[dict[str, Any]], bool]) -> None:
        self.folder, self._intact = folder, intact
        self._work = canonical_json(work)

    def __enter__(self) -> SharedWork:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = (self.folder / _LOCK).open("w")
        except FileNotFoundError as error:
            raise Finished from error
        try:
            self._join()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not any(file.suffix in (".json", ".log") and "-" in file.stem for file in _files(self.folder)):
            self.discard()  # there is nothing that a next run could take up
        self._lock.close()

    @property
    def mode(self) -> int:
        """Permissions of files that are made here."""
        return os.fstat(self._lock.fileno()).st_mode & 0o777

    def share(self, names: Sequence[str], do: Callable[[str], dict[str, Any]]) -> None:
        """Do those of the parts that nobody does, then wait for the rest and take over what was left unfinished.

        do: does the part of a name and returns its note, JSON values. Returns when all the parts are done.
        """
        for wait in (False, True):
            for name in names:
                if self.is_done(name):
                    continue
                with self.claim(name, wait=wait) as mine:
                    if mine and not self.is_done(name):
                        write_json(self.folder / f"{name}.json", do(name))
                        Draft(self.folder, name).remove()

    @contextmanager
    def claim(self, name: str, *, wait: bool) -> Iterator[bool]:
        """Hold the lock of a part; False where another process holds it and ``wait`` is not given."""
        try:
            file = (self.folder / f"{name}.lock").open("w")
        except FileNotFoundError as error:
            raise Finished from error
        with file:
            mine = take_lock(file, wait=wait)
            if mine and not (self.folder / MARK).is_file():
                raise Finished
            yield mine

    def is_done(self, name: str) -> bool:
        return (self.folder / f"{name}.json").is_file()

    def note(self, name: str) -> dict[str, Any]:
        """The note of a part that is done."""
        try:
            return json.loads((self.folder / f"{name}.json").read_text())
        except FileNotFoundError as error:
            raise Finished from error

    def draft(self, name: str) -> Draft:
        """What is finished of a part that this process holds."""
        return Draft(self.folder, name)

    def discard(self) -> None:
        """Remove the folder, where no process shares it."""
        here = (self.folder / _LOCK).is_file() and os.path.samestat(
            (self.folder / _LOCK).stat(), os.fstat(self._lock.fileno())
        )
        if here and take_lock(self._lock, wait=False):
            shutil.rmtree(self.folder, ignore_errors=True)

    def _join(self) -> None:
        if take_lock(self._lock, wait=False):
            self._take_up()
        take_lock(self._lock, wait=True, shared=True)
        try:
            work = (self.folder / MARK).read_text()
        except FileNotFoundError as error:
            raise Finished from error
        if work != self._work:
            raise UserError(f"another process is at work in {self.folder} with other settings: wait or end it")

    def _take_up(self) -> None:
        """Keep what was done of the same work, and remove everything else. Nobody else is here."""
        mark = self.folder / MARK
        same = mark.is_file() and mark.read_text() == self._work
        for file in _files(self.folder):
            if file.name != _LOCK and file.stem != _AGREED and (not same or file.suffix == ".tmp"):
                shutil.rmtree(file) if file.is_dir() else file.unlink()
        for note in self.folder.glob("*.json") if same else ():
            if "-" in note.stem and not self._is_intact(note):
                note.unlink()
        write_text(mark, self._work)

    def _is_intact(self, note: Path) -> bool:
        try:
            return self._intact(json.loads(note.read_text()))
        except (OSError, ValueError, KeyError, TypeError):
            return False


def settle(folder: Path, target: Path, proof: str) -> None:
    """Give the folder its name, without what served the work, if the file ``proof`` says that it is complete.

    Any process may do it, and again; whoever comes meanwhile waits here until it is done.
    """
    try:
        with (folder / _LAST).open("w") as last:
            take_lock(last, wait=True)
            if not (folder / proof).is_file():
                return
            (folder / MARK).unlink(missing_ok=True)  # first: from here on no part can be claimed
            for file in _files(folder):
                if file.name not in (_LOCK, _LAST) and _serves_the_work(file):
                    file.unlink()
            os.replace(folder, target)
            for name in (_LOCK, _LAST):
                (target / name).unlink(missing_ok=True)
            sync(target.parent)
    except FileNotFoundError:
        return


class Draft:
    """The finished records of a part, on disk. Opening it drops a record that was being written when it was killed."""

    def __init__(self, folder: Path, name: str) -> None:
        self._log, self._data = folder / f"{name}.log", folder / f"{name}.data"
        self.records: list[dict[str, Any]] = []
        if self._log.is_file() and self._data.is_file():
            self._take_up()

    def append(self, record: Mapping[str, Any], parts: Sequence[bytes] = ()) -> None:
        """Add a record (JSON values) and its bytes; once this returns, a kill of the process loses neither."""
        crc = 0
        with self._data.open("ab") as data:
            for part in parts:
                data.write(part)
                crc = zlib.crc32(part, crc)
        facts = {"bytes": sum(len(part) for part in parts), "crc": crc}
        with self._log.open("ab") as log:
            log.write(json.dumps([facts, record]).encode() + b"\n")
        self.records.append(dict(record))

    def data(self) -> bytes:
        """The bytes of all records."""
        return bytes(self.mapped())

    def mapped(self) -> memoryview:
        """The bytes of all records, mapped, not read."""
        if not self._data.is_file() or not self._data.stat().st_size:
            return memoryview(b"")
        with self._data.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def remove(self) -> None:
        """Remove it: the part is done."""
        self._log.unlink(missing_ok=True)
        self._data.unlink(missing_ok=True)

    def _take_up(self) -> None:
        good = [0, 0]  # bytes of the log and of the data that belong to whole records
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
                good = [good[0] + len(line), good[1] + len(found)]
        os.truncate(self._log, good[0])
        os.truncate(self._data, good[1])


def _files(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _serves_the_work(file: Path) -> bool:
    is_note = file.suffix == ".json" and ("-" in file.stem or file.stem == _AGREED)
    return is_note or file.suffix in (".lock", ".log", ".data", ".tmp")
