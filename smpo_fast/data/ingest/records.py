"""A record of a source: a mapping from column to value, or the reason why there is none."""

from __future__ import annotations

import lzma
import posixpath
import re
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa

from smpo_fast.data import images
from smpo_fast.data.images import BadImage

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
TEXTS = ("txt", "text", "caption", "cls")
URL = re.compile(r"[a-zA-Z][\w+.-]*://")
_MAX_RECORD = 64 << 20  # bytes of a record of JSON or CSV
_DAMAGE = (OSError, EOFError, UnicodeDecodeError, zlib.error, lzma.LZMAError, tarfile.TarError, pa.ArrowException)


@dataclass(frozen=True)
class Problem:
    """A record that cannot be read; ``reason`` is 'what: detail'."""

    reason: str


@dataclass(frozen=True)
class Broken:
    """A cell that cannot be read, in a record that otherwise can."""

    reason: str


Values = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """A folder, here or elsewhere, that the paths in a source start from."""

    fs: fsspec.AbstractFileSystem
    root: str
    fence: str  # what paths and links may not leave; on disk only

    @property
    def local(self) -> bool:
        return "file" in protocols(self.fs)

    def picture(self, name: str) -> bytes:
        """The bytes of a picture that a record names by a path; raises BadPicture."""
        if self.local:
            if URL.match(name):
                raise BadImage(f"not here: '{name}' is an address; download the pictures first")
            return images.read_inside(Path(self.root), name, Path(self.fence))
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
            raise BadImage(f"no file: '{name}' cannot be read ({error})") from error


def protocols(fs: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    """The names that addresses of a file system begin with."""
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


@contextmanager
def _bytes_of(place: Place, file: str) -> Iterator[Any]:
    """What pyarrow reads from: a file of its own on disk, else a Python object of fsspec's."""
    with pa.OSFile(file) if place.local else place.fs.open(file, "rb") as stream:
        yield stream


def _no_surrogates(text: str) -> str | Broken:
    return Broken("not UTF-8 text: bytes that are none") if re.search("[\udc80-\udcff]", text) else text


def _decoded(content: bytes) -> str | Broken:
    try:
        return content.decode("utf-8-sig").strip("\r\n")
    except UnicodeDecodeError as error:
        return Broken(f"not UTF-8 text: {error.reason}")
