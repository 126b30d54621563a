"""Counts what a process changes on the disk below a folder, and makes a chosen change fail or the last thing it does.

Such a change is called a boundary: a file is opened for writing, bytes reach a file (not Python's buffer), something is
synced, renamed, removed, linked, resized, or given a mode. Libraries that write in native code have one boundary around
each of their calls. Nothing of this is in the product: the functions of the standard library and of safetensors and
pyarrow are replaced in the process under test.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import safetensors.numpy
import safetensors.torch
from safetensors import SafetensorError

from smpo_fast.common import storage

KILLS = ("kill before", "kill within", "kill after")
# A full disk and a read-only one stay so until the process ends; the others are refused once.
LASTING = {"ENOSPC": ("open", "write", "mkdir", "rename", "link", "sync"), "EROFS": ()}
PASSING = {"EMFILE": ("open",), "ENOMEM": ("open", "mkdir", "write")}
ERRORS = (*LASTING, *PASSING)
_DRAFT = re.compile(r"\.\d+-[0-9a-f]{8}\.tmp$|\.\d+\.tmp$")  # names with the number of the process
WITHIN = ("write", "native")  # boundaries that a kill can leave half done


@dataclass(frozen=True)
class Fault:
    """One of KILLS or ERRORS, at the boundary of a number; 1 is the first."""

    kind: str
    boundary: int

    def applies_to(self, operation: str) -> bool:
        """Whether this kind of fault exists at a boundary: a rename cannot run out of file descriptors."""
        if self.kind == "kill within":
            return operation in WITHIN
        allowed = {**LASTING, **PASSING}.get(self.kind)
        return not allowed or operation in (*allowed, "native")


class Shim:
    """What a process changes below ``folder``; ``boundaries`` lists it as 'operation path'."""

    def __init__(self, folder: Path, fault: Fault | None = None) -> None:
        self._folder, self._fault = os.path.realpath(folder) + "/", fault
        self._lock = threading.RLock()
        self.boundaries: list[str] = []

    def install(self) -> None:
        """Replace the functions that change files, for the rest of this process."""
        os.open = self._opening_descriptor(os.open)
        io.open = builtins.open = self._opening(io.open)
        for name in ("write", "sendfile"):
            setattr(os, name, self._wrapped("write", getattr(os, name)))
        for name in ("fsync", "fdatasync"):
            setattr(os, name, self._wrapped("sync", getattr(os, name)))
        for name in ("replace", "rename"):
            setattr(os, name, self._wrapped("rename", getattr(os, name)))
        for name in ("link", "symlink"):
            setattr(os, name, self._wrapped("link", getattr(os, name)))
        for name in ("mkdir", "unlink", "remove", "rmdir", "truncate", "ftruncate", "chmod", "utime"):
            setattr(os, name, self._wrapped(name, getattr(os, name)))
        storage._exchange = self._wrapped("rename", storage._exchange)
        for module in (safetensors.torch, safetensors.numpy):
            module.serialize_file = self._saving(module.serialize_file)  # type: ignore[attr-defined]
        for name in ("__init__", "write_table", "close"):
            setattr(pq.ParquetWriter, name, self._writing_parquet(getattr(pq.ParquetWriter, name)))

    @contextmanager
    def _boundary(self, operation: str, path: object, half: Callable[[], object] | None = None) -> Iterator[None]:
        """Around a change of a file.  half: does a part of the change, as an interrupted or failing one would."""
        place = os.path.abspath(os.fsdecode(path))  # type: ignore[arg-type]
        if not (place + "/").startswith(self._folder):
            yield
            return
        with self._lock:
            self.boundaries.append(f"{operation} {_DRAFT.sub('.tmp', place[len(self._folder) :])}")
            number, fault = len(self.boundaries), self._fault
            if fault is None or number < fault.boundary:
                yield
                return
            here = number == fault.boundary
            if fault.kind in ERRORS and (here or fault.kind in LASTING) and fault.applies_to(operation):
                if half is not None and fault.kind == "ENOSPC":
                    half()
                raise _refusal(fault.kind, operation, place)
            if here and fault.kind == "kill within" and half is not None:
                half()
            if here and fault.kind in ("kill before", "kill within"):
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                yield
            finally:  # a call that fails by itself, such as mkdir of a folder that exists, is a boundary as well
                if here and fault.kind == "kill after":
                    os.kill(os.getpid(), signal.SIGKILL)

    def _wrapped(self, operation: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(target: Any, *args: Any, **options: Any) -> Any:
            with self._boundary(operation, _place(target, options.get("dir_fd") or options.get("src_dir_fd"))):
                return function(target, *args, **options)

        return call

    def _opening_descriptor(self, function: Callable[..., int]) -> Callable[..., int]:
        writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

        def call(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            if not flags & writing:
                return function(path, flags, mode, dir_fd=dir_fd)
            with self._boundary("open", _place(path, dir_fd)):
                return function(path, flags, mode, dir_fd=dir_fd)

        return call

    def _opening(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Files opened for writing become Python objects above a raw file whose writes are boundaries."""

        def call(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **options: Any) -> Any:
            if not set(mode) & set("wax+"):
                return function(file, mode, buffering, *args, **options)
            names = dict(zip(("encoding", "errors", "newline", "closefd", "opener"), args, strict=False)) | options
            raw_options = {name: names.pop(name) for name in ("closefd", "opener") if name in names}
            raw = self._raw(file, mode.replace("b", "").replace("t", ""), raw_options)
            if buffering == 0:
                return raw
            buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, **names)

        return call

    def _raw(self, file: Any, mode: str, options: dict[str, Any]) -> io.FileIO:
        boundary, target = self._boundary, _place(file, None)

        class Raw(io.FileIO):
            """A file whose writes and changes of length are boundaries."""

            def write(self, content: Any) -> int:
                with boundary("write", target, lambda: io.FileIO.write(self, bytes(content)[: len(content) // 2])):
                    return super().write(content)

            def truncate(self, size: int | None = None) -> int:
                with boundary("truncate", target):
                    return super().truncate(size)

        if isinstance(file, int):
            return Raw(file, mode, **options)
        with self._boundary("open", target):
            return Raw(file, mode, **options)

    def _saving(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensors: Any, file: Any, *args: Any, **options: Any) -> Any:
            def half() -> None:
                """safetensors writes to a file of another name and renames it."""
                draft = Path(file).with_name(".tmpAb12Cd")
                function(tensors, draft, *args, **options)
                os.truncate(draft, draft.stat().st_size // 2)

            with self._boundary("native", file, half):
                return function(tensors, file, *args, **options)

        return call

    def _writing_parquet(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(writer: Any, *args: Any, **options: Any) -> Any:
            if function.__name__ == "__init__":
                writer.boundary_file, writer.was_refused = (args[0] if args else options["where"]), False
            if writer.was_refused or (function.__name__ == "close" and not writer.is_open):
                return function(writer, *args, **options)  # pyarrow closes a file that it could not write in silence

            def half() -> None:
                function(writer, *args, **options)
                os.truncate(writer.boundary_file, os.stat(writer.boundary_file).st_size // 2)

            try:
                with self._boundary("native", writer.boundary_file, half):
                    return function(writer, *args, **options)
            except OSError:
                writer.was_refused = True
                raise

        return call


def _place(target: Any, folder: int | None) -> str:
    """The path of a path or descriptor, which may be relative to the descriptor of a folder."""
    if isinstance(target, int):
        return os.readlink(f"/proc/self/fd/{target}")
    name = os.fsdecode(target)
    return name if folder is None else os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name)


def _refusal(kind: str, operation: str, place: str) -> Exception:
    """The exception that the operation would end with; libraries have their own."""
    number = int(getattr(errno, kind))
    if operation != "native":
        return OSError(number, os.strerror(number), place)
    if place.endswith(".parquet") or ".parquet." in place:
        return OSError(number, f"Error writing bytes to file. Detail: [errno {number}] {os.strerror(number)}")
    return SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")
