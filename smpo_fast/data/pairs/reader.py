"""Reads a pair table: parquet files in, pairs (images still encoded) and rejected rows out.

The columns are those of Pick-a-Pic v2 (docs/data.md). A table of ``smpo import --paths`` holds paths instead of image
bytes; they are read below one folder and nowhere else. A row that cannot be used gives a ``Rejected`` with its number
and the reason, in its place among the others: it neither ends the reading nor changes the number of another row.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from smpo_fast import embedded
from smpo_fast.common.console import printable
from smpo_fast.common.errors import DataError, check_not_exhausted
from smpo_fast.config.schema import EMBEDDED
from smpo_fast.data.cells import BadCell, cell_value
from smpo_fast.data.images import BadImage, content_hash
from smpo_fast.data.pairs import schema, summary
from smpo_fast.data.pairs.pair import RawPair, Rejected
from smpo_fast.data.pairs.rules import Unusable, label_of, reason_kind, rewards_of
from smpo_fast.data.restricted_files import read_below

_BATCH_ROWS = 16
_NO_CAPTION = "no caption: it is null (an empty one is allowed)"


def source_path(pairs: str) -> Path:
    """The file or folder that ``data.pairs`` names. Raises DataError if it does not exist."""
    path = embedded.pairs_path() if pairs == EMBEDDED else Path(pairs).expanduser()
    if not path.exists():
        raise DataError(f"data.pairs: {path} does not exist; give 'embedded', a parquet file or a folder of them")
    return path


def files(path: Path) -> list[Path]:
    """The parquet files of a table: the file itself, or those of a folder in the order of their names.

    In a folder that ``smpo import`` wrote, the parts that its summary lists. Raises DataError for a folder without
    parquet files and where a listed part is missing.
    """
    if not path.is_dir():
        return [path]
    if summary.exists(path):
        return summary.part_files(path)
    found = sorted(file for file in path.glob("*.parquet") if file.name != schema.REJECTED_FILE)
    if not found:
        raise DataError(printable(f"data.pairs: the folder {path} contains no *.parquet file"))
    return found


def columns(path: Path) -> set[str]:
    """Names of the columns in use, after checking all files of the table. Raises DataError like ``read_pairs``."""
    return set.intersection(*(set(schema.columns_to_read(_open(file).schema_arrow, file)) for file in files(path)))


def count_rows(path: Path, *, max_pairs: int = 0) -> int:
    """How many rows ``read_pairs`` will give, usable or not."""
    rows = sum(_open(file).metadata.num_rows for file in files(path))
    return min(rows, max_pairs) if max_pairs else rows


def read_pairs(path: Path, *, max_pairs: int = 0, start: int = 0) -> Iterator[RawPair | Rejected]:
    """The rows of a table in order, from row ``start`` on; unless ``max_pairs`` is 0, rows below it only.

    Memory is bounded by a page of each column, whatever the size of the file. Raises DataError, before the first row,
    for a file that is not parquet, a missing column and a column of a wrong type (naming file and column); and later
    where a file is damaged.
    """
    tables = files(path)
    columns(path)
    first = 0
    for file in tables:
        table = _open(file)
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            last = min(first + rows, max_pairs) if max_pairs else first + rows
            if last > start and last > first:
                yield from _read_group(table, file, group, first, max(start, first), last)
            first += rows


class Preferences(NamedTuple):
    """What the N rows of a table prefer, read without its images; a row that cannot be used has NaN in all three."""

    rewards: np.ndarray  # float64 [N, 2], NaN where there are none
    labels: np.ndarray  # float64 [N], 1: image 0 is preferred, NaN: no label
    rejected: Mapping[str, int]  # rows that cannot be used, by kind of the reason; rows without a preference are not


def read_preferences(path: Path, *, max_pairs: int = 0) -> Preferences:
    """Labels and rewards of the rows that ``read_pairs`` gives. Raises DataError like it."""
    columns(path)
    labels: list[float | None] = []
    rewards: list[tuple[float, float] | None] = []
    rejected: Counter[str] = Counter()
    for cells, i in _cells_without_images(path, max_pairs):
        cell = _cell_reader(cells, i)
        try:
            if cell("caption") is None:
                raise Unusable(_NO_CAPTION)
            found = label_of(cell), rewards_of(cell, cells)
        except Unusable as error:
            rejected[reason_kind(str(error))] += 1
            found = None, None
        labels.append(found[0])
        rewards.append(found[1])
    known = [both or (math.nan, math.nan) for both in rewards]
    return Preferences(np.array(known, float).reshape(-1, 2), np.array(labels, float), dict(rejected))


def _cells_without_images(path: Path, max_pairs: int) -> Iterator[tuple[Mapping[str, pa.Array], int]]:
    """The cells of a batch, and the place of a row in it, for one row after the other."""
    left = count_rows(path, max_pairs=max_pairs)
    for file in files(path):
        table = _open(file)
        wanted = [name for name in schema.columns_to_read(table.schema_arrow, file) if not name.startswith("jpg_")]
        try:
            for batch in table.iter_batches(columns=wanted):
                cells = dict(zip(batch.schema.names, batch.columns, strict=True))
                yield from ((cells, i) for i in range(min(left, batch.num_rows)))
                left -= min(left, batch.num_rows)
        except (pa.ArrowException, OSError) as error:
            check_not_exhausted(error, file)
            raise DataError(printable(f"data.pairs: {file} is damaged: {error}")) from error


def _open(file: Path) -> pq.ParquetFile:
    try:
        # A buffered stream per column: without it a row group's images, gigabytes at times, are read at once.
        return pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        check_not_exhausted(error, file)
        raise DataError(printable(f"data.pairs: {file} cannot be read as parquet: {error}")) from error


def _read_group(
    table: pq.ParquetFile, file: Path, group: int, first: int, start: int, stop: int
) -> Iterator[RawPair | Rejected]:
    """Rows ``start`` to ``stop`` - 1 of the table, which are in one row group; the group begins at row ``first``."""
    row = first
    used = schema.columns_to_read(table.schema_arrow, file)
    folder = schema.image_folder(table.schema_arrow, file)
    try:
        for batch in table.iter_batches(_BATCH_ROWS, row_groups=[group], columns=used):
            cells = dict(zip(batch.schema.names, batch.columns, strict=True))
            for i in range(batch.num_rows):
                if start <= row + i < stop:
                    yield _read_row(cells, i, row + i, folder)
            row += batch.num_rows
            if row >= stop:
                return
    except (pa.ArrowException, OSError) as error:
        check_not_exhausted(error, file)
        raise DataError(printable(f"data.pairs: {file} is damaged near row {row} of the table: {error}")) from error


def _read_row(cells: Mapping[str, pa.Array], i: int, row: int, folder: Path | None) -> RawPair | Rejected:
    cell, uid = _cell_reader(cells, i), f"row-{row}"
    try:
        uids = (cell("image_0_uid"), cell("image_1_uid"))
        uid = "/".join(uids) if all(uids) else uid
        prompt = cell("caption")
        if prompt is None:
            raise Unusable(_NO_CAPTION)
        images = (_image(cell, "0", folder), _image(cell, "1", folder))
        return RawPair(row, uid, prompt, images, label_of(cell), rewards_of(cell, cells))
    except Unusable as error:
        return Rejected(row, uid, str(error))


def _cell_reader(cells: Mapping[str, pa.Array], i: int) -> Callable[[str], Any]:
    """A function from a column's name to the value in row ``i`` of a batch.

    It gives None where the value is null and where the table has no such column, and raises Unusable.
    """

    def cell(name: str) -> Any:
        try:
            return cell_value(cells[name], i) if name in cells else None
        except BadCell as error:
            raise Unusable(f"{name} {error}") from error

    return cell


def _image(cell: Callable[[str], Any], side: str, folder: Path | None) -> bytes:
    name = f"jpg_{side}"
    value = cell(name)
    data = value.get("bytes") if isinstance(value, dict) else value
    path = value.get("path") if isinstance(value, dict) else None
    if data is None and path and isinstance(path, str):
        if folder is None:
            raise Unusable(f"{name} holds no bytes: only the path '{path}'; smpo import stores the images")
        return _image_file(folder, path, name, cell(f"hash_{side}"))
    if not data:
        raise Unusable(f"{name} holds no bytes: it is {'null' if data is None else 'empty'}")
    return data


def _image_file(folder: Path, path: str, name: str, known: int | None) -> bytes:
    try:
        data = read_below(folder, path)
    except BadImage as error:
        raise Unusable(f"{name} {error}") from error
    if known is not None and content_hash(data) != known:
        raise Unusable(f"{name} has changed: '{path}' is not the image that was imported")
    return data
