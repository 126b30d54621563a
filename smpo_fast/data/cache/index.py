"""Writing the index of a cache: pairs.parquet, prompts.parquet and rejected.parquet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from smpo_fast.common.storage import sync
from smpo_fast.data.cache.format import PROMPTS, REJECTED, Entry, frame_columns

_ROW_GROUP = 1 << 14


class IndexWriter:
    """Writes ``pairs.parquet`` one row group at a time, and counts the pairs.

    texts: the distinct prompts.  pixels: height and width of each shape.  Both are referred to by their index.
    """

    def __init__(self, file: Path, texts: Sequence[str], pixels: Sequence[tuple[int, int]]) -> None:
        self._file, self._prompts = file, {text: i for i, text in enumerate(texts)}
        self._shapes = {size: i for i, size in enumerate(pixels)}
        types = {"row": pa.int64(), "uid": pa.string(), "prompt": pa.int32()}
        types |= {"reward_0": pa.float64(), "reward_1": pa.float64(), "label_0": pa.float64(), "scored": pa.bool_()}
        types |= {name: pa.int32() for name in ("shape", "shard", "position", *frame_columns())}
        self._schema = pa.schema(list(types.items()))
        self._writer = pq.ParquetWriter(file, self._schema)
        self._rows: list[tuple[Any, ...]] = []
        self._counts = {"pairs": 0, "encoded": 0, "stored": 0, "scored": 0}
        self.range: tuple[float, float] | None = None  # smallest and largest reward

    def add(self, entry: Entry, shard: int, position: int) -> None:
        """Add a pair and the place of its latents; a shard of -1 means that it has none."""
        rewards, shape = entry.rewards or (None, None), self._shapes[entry.pixels]
        self._rows.append((
            entry.row, entry.uid, self._prompts[entry.prompt], *rewards, entry.label, entry.scored,
            shape, shard, position, *entry.frames[0], *entry.frames[1],
        ))  # fmt: skip
        self._counts["pairs"] += 1
        self._counts["encoded"] += shard >= 0
        if entry.rewards is not None:
            self._counts["scored" if entry.scored else "stored"] += 1
            low, high = self.range or (math.inf, -math.inf)
            self.range = min(low, *entry.rewards), max(high, *entry.rewards)
        if len(self._rows) == _ROW_GROUP:
            self._write_row_group()

    def close(self) -> dict[str, int]:
        """Finish the file; returns the numbers of pairs, encoded pairs, and pairs with stored and computed rewards."""
        self._write_row_group()
        self._writer.close()
        sync(self._file)
        return self._counts

    def _write_row_group(self) -> None:
        columns = list(zip(*self._rows, strict=True)) or [()] * len(self._schema)
        arrays = [pa.array(values, field.type) for values, field in zip(columns, self._schema, strict=True)]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))
        self._rows.clear()


def write_prompts(folder: Path, texts: Sequence[str], shard_sizes: Sequence[int]) -> None:
    """Write ``prompts.parquet``. shard_sizes: how many of the prompts each shard holds, in order."""
    places = [(shard, position) for shard, count in enumerate(shard_sizes) for position in range(count)]
    _write(folder / PROMPTS, {
        "text": pa.array(texts, pa.string()),
        "shard": pa.array([shard for shard, _ in places], pa.int32()),
        "position": pa.array([position for _, position in places], pa.int32()),
    })  # fmt: skip


def write_rejected(folder: Path, rejected: Sequence[tuple[int, str, str]]) -> None:
    """Write ``rejected.parquet``: row, uid and reason of each rejected row."""
    _write(folder / REJECTED, {
        "row": pa.array([row for row, _, _ in rejected], pa.int64()),
        "uid": pa.array([uid for _, uid, _ in rejected], pa.string()),
        "reason": pa.array([reason for _, _, reason in rejected], pa.string()),
    })  # fmt: skip


def _write(file: Path, columns: dict[str, pa.Array]) -> None:
    pq.write_table(pa.table(columns), file)
    sync(file)
