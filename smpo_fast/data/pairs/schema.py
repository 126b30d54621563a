"""The pair table on disk: its columns and their types, as they are accepted and as they are written.

``data.pairs`` may name a table by other programs, whose column types are checked here. A table written by
``smpo import`` has fixed types, and with ``--paths`` its metadata says in which folder the images are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from smpo_fast.common.console import printable
from smpo_fast.common.errors import DataError
from smpo_fast.data.pairs import summary
from smpo_fast.data.pairs.rules import LABEL_COLUMNS, REWARD_COLUMNS

REJECTED_FILE = "rejected.parquet"  # beside the parts of an imported table
REJECTED_SCHEMA = pa.schema([("row", pa.int64()), ("uid", pa.string()), ("reason", pa.string())])
_IMAGE_FOLDER_KEY = b"smpo_fast.pictures"  # metadata: [absolute folder, the same relative to the table]


def table_schema(out: Path, image_folder: str = "") -> pa.Schema:
    """Columns of a table that is written to ``out``.

    image_folder: the folder that the images' paths start from, where paths are stored instead of bytes.
    """
    image = pa.binary() if not image_folder else pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    kinds = {
        "caption": pa.string(), "jpg_0": image, "jpg_1": image, "label_0": pa.float32(),
        "reward_0": pa.float64(), "reward_1": pa.float64(), "image_0_uid": pa.string(), "image_1_uid": pa.string(),
        "source_row": pa.int64(), "hash_0": pa.uint64(), "hash_1": pa.uint64(),
        "width_0": pa.int32(), "height_0": pa.int32(), "width_1": pa.int32(), "height_1": pa.int32(),
    }  # fmt: skip
    if not image_folder:
        return pa.schema(kinds)
    absolute = os.path.realpath(image_folder)
    places = [absolute, os.path.relpath(absolute, os.path.realpath(out))]
    return pa.schema(kinds, metadata={_IMAGE_FOLDER_KEY: json.dumps(places).encode()})


def stores_paths(schema: pa.Schema) -> bool:
    """Whether a table says that its images are files in a folder."""
    return _IMAGE_FOLDER_KEY in (schema.metadata or {})


def image_folder(schema: pa.Schema, file: Path) -> Path | None:
    """The folder that the paths of an imported table start from; None where images are stored as bytes.

    Either the folder at the time of the import or, where table and images were moved together, the folder in the
    same place relative to the table. A table is data and may come from anywhere, so a folder outside the table's own
    must be the one that the summary of ``smpo import`` beside the table names, and is never the root of a file system.
    Raises DataError if the folder does not exist or is not allowed, and for damaged metadata.
    """
    if not stores_paths(schema):
        return None
    try:
        absolute, relative = (str(place) for place in json.loads(schema.metadata[_IMAGE_FOLDER_KEY]))
    except (ValueError, TypeError) as error:
        raise DataError(printable(f"data.pairs: {file} has damaged metadata ({error}): import again")) from error
    table = file.resolve().parent
    places = (Path(absolute), Path(os.path.normpath(table / relative)))
    for place in places:
        if place.is_dir():
            _check_allowed(place.resolve(), absolute, table, file)
            return place
    raise DataError(
        printable(f"data.pairs: {file} stores paths of images in {places[0]}, which does not exist: import again")
    )


def _check_allowed(place: Path, imported_from: str, table: Path, file: Path) -> None:
    if place.is_relative_to(table):
        return
    if place == Path(place.anchor) or imported_from != summary.image_folder(table):
        raise DataError(
            printable(
                f"data.pairs: {file} stores paths of images in {place}, but no {summary.SUMMARY_FILE} beside it says "
                "that smpo import was given that folder: images are not read from it; import again with --paths"
            )
        )


def columns_to_read(schema: pa.Schema, file: Path) -> list[str]:
    """Names of the columns in use. Raises DataError for a missing column and for one of a wrong type."""
    there = set(schema.names)

    def require(name: str, is_right: Callable[[pa.DataType], bool], wanted: str) -> str:
        if name not in there:
            raise DataError(
                printable(f"data.pairs: {file} has no column '{name}'; its columns are {', '.join(schema.names)}")
            )
        if not is_right(schema.field(name).type):
            raise DataError(
                printable(f"data.pairs: {file}: column '{name}' holds {schema.field(name).type} instead of {wanted}")
            )
        return name

    used = [require("caption", _is_text, "text")]
    used += [require(name, _is_image, "bytes of an encoded image") for name in ("jpg_0", "jpg_1")]
    used += [require(name, _is_number, "a number") for name in LABEL_COLUMNS if name in there]
    for names in REWARD_COLUMNS:
        if there.intersection(names):
            used += [require(name, _is_reward, "a number") for name in names]
            break
    used += [name for name in ("image_0_uid", "image_1_uid") if name in there and _is_text(schema.field(name).type)]
    if stores_paths(schema):
        used += [name for name in ("hash_0", "hash_1") if name in there]
    return used


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_image(kind: pa.DataType) -> bool:
    """Bytes, or the struct {bytes, path} that Hugging Face's Image feature is stored as."""
    if not pa.types.is_struct(kind):
        return _is_bytes(kind)
    return any(field.name == "bytes" and _is_bytes(field.type) for field in kind)


def _is_number(kind: pa.DataType) -> bool:
    return any(
        is_kind(kind) for is_kind in (pa.types.is_floating, pa.types.is_integer, pa.types.is_boolean, pa.types.is_null)
    )


def _is_reward(kind: pa.DataType) -> bool:
    """A number, or a list of one as the authors' scoring script writes it."""
    return _is_number(kind.value_type) if pa.types.is_list(kind) or pa.types.is_large_list(kind) else _is_number(kind)
