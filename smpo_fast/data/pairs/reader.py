"""Raw preference pairs from a parquet file: bytes, prompt, label, rewards.

Columns are those of Pick-a-Pic v2 (docs/data.md).  ``smpo import`` writes such a table from anything else; it may
hold paths in place of the pictures' bytes, which are then read below one folder and nowhere else.  A row that cannot
be used becomes a ``Rejected`` with its number and the reason, in its place among the others: reading never stops at
a row and never shifts one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from smpo_fast import embedded
from smpo_fast.common.errors import UserError
from smpo_fast.config.schema import EMBEDDED
from smpo_fast.data.images import BadImage, content_hash, read_inside
from smpo_fast.data.pairs.rules import LABEL_COLUMNS, REWARD_COLUMNS, Unusable, label_of, rewards_of
from smpo_fast.data.pairs.schema import PICTURES_KEY, RawPair, Rejected

IMPORT_INFO, REJECTED_FILE = "import.json", "rejected.parquet"  # beside the parts of an imported table
_BATCH_ROWS = 16


def source_path(pairs: str) -> Path:
    """The file or folder that ``data.pairs`` names; raises SettingsError when it is not there."""
    path = embedded.pairs_path() if pairs == EMBEDDED else Path(pairs).expanduser()
    if not path.exists():
        raise UserError(f"data.pairs: {path} does not exist; give 'embedded', a parquet file or a folder of them")
    return path


def files(path: Path) -> list[Path]:
    """The parquet files of a table: the file itself, or a folder's in the order of their names.

    Of a folder that ``smpo import`` made, the parts that its summary names; raises SettingsError where one is gone.
    """
    if not path.is_dir():
        return [path]
    if (path / IMPORT_INFO).is_file():
        return _imported_parts(path)
    found = sorted(file for file in path.glob("*.parquet") if file.name != REJECTED_FILE)
    if not found:
        raise UserError(f"data.pairs: the folder {path} holds no *.parquet file")
    return found


def _imported_parts(path: Path) -> list[Path]:
    try:
        parts = [path / str(part["name"]) for part in json.loads((path / IMPORT_INFO).read_text())["parts"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"data.pairs: {path / IMPORT_INFO} is damaged ({error}): import again") from error
    missing = next((part for part in parts if not part.is_file()), None)
    if missing:
        raise UserError(f"data.pairs: {missing} is gone, but {IMPORT_INFO} names it: import again")
    return parts


def columns(path: Path) -> set[str]:
    """Names of the columns in use, after checking all files of the table; raises SettingsError like read_pairs."""
    return set.intersection(*(set(_used_columns(_open(file).schema_arrow, file)) for file in files(path)))


def count_rows(path: Path, *, max_pairs: int = 0) -> int:
    """How many rows read_pairs will give, usable or not."""
    rows = sum(_open(file).metadata.num_rows for file in files(path))
    return min(rows, max_pairs) if max_pairs else rows


def read_pairs(path: Path, *, max_pairs: int = 0, start: int = 0) -> Iterator[RawPair | Rejected]:
    """The rows ``start`` .. of a table in order, the first ``max_pairs`` rows only if that is not 0.

    Memory is bounded by a page of each column, whatever the size of the file.  Raises SettingsError, before the
    first row, for a file that is not parquet and for a missing column or one of a wrong type (naming file and
    column), and where the file itself is damaged further down.
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


def _open(file: Path) -> pq.ParquetFile:
    try:
        # A buffered stream per column: without it a row group's pictures, gigabytes at times, are read at once.
        return pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"data.pairs: {file} cannot be read as parquet: {error}") from error


def _used_columns(schema: pa.Schema, file: Path) -> list[str]:
    """Names of the columns to read; raises SettingsError for a missing one or a wrong type."""
    there = set(schema.names)

    def require(name: str, is_right: Callable[[pa.DataType], bool], wanted: str) -> str:
        if name not in there:
            raise UserError(f"data.pairs: {file} has no column '{name}'; its columns are {', '.join(schema.names)}")
        if not is_right(schema.field(name).type):
            raise UserError(
                f"data.pairs: {file}: column '{name}' holds {schema.field(name).type}; {wanted} would be right"
            )
        return name

    used = [require("caption", _is_text, "text")]
    used += [require(name, _is_picture, "bytes of an encoded picture") for name in ("jpg_0", "jpg_1")]
    used += [require(name, _is_number, "a number") for name in LABEL_COLUMNS if name in there]
    for names in REWARD_COLUMNS:
        if there.intersection(names):
            used += [require(name, _is_score, "a number") for name in names]
            break
    used += [name for name in ("image_0_uid", "image_1_uid") if name in there and _is_text(schema.field(name).type)]
    if PICTURES_KEY in (schema.metadata or {}):
        used += [name for name in ("hash_0", "hash_1") if name in there]
    return used


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_picture(kind: pa.DataType) -> bool:
    """Bytes, or the struct {bytes, path} that Hugging Face's Image feature is stored as."""
    if not pa.types.is_struct(kind):
        return _is_bytes(kind)
    return any(field.name == "bytes" and _is_bytes(field.type) for field in kind)


def _is_number(kind: pa.DataType) -> bool:
    return any(
        is_kind(kind) for is_kind in (pa.types.is_floating, pa.types.is_integer, pa.types.is_boolean, pa.types.is_null)
    )


def _is_score(kind: pa.DataType) -> bool:
    """A number, or a list of one as the authors' scoring script writes it."""
    return _is_number(kind.value_type) if pa.types.is_list(kind) or pa.types.is_large_list(kind) else _is_number(kind)


def _read_group(
    table: pq.ParquetFile, file: Path, group: int, first: int, start: int, stop: int
) -> Iterator[RawPair | Rejected]:
    """Rows start .. stop-1 of the table that lie in one row group, which begins at row ``first``."""
    row = first
    used = _used_columns(table.schema_arrow, file)
    folder = _pictures_folder(table.schema_arrow, file)
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
        raise UserError(f"data.pairs: {file} is damaged near row {row} of the table: {error}") from error


def _pictures_folder(schema: pa.Schema, file: Path) -> Path | None:
    """Where the paths of an imported table start: the folder as it was then, or where it is seen from the table."""
    found = (schema.metadata or {}).get(PICTURES_KEY)
    if found is None:
        return None
    absolute, relative = json.loads(found)
    places = (Path(absolute), Path(os.path.normpath(file.resolve().parent / relative)))
    for place in places:
        if place.is_dir():
            return place
    raise UserError(f"data.pairs: {file} names pictures below {places[0]}, which is gone: import again")


def _read_row(cells: Mapping[str, pa.Array], i: int, row: int, folder: Path | None) -> RawPair | Rejected:
    def cell(name: str) -> Any:
        """The value in this row; None where it is null or there is no such column."""
        try:
            return cells[name][i].as_py() if name in cells else None
        except UnicodeDecodeError as error:
            raise Unusable(f"{name} is not UTF-8 text: {error.reason}") from error

    uid = f"row-{row}"
    try:
        uids = (cell("image_0_uid"), cell("image_1_uid"))
        uid = "/".join(uids) if all(uids) else uid
        prompt = cell("caption")
        if prompt is None:
            raise Unusable("no caption: it is null (an empty one is allowed)")
        images = (_picture(cell, "0", folder), _picture(cell, "1", folder))
        return RawPair(row, uid, prompt, images, label_of(cell), rewards_of(cell, cells))
    except Unusable as error:
        return Rejected(row, uid, str(error))


def _picture(cell: Callable[[str], Any], side: str, folder: Path | None) -> bytes:
    name = f"jpg_{side}"
    value = cell(name)
    data = value.get("bytes") if isinstance(value, dict) else value
    path = value.get("path") if isinstance(value, dict) else None
    if data is None and path:
        if folder is None:
            raise Unusable(f"{name} holds no bytes: only the path '{path}'; smpo import stores the pictures")
        return _picture_file(folder, path, name, cell(f"hash_{side}"))
    if not data:
        raise Unusable(f"{name} holds no bytes: it is {'null' if data is None else 'empty'}")
    return data


def _picture_file(folder: Path, path: str, name: str, known: int | None) -> bytes:
    try:
        data = read_inside(folder, path)
    except BadImage as error:
        raise Unusable(f"{name} {error}") from error
    if known is not None and content_hash(data) != known:
        raise Unusable(f"{name} has changed: '{path}' is not the picture that was imported")
    return data
