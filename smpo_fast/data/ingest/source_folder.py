"""The folder that the paths in a source start from, on this machine or behind fsspec, and reading files below it."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa

from smpo_fast.common.errors import check_not_exhausted
from smpo_fast.data import images
from smpo_fast.data.images import BadImage
from smpo_fast.data.restricted_files import read_below

URL = re.compile(r"[a-zA-Z][\w+.-]*://")


@dataclass(frozen=True)
class SourceFolder:
    """A folder of a file system, with the boundary that paths and symbolic links may not leave."""

    fs: fsspec.AbstractFileSystem
    root: str
    boundary: str  # on this machine only; elsewhere it is the root

    @property
    def local(self) -> bool:
        return is_local(self.fs)

    def read_file(self, name: str) -> bytes:
        """The bytes of a file that a record names by a path. Raises BadImage where it cannot be read or is outside."""
        if self.local:
            if URL.match(name):
                raise BadImage(f"not here: '{name}' is an address; download the images first")
            return read_below(Path(self.root), name, Path(self.boundary))
        path = self.fs._strip_protocol(name) if URL.match(name) else posixpath.join(self.root, name)
        clean = posixpath.normpath(path)
        if "\0" in name or not clean.startswith(posixpath.normpath(self.root).rstrip("/") + "/"):
            raise BadImage(f"leaves its folder: '{name}' is not below {self.root}")
        try:
            size = self.fs.size(path)
            if size is not None and size > images.MAX_FILE_BYTES:
                raise BadImage(f"too large: '{name}' has {size >> 20} MB, the limit is {images.MAX_FILE_BYTES >> 20}")
            return self.fs.cat_file(path)
        except OSError as error:
            check_not_exhausted(error, path)
            raise BadImage(f"no file: '{name}' cannot be read ({error})") from error


def is_local(fs: fsspec.AbstractFileSystem) -> bool:
    """Whether a file system is this machine's."""
    return "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol))


@contextmanager
def open_for_arrow(folder: SourceFolder, file: str) -> Iterator[Any]:
    """A file as pyarrow reads it fastest: its own file object on this machine, else a Python object of fsspec's."""
    with pa.OSFile(file) if folder.local else folder.fs.open(file, "rb") as stream:
        yield stream
