"""The header of a safetensors file: names, dtypes and shapes of its tensors, and its metadata."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from smpo_fast.common.errors import ModelError

_LONGEST = 100_000_000  # bytes of a header, safetensors' own limit
_PICKLED = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_PIECES, _PIECE_BYTES = 64, 2**16


class TensorInfo(NamedTuple):
    """dtype as safetensors calls it ('F16', 'BF16', 'F32', ...), shape, and place in bytes after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself."""

    file: Path
    size: int  # bytes of the header, with the 8 that give its length
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]

    @cached_property
    def identity(self) -> str:
        """A quick hash of the file: length, time of its last change, header, and 64 pieces spread evenly over it.

        Reading all of 7 GB would take longer than loading them.
        """
        facts = self.file.stat()
        total = facts.st_size
        digest = hashlib.sha256(f"{total} {facts.st_mtime_ns}".encode())
        with self.file.open("rb") as stream:
            digest.update(stream.read(self.size))
            for piece in range(_PIECES):
                stream.seek(self.size + (total - self.size) * piece // _PIECES)
                digest.update(stream.read(_PIECE_BYTES))
        return digest.hexdigest()


def read_header(file: Path, key: str) -> Header:
    """Read the header of the safetensors file that the setting ``key`` names; its tensors are not read.

    Raises ModelError for pickled files, for what is no safetensors file, and for a file that was cut off.
    """
    if file.suffix in _PICKLED:
        raise ModelError(
            f"{key}: {file} is a pickled checkpoint, which can run any code when it is loaded: use its .safetensors "
            "version, or convert it where you trust it"
        )
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            raw: Any = json.loads(stream.read(length)) if 2 <= length <= _LONGEST else None
        metadata = raw.pop("__metadata__", {})
        tensors = {
            name: TensorInfo(entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
            for name, entry in raw.items()
        }
        needed = 8 + length + max((info.end for info in tensors.values()), default=0)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelError(f"{key}: {file} is not a safetensors file, the only kind that is loaded ({error})") from error
    if file.stat().st_size < needed:
        raise ModelError(f"{key}: {file} has {file.stat().st_size} of {needed} bytes: it was cut off; fetch it again")
    return Header(file, 8 + length, tensors, {str(k): str(v) for k, v in dict(metadata).items()})


def tensor_bytes(tensors: Mapping[str, TensorInfo], prefix: str) -> int:
    """Bytes of the tensors whose names begin with a prefix."""
    return sum(info.end - info.start for name, info in tensors.items() if name.startswith(prefix))


def set_metadata(file: Path, metadata: Mapping[str, str]) -> None:
    """Replace a file's metadata by others of the same length in bytes, and put its header in order.

    Raises ValueError for metadata of another length.
    """
    if not _rewrite(file, lambda header: {**header, "__metadata__": dict(metadata)}):
        raise ValueError("the header's length may not change: the tensors follow it")


def sort_header(file: Path) -> None:
    """Put the entries of a file's header in order: safetensors writes metadata in a random one.

    The same tensors thus give the same bytes.
    """
    _rewrite(file, lambda header: header)


def _rewrite(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> bool:
    """Change a header in its place; False, and nothing done, if it would have another length."""
    with file.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = change(json.loads(stream.read(size)))
        ordered = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(ordered) == size:
            stream.seek(8)
            stream.write(ordered)
        return len(ordered) == size
