"""Files that are there whole or not at all, and stay what they are."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def write_text(file: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    draft = file.with_name(file.name + ".tmp")
    draft.write_text(text)
    sync(draft)
    os.replace(draft, file)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(file: Path) -> str:
    """The hash of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
