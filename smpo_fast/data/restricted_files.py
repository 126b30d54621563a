"""Reads files that untrusted data names by path: below one folder only, regular files only, of bounded size."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from smpo_fast.common.errors import check_not_exhausted
from smpo_fast.data.images import MAX_FILE_BYTES, BadImage


def read_below(folder: Path, name: str, boundary: Path | None = None) -> bytes:
    """The bytes of the file ``name`` below ``folder``.

    Raises BadImage for a path or symbolic link that leaves ``boundary`` (default: the folder), for anything but a
    regular file, for more than MAX_FILE_BYTES, and for what cannot be read; EnvironmentProblem where the machine has
    run out of file descriptors or memory.
    """
    if "\0" in name:
        raise BadImage("leaves its folder: a path with a null character")
    path = Path(os.path.realpath(folder / name))
    if not path.is_relative_to(os.path.realpath(boundary or folder)):
        raise BadImage(f"leaves its folder: '{name}' is not below {boundary or folder}")
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise BadImage(f"no file: '{name}' is a folder or a device")
        if facts.st_size > MAX_FILE_BYTES:
            raise BadImage(f"too large: '{name}' has {facts.st_size >> 20} MB, the limit is {MAX_FILE_BYTES >> 20}")
        return path.read_bytes()
    except OSError as error:
        check_not_exhausted(error, path)
        raise BadImage(f"no file: '{name}' cannot be read ({error.strerror})") from error
