"""A record as its column mapping explains it: its prompt, numbers and images, each checked when it is read."""

from __future__ import annotations

import math
from decimal import Decimal
from functools import partial
from typing import Any

from smpo_fast.data.ingest.columns import ColumnMapping, unpack_list
from smpo_fast.data.ingest.records import Cells, Record, UnreadableCell, UnreadableRecord
from smpo_fast.data.ingest.source_folder import SourceFolder
from smpo_fast.data.pairs.pair import CandidatePair, ImageRef
from smpo_fast.data.pairs.rules import Unusable

_WORDS = {
    **dict.fromkeys(("true", "yes", "win", "w", "chosen", "good", "exclusive_win"), 1.0),
    **dict.fromkeys(("false", "no", "lose", "l", "rejected", "bad", "exclusive_lose"), 0.0),
    "tie": 0.5,
}


class MappedRecord:
    """A record seen through a column mapping. Raises Unusable for an unreadable record or value, and a wrong type."""

    def __init__(self, folder: SourceFolder, mapping: ColumnMapping, record: Record) -> None:
        if isinstance(record.cells, UnreadableRecord):
            raise Unusable(record.cells.reason)
        self.folder, self.record, self._columns = folder, record, mapping.columns
        self._cells: Cells = record.cells

    def has(self, role: str) -> bool:
        return role in self._columns

    def value(self, role: str) -> Any:
        value = self._cells.get(self._columns[role]) if role in self._columns else None
        if isinstance(value, UnreadableCell):
            name = "caption" if role == "prompt" else role
            raise Unusable(f"{name} {value.reason}")
        return value

    def prompt(self) -> str:
        value = self.value("prompt")
        if value is None:
            raise Unusable("no caption: it is null (an empty one is allowed)")
        if not isinstance(value, str):
            raise Unusable(f"caption is not text: it is {type(value).__name__}")
        return _valid_utf8(value, "caption")

    def number(self, role: str) -> float | None:
        return to_number(self.value(role), role)

    def elements(self, role: str) -> list[Any]:
        """The elements of a column that holds lists."""
        value = unpack_list(self.value(role))
        if not isinstance(value, list):
            raise Unusable(f"no {role}: {'it is null' if value is None else 'it is not a list'}")
        return value

    def image(self, role: str, uid_role: str = "") -> ImageRef:
        uid = self.value(uid_role) if uid_role else None
        return to_image(self.folder, self.value(role), role, uid if isinstance(uid, str) else None)

    def candidate(
        self, images: tuple[ImageRef, ImageRef], label: float | None, rewards: tuple[float, float] | None
    ) -> CandidatePair:
        """A pair of two images of this record."""
        named = [image.uid or image.path for image in images]
        uid = "/".join(str(name) for name in named) if all(named) else self.record.name
        return CandidatePair(self.record.number, uid, self.prompt(), images, label, rewards)


def to_number(value: Any, name: str) -> float | None:
    """A number, a word for one, or a list of one; None for null, NaN and empty text. Raises Unusable otherwise."""
    value = unpack_list(value)
    if isinstance(value, list):
        if len(value) > 1:
            raise Unusable(f"more than one number: {name} is a list of {len(value)}")
        value = value[0] if value else None
    if isinstance(value, str):
        value = _WORDS.get(value.strip().lower(), value.strip() or None)
    if value is None:
        return None
    if not isinstance(value, (int, float, str, Decimal)):
        raise Unusable(f"{name} is no number: it is {type(value).__name__}")
    try:
        found = float(value)
    except (ValueError, OverflowError) as error:
        raise Unusable(f"{name} is no number: '{str(value)[:40]}'") from error
    return None if math.isnan(found) else found


def to_image(folder: SourceFolder, value: Any, name: str, uid: str | None = None) -> ImageRef:
    """The image that a cell means: bytes, a path, or Hugging Face's {bytes, path}. Raises Unusable otherwise."""
    content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if isinstance(content, str):
        content, path = None, content
    if isinstance(content, bytes) and content:
        return ImageRef(partial(bytes, content), None, uid or (path if isinstance(path, str) else None))
    if content is None and isinstance(path, str) and path:
        return ImageRef(partial(folder.read_file, _valid_utf8(path, f"path of {name}")), path, uid or path)
    if content is None or content == b"":
        raise Unusable(f"{name} holds no bytes: it is {'null' if content is None else 'empty'}")
    raise Unusable(f"{name} is no picture: it is {type(content).__name__}")


def _valid_utf8(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half a pair of surrogates, which JSON can contain
        raise Unusable(f"{name} is not UTF-8 text: {error.reason}") from error
    return text
