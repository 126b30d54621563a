"""Writes a pair table: usable pairs and rejected rows in; a folder of parquet parts, complete or absent, out.

    OUT/pairs-00000.parquet ..   the table (read by smpo_fast.data.pairs.reader)
    OUT/rejected.parquet         row, uid and reason of every record or pair that was left out
    OUT/import.json              the summary (smpo_fast.data.pairs.summary)

Until it is complete the table grows in the hidden folder ``.OUT.partial`` next to OUT. Every finished part has a
manifest there that says how far it goes; an interrupted import resumes after the last one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from smpo_fast.common.errors import DataError
from smpo_fast.common.storage import as_json, file_facts, publish_folder, sealed, sync, take_lock, write_json
from smpo_fast.data.pairs import schema as pairs_schema
from smpo_fast.data.pairs.pair import Rejected, UsablePair
from smpo_fast.data.pairs.rules import reason_kind
from smpo_fast.data.pairs.schema import REJECTED_FILE, REJECTED_SCHEMA
from smpo_fast.data.pairs.statistics import table_statistics
from smpo_fast.data.pairs.summary import SUMMARY_FILE

PART_BYTES = 256 << 20
_GROUP_BYTES, _GROUP_ROWS = (8 << 20, 4096)  # of a row group, which is kept in memory until it is written
_REJECTED_ROWS = 50_000  # of a part
_IDENTITY_FILE = "identity.json"


class TableWriter:
    """A table that grows by row groups and parts, and gets its final folder at the end.

    As a context manager it holds a lock, which the system releases however the process ends. Raises DataError for an
    ``out`` that holds something else, and while another process writes the same table; EnvironmentProblem where the
    file system has no locks.

    identity: what decides the table's content; unfinished work is resumed only if it has the same identity.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any], schema: pa.Schema, part_bytes: int) -> None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise DataError(f"{out} exists already and is not an import: remove it, or choose another folder")
        self.out, self.folder = (out.absolute(), out.absolute().parent / f".{out.name}.partial")
        self.identity, self.schema, self.part_bytes = (as_json(identity), schema, part_bytes)
        self.rejected_by_kind: Counter[str] = Counter()
        self.first_rejected = ""  # a sentence about the first rejected row of this process
        self._store_paths = pairs_schema.stores_paths(schema)
        self._parts: list[dict[str, Any]] = []
        self._rows: list[dict[str, Any]] = []
        self._row_bytes = self._part_rows = self._part_bytes = 0
        self._rejected: list[Rejected] = []
        self._writer: pq.ParquetWriter | None = None
        self._units = 0

    def __enter__(self) -> TableWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / "lock").open("w")
        if not take_lock(self._lock, wait=False):
            self._lock.close()
            raise DataError(f"another process is importing to {self.out}: wait for it or end it")
        self._resume()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()
        if not any(part["pairs"] for part in self._parts):
            shutil.rmtree(self.folder, ignore_errors=True)  # nothing to resume from
        self._lock.close()

    @property
    def next_unit(self) -> int:
        """Number of units (see ``add``) that are in finished parts."""
        return self._parts[-1]["next_unit"] if self._parts else 0

    @property
    def pairs(self) -> int:
        """Pairs in finished parts."""
        return sum(part["pairs"] for part in self._parts)

    def add(self, unit: Sequence[UsablePair | Rejected]) -> None:
        """Add the rows of the next unit of the source. A part ends only between units, so that work can be resumed."""
        for item in unit:
            if isinstance(item, Rejected):
                self.rejected_by_kind[reason_kind(item.reason)] += 1
                self.first_rejected = self.first_rejected or f"The first: row {item.row} ({item.uid}): {item.reason}"
                self._rejected.append(item)
            else:
                self._rows.append(_table_row(item, self._store_paths))
                self._row_bytes += _stored_bytes(self._rows[-1])
                if self._row_bytes >= _GROUP_BYTES or len(self._rows) >= _GROUP_ROWS:
                    self._write_group()
        self._units += 1
        if self._part_bytes + self._row_bytes >= self.part_bytes or len(self._rejected) >= _REJECTED_ROWS:
            self._end_part()

    def finish(self) -> dict[str, Any]:
        """End the last part and describe the table: parts, number of pairs, statistics."""
        self._end_part()
        with pq.ParquetWriter(self.folder / REJECTED_FILE, REJECTED_SCHEMA) as writer:
            for part in self._parts:
                if part["rejected"]:
                    writer.write_table(pq.read_table(self.folder / f"rejected-{part['name']}"))
        with_pairs = [part for part in self._parts if part["pairs"]]
        files = [self.folder / part["name"] for part in with_pairs]
        parts = [
            {"name": part["name"], "pairs": part["pairs"], **file_facts(file)}
            for part, file in zip(with_pairs, files, strict=True)
        ]
        listed = {REJECTED_FILE: file_facts(self.folder / REJECTED_FILE)}
        return {"pairs": self.pairs, "statistics": table_statistics(files), "parts": parts, "files": listed}

    def publish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary and rename the finished folder to ``out``."""
        sync(self.folder / REJECTED_FILE)
        write_json(self.folder / SUMMARY_FILE, sealed(summary), indent=2)
        publish_folder(self.folder, self.out)
        remove_working_files(self.out)

    @property
    def _name(self) -> str:
        return f"pairs-{len(self._parts):05d}.parquet"

    @property
    def _draft(self) -> Path:
        return self.folder / f"{self._name}.tmp"

    def _resume(self) -> None:
        """Keep the finished parts of the same import, and remove everything else."""
        mark = self.folder / _IDENTITY_FILE
        try:
            same = json.loads(mark.read_text()) == self.identity
        except (OSError, ValueError):
            same = False
        while same and (manifest := self.folder / f"{self._name}.json").is_file():
            part = json.loads(manifest.read_text())
            self.rejected_by_kind.update(part["reasons"])
            self._parts.append(part)
        self._units = self.next_unit
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
                self._draft, self.schema, use_dictionary=["caption"], compression=_compression(self.schema),
                write_page_checksum=True,
            )  # fmt: skip
        self._writer.write_table(pa.Table.from_pylist(self._rows, self.schema))
        self._part_rows += len(self._rows)
        self._part_bytes += self._row_bytes
        self._rows, self._row_bytes = [], 0

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
            self._write_rejected(self.folder / f"rejected-{name}")
        manifest = {
            "name": name,
            "pairs": self._part_rows,
            "rejected": len(self._rejected),
            "reasons": Counter(reason_kind(item.reason) for item in self._rejected),
            "next_unit": self._units,
        }
        write_json(self.folder / f"{name}.json", manifest)  # with it the part counts as finished
        sync(self.folder)
        self._parts.append(manifest)
        self._rejected, self._part_rows, self._part_bytes = [], 0, 0

    def _write_rejected(self, file: Path) -> None:
        rows = [
            {"row": item.row, "uid": _valid_utf8(item.uid), "reason": _valid_utf8(item.reason)}
            for item in self._rejected
        ]
        pq.write_table(pa.Table.from_pylist(rows, REJECTED_SCHEMA), file)
        sync(file)


def remove_working_files(out: Path) -> None:
    """Remove from a finished table what only its writer needed, which a kill just after publishing leaves there."""
    for pattern in ("rejected-*", "pairs-*.json", _IDENTITY_FILE, "lock"):
        for file in out.glob(pattern):
            file.unlink(missing_ok=True)  # two processes may find the table finished


def _table_row(pair: UsablePair, store_paths: bool) -> dict[str, Any]:
    candidate = pair.candidate
    rewards = candidate.rewards or (None, None)
    row: dict[str, Any] = {"caption": candidate.prompt, "label_0": candidate.label, "source_row": candidate.row}
    for side, (image, ref) in enumerate(zip(pair.images, candidate.images, strict=True)):
        by_path = {"bytes": None if image.path else image.content, "path": image.path}
        row |= {
            f"jpg_{side}": by_path if store_paths else image.content,
            f"reward_{side}": rewards[side],
            f"image_{side}_uid": ref.uid and _valid_utf8(ref.uid),
            f"hash_{side}": image.hash,
            f"width_{side}": image.size[0],
            f"height_{side}": image.size[1],
        }
    return row


def _stored_bytes(row: Mapping[str, Any]) -> int:
    images = (row["jpg_0"], row["jpg_1"])
    return len(row["caption"]) + sum(len(i) if isinstance(i, bytes) else len(i["bytes"] or b"") for i in images)


def _compression(schema: pa.Schema) -> dict[str, str]:
    """Compression by column: none for images, which are compressed already."""
    leaves = [name for name in schema.names if not pa.types.is_struct(schema.field(name).type)]
    kinds = dict.fromkeys(leaves, "zstd")
    kinds |= {f"jpg_{side}.{leaf}": "NONE" for side in (0, 1) for leaf in ("bytes", "path")}
    return kinds | {f"jpg_{side}": "NONE" for side in (0, 1)}


def _valid_utf8(text: str) -> str:
    """Without the surrogates by which Python represents the bytes of a file name that is not UTF-8."""
    return text.encode("utf-8", "replace").decode()
