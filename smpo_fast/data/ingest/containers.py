"""The containers that pairs come in, each read as a stream of records: a record is a mapping from column to value.

parquet, arrow (``save_to_disk`` of Hugging Face's datasets), tar (webdataset), json (an array, or a record a line),
csv, and two layouts of a folder of pictures.  What the columns mean is not asked here (smpo_fast.formats).  A record
that cannot be read takes its place as a ``Problem``.  Nothing is unpickled.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from smpo_fast.data.ingest.folders import _suffixes, _winners_and_losers
from smpo_fast.data.ingest.manifests import _csv, _json
from smpo_fast.data.ingest.records import _DAMAGE, Broken, Place, Problem, Values, _bytes_of
from smpo_fast.data.ingest.tar import _tar

FILES = ("parquet", "arrow", "tar", "json", "csv")
_BATCH_ROWS = 16


def rows(place: Place, container: str, file: str) -> int | None:
    """Number of a file's records, where that is known without reading them."""
    if container != "parquet":
        return None
    try:
        with _bytes_of(place, file) as stream:
            return pq.ParquetFile(stream).metadata.num_rows
    except _DAMAGE:
        return 1  # the record that says so


def read(place: Place, container: str, file: str, columns: Sequence[str] | None) -> Iterator[Values | Problem]:
    """The records of a file in order; ``columns`` saves reading others where the container allows it."""
    reader: Callable[[], Iterator[Values | Problem]] = {
        "parquet": lambda: _parquet(place, file, columns),
        "arrow": lambda: _arrow(place, file, columns),
        "tar": lambda: _tar(place.fs, file),
        "json": lambda: _json(place.fs, file),
        "csv": lambda: _csv(place.fs, file),
        "w-l": lambda: _winners_and_losers(place),
        "suffix": lambda: _suffixes(place),
    }[container]
    try:
        yield from reader()
    except _DAMAGE as error:
        yield Problem(f"damaged: the rest of {posixpath.basename(file)} cannot be read ({error})")


def _parquet(place: Place, file: str, columns: Sequence[str] | None) -> Iterator[Values | Problem]:
    with _bytes_of(place, file) as stream:
        # A buffered stream per column: without it a row group's pictures, gigabytes at times, are read at once.
        table = pq.ParquetFile(stream, pre_buffer=False, buffer_size=1 << 20)
        used = None if columns is None else [name for name in table.schema_arrow.names if name in columns]
        for group in range(table.num_row_groups):
            left = table.metadata.row_group(group).num_rows
            try:
                for batch in table.iter_batches(_BATCH_ROWS, row_groups=[group], columns=used):
                    yield from _rows_of(batch)
                    left -= batch.num_rows
            except _DAMAGE as error:  # each row of the group keeps its number
                reason = Problem(f"damaged: row group {group} of {posixpath.basename(file)} ({error})")
                yield from [reason] * left


def _arrow(place: Place, file: str, columns: Sequence[str] | None) -> Iterator[Values | Problem]:
    with _arrow_stream(place, file) as stream:
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        if is_file:
            table = pa.ipc.open_file(stream)
            batches = (table.get_batch(i) for i in range(table.num_record_batches))
        else:
            batches = iter(pa.ipc.open_stream(stream))
        for batch in batches:
            used = batch.schema.names if columns is None else [n for n in batch.schema.names if n in columns]
            yield from _rows_of(batch.select(used))


@contextmanager
def _arrow_stream(place: Place, file: str) -> Iterator[Any]:
    """On disk the file is mapped, so that a batch of a thousand pictures is not in memory at once."""
    if place.local:
        with pa.memory_map(file) as mapped:
            yield mapped
    else:
        with place.fs.open(file, "rb") as stream:
            yield stream


def _rows_of(batch: pa.RecordBatch) -> Iterator[Values]:
    cells = list(zip(batch.schema.names, batch.columns, strict=True))
    for i in range(batch.num_rows):
        yield {name: _cell(column, i) for name, column in cells}


def _cell(column: pa.Array, i: int) -> Any:
    try:
        return column[i].as_py()
    except UnicodeDecodeError as error:
        return Broken(f"not UTF-8 text: {error.reason}")
