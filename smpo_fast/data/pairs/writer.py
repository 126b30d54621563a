"""The canonical table as it is written: parts of bounded size that are there whole or not at all, and their statistics.

    OUT/pairs-00000.parquet ..   the table (read by smpo_fast.data)
    OUT/rejected.parquet         row, uid and reason of every record or pair that was left out
    OUT/import.json              what was understood, the source's files, counts, parts

Until all is there it grows in the hidden folder ``.OUT.partial`` beside it, where every finished part has a note of
how far it goes; an import that was interrupted is taken up after the last one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from smpo_fast.common.errors import UserError
from smpo_fast.common.storage import as_json, publish_folder, sync, take_lock, write_json
from smpo_fast.data.pairs import reader
from smpo_fast.data.pairs import schema as pairs_schema
from smpo_fast.data.pairs.rules import reason_kind
from smpo_fast.data.pairs.schema import Candidate, Rejected
from smpo_fast.data.pairs.statistics import _statistics

PART_BYTES = 256 << 20
_GROUP_BYTES, _GROUP_ROWS = 8 << 20, 4096  # of a row group, which waits in memory
_REJECTED_ROWS = 50_000  # of a part
_MARK = "identity.json"
_REJECTED = pa.schema([("row", pa.int64()), ("uid", pa.string()), ("reason", pa.string())])


@dataclass(frozen=True)
class Seen:
    """An encoded picture that was looked at."""

    content: bytes
    path: str | None
    hash: int
    size: tuple[int, int]


@dataclass(frozen=True)
class Pair:
    """A usable pair."""

    candidate: Candidate
    pictures: tuple[Seen, Seen]


def schema(out: Path, pictures: str = "") -> pa.Schema:
    """Columns of the table at ``out``; pictures: the folder of the pictures, where their paths are stored."""
    picture = pa.binary() if not pictures else pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    kinds = {
        "caption": pa.string(), "jpg_0": picture, "jpg_1": picture, "label_0": pa.float32(),
        "reward_0": pa.float64(), "reward_1": pa.float64(), "image_0_uid": pa.string(), "image_1_uid": pa.string(),
        "source_row": pa.int64(), "hash_0": pa.uint64(), "hash_1": pa.uint64(),
        "width_0": pa.int32(), "height_0": pa.int32(), "width_1": pa.int32(), "height_1": pa.int32(),
    }  # fmt: skip
    if not pictures:
        return pa.schema(kinds)
    root = os.path.realpath(pictures)
    places = [root, os.path.relpath(root, os.path.realpath(out))]
    return pa.schema(kinds, metadata={pairs_schema.PICTURES_KEY: json.dumps(places).encode()})


def _table_row(pair: Pair, paths: bool) -> dict[str, Any]:
    candidate, (one, two) = pair.candidate, pair.pictures
    rewards = candidate.rewards or (None, None)
    row: dict[str, Any] = {"caption": candidate.prompt, "label_0": candidate.label, "source_row": candidate.row}
    for side, seen, picture in ((0, one, candidate.pictures[0]), (1, two, candidate.pictures[1])):
        by_path = {"bytes": None if seen.path else seen.content, "path": seen.path}
        row |= {
            f"jpg_{side}": by_path if paths else seen.content,
            f"reward_{side}": rewards[side],
            f"image_{side}_uid": picture.uid and _plain(picture.uid),
            f"hash_{side}": seen.hash,
            f"width_{side}": seen.size[0],
            f"height_{side}": seen.size[1],
        }
    return row


def _stored_bytes(row: Mapping[str, Any]) -> int:
    pictures = (row["jpg_0"], row["jpg_1"])
    return len(row["caption"]) + sum(len(p) if isinstance(p, bytes) else len(p["bytes"] or b"") for p in pictures)


class TableWriter:
    """The table as it grows: row groups, parts with a note each, and at the end the folder under its name.

    As a context manager it holds a lock, which the system releases however the process ends.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any], schema: pa.Schema, part_bytes: int) -> None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} exists already and is no import: remove it, or name another folder")
        self.out, self.folder = out.absolute(), out.absolute().parent / f".{out.name}.partial"
        self.identity, self.schema, self.part_bytes = as_json(identity), schema, part_bytes
        self.reasons: Counter[str] = Counter()
        self.example = ""
        self._parts: list[dict[str, Any]] = []
        self._rows: list[dict[str, Any]] = []
        self._row_bytes = self._part_rows = self._part_bytes = 0
        self._rejected: list[Rejected] = []
        self._writer: pq.ParquetWriter | None = None
        self._unit = 0

    def __enter__(self) -> TableWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / "lock").open("w")
        if not take_lock(self._lock, wait=False):
            self._lock.close()
            raise UserError(f"another process is importing to {self.out}: wait for it or end it")
        self._take_up()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()
        if not any(part["pairs"] for part in self._parts):
            shutil.rmtree(self.folder, ignore_errors=True)  # nothing that a next run could take up
        self._lock.close()

    @property
    def next_unit(self) -> int:
        """Units below this one are in finished parts already."""
        return self._parts[-1]["next_unit"] if self._parts else 0

    @property
    def pairs(self) -> int:
        """Pairs in finished parts."""
        return sum(part["pairs"] for part in self._parts)

    def add(self, unit: Sequence[Pair | Rejected]) -> None:
        """Add what came of the next unit; a part ends only between units."""
        for item in unit:
            if isinstance(item, Rejected):
                self.reasons[reason_kind(item.reason)] += 1
                self.example = self.example or f"The first: row {item.row} ({item.uid}): {item.reason}"
                self._rejected.append(item)
            else:
                self._rows.append(_table_row(item, self.identity["paths"]))
                self._row_bytes += _stored_bytes(self._rows[-1])
                if self._row_bytes >= _GROUP_BYTES or len(self._rows) >= _GROUP_ROWS:
                    self._write_group()
        self._unit += 1
        if self._part_bytes + self._row_bytes >= self.part_bytes or len(self._rejected) >= _REJECTED_ROWS:
            self._end_part()

    def finish(self) -> dict[str, Any]:
        """End the last part and describe the table: parts, number of pairs, statistics."""
        self._end_part()
        names = [part["name"] for part in self._parts if part["pairs"]]
        with pq.ParquetWriter(self.folder / reader.REJECTED_FILE, _REJECTED) as writer:
            for part in self._parts:
                if part["rejected"]:
                    writer.write_table(pq.read_table(self.folder / f"rejected-{part['name']}"))
        files = [self.folder / name for name in names]
        parts = [
            {"name": part["name"], "pairs": part["pairs"], "bytes": file.stat().st_size}
            for part, file in zip((p for p in self._parts if p["pairs"]), files, strict=True)
        ]
        return {"pairs": self.pairs, "statistics": _statistics(files), "parts": parts}

    def publish(self, summary: Mapping[str, Any]) -> None:
        """Give the finished folder its name."""
        sync(self.folder / reader.REJECTED_FILE)
        write_json(self.folder / reader.IMPORT_INFO, summary, indent=2)
        publish_folder(self.folder, self.out)
        for notes in ("rejected-*", "pairs-*.json", _MARK, "lock"):
            for file in self.out.glob(notes):
                file.unlink()

    @property
    def _name(self) -> str:
        return f"pairs-{len(self._parts):05d}.parquet"

    @property
    def _draft(self) -> Path:
        return self.folder / f"{self._name}.tmp"

    def _take_up(self) -> None:
        """Believe the finished parts of the same import, and remove everything else."""
        mark = self.folder / _MARK
        try:
            same = json.loads(mark.read_text()) == self.identity
        except (OSError, ValueError):
            same = False
        while same and (note := self.folder / f"{self._name}.json").is_file():
            part = json.loads(note.read_text())
            self.reasons.update(part["reasons"])
            self._parts.append(part)
        self._unit = self.next_unit
        known = {
            name for part in self._parts for name in (part["name"], f"{part['name']}.json", f"rejected-{part['name']}")
        }
        for file in self.folder.iterdir():
            if file.name not in {*known, "lock"}:
                file.unlink()
        write_json(mark, self.identity)

    def _write_group(self) -> None:
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self._draft, self.schema, use_dictionary=["caption"], compression=self._compression()
            )
        self._writer.write_table(pa.Table.from_pylist(self._rows, self.schema))
        self._part_rows += len(self._rows)
        self._part_bytes += self._row_bytes
        self._rows, self._row_bytes = [], 0

    def _compression(self) -> dict[str, str]:
        """Pictures are compressed already."""
        leaves = [name for name in self.schema.names if not pa.types.is_struct(self.schema.field(name).type)]
        kinds = dict.fromkeys(leaves, "zstd")
        kinds |= {f"jpg_{side}.{leaf}": "NONE" for side in (0, 1) for leaf in ("bytes", "path")}
        return kinds | {f"jpg_{side}": "NONE" for side in (0, 1)}

    def _end_part(self) -> None:
        if self._rows:
            self._write_group()
        if not self._part_rows and not self._rejected:
            return
        name = self._name
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            sync(self._draft)
            os.replace(self._draft, self.folder / name)
        if self._rejected:
            file = self.folder / f"rejected-{name}"
            table = [
                {"row": item.row, "uid": _plain(item.uid), "reason": _plain(item.reason)} for item in self._rejected
            ]
            pq.write_table(pa.Table.from_pylist(table, _REJECTED), file)
            sync(file)
        part = {
            "name": name,
            "pairs": self._part_rows,
            "rejected": len(self._rejected),
            "reasons": Counter(reason_kind(item.reason) for item in self._rejected),
            "next_unit": self._unit,
        }
        write_json(self.folder / f"{name}.json", part)  # from here on the part is believed
        sync(self.folder)
        self._parts.append(part)
        self._rejected, self._part_rows, self._part_bytes = [], 0, 0


def _plain(text: str) -> str:
    """Without the surrogates that stand for the bytes of a file name that is not UTF-8."""
    return text.encode("utf-8", "replace").decode()
