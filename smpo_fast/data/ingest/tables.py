"""Records of parquet and arrow files."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from smpo_fast.common.errors import check_not_exhausted
from smpo_fast.data.cells import BadCell, cell_value
from smpo_fast.data.ingest.records import DAMAGE_ERRORS, Cells, UnreadableCell, UnreadableRecord
from smpo_fast.data.ingest.source_folder import SourceFolder, open_for_arrow

_BATCH_ROWS = 16


def count_parquet_rows(folder: SourceFolder, file: str) -> int:
    """Number of records that ``read_parquet`` gives. Raises EnvironmentProblem like ``containers.read_records``."""
    try:
        with open_for_arrow(folder, file) as stream:
            return pq.ParquetFile(stream).metadata.num_rows
    except DAMAGE_ERRORS as error:
        check_not_exhausted(error, file)
        return 1  # the UnreadableRecord that says so


def read_parquet(folder: SourceFolder, file: str, columns: Sequence[str] | None) -> Iterator[Cells | UnreadableRecord]:
    """The rows of a parquet file; of the given columns only, unless that is None.

    Raises EnvironmentProblem likewise.
    """
    with open_for_arrow(folder, file) as stream:
        # A buffered stream per column: without it a row group's images, gigabytes at times, are read at once.
        table = pq.ParquetFile(stream, pre_buffer=False, buffer_size=1 << 20)
        used = None if columns is None else [name for name in table.schema_arrow.names if name in columns]
        for group in range(table.num_row_groups):
            left = table.metadata.row_group(group).num_rows
            try:
                for batch in table.iter_batches(_BATCH_ROWS, row_groups=[group], columns=used):
                    yield from _rows_of(batch)
                    left -= batch.num_rows
            except DAMAGE_ERRORS as error:
                check_not_exhausted(error, file)
                # one for each row, so that later rows keep their numbers
                reason = UnreadableRecord(f"damaged: row group {group} of {posixpath.basename(file)} ({error})")
                yield from [reason] * left


def read_arrow(folder: SourceFolder, file: str, columns: Sequence[str] | None) -> Iterator[Cells | UnreadableRecord]:
    """The rows of an arrow file or stream; of the given columns only, unless that is None."""
    with _open_arrow(folder, file) as stream:
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        if is_file:
            table = pa.ipc.open_file(stream)
            batches = (table.get_batch(i) for i in range(table.num_record_batches))
        else:
            batches = iter(pa.ipc.open_stream(stream))
        for batch in batches:
            used = batch.schema.names if columns is None else [n for n in batch.schema.names if n in columns]
            chosen = batch.select(used)
            chosen.validate(full=True)  # arrow takes offsets and lengths on trust: wrong ones end the process
            yield from _rows_of(chosen)


@contextmanager
def _open_arrow(folder: SourceFolder, file: str) -> Iterator[Any]:
    """On disk the file is mapped, so that a batch of a thousand images is not in memory at once."""
    if folder.local:
        with pa.memory_map(file) as mapped:
            yield mapped
    else:
        with folder.fs.open(file, "rb") as stream:
            yield stream


def _rows_of(batch: pa.RecordBatch) -> Iterator[Cells]:
    columns = list(zip(batch.schema.names, batch.columns, strict=True))
    for i in range(batch.num_rows):
        yield {name: _cell(column, i) for name, column in columns}


def _cell(column: pa.Array, i: int) -> Any:
    try:
        return cell_value(column, i)
    except BadCell as error:
        return UnreadableCell(str(error))
