"""Raw preference pairs from a parquet file: bytes, prompt, label, rewards.

Columns are those of Pick-a-Pic v2 (docs/data.md).  ``smpo import`` writes such a table from anything else; it may
hold paths in place of the pictures' bytes, which are then read below one folder and nowhere else.  A row that cannot
be used becomes a ``Rejected`` with its number and the reason, in its place among the others: reading never stops at
a row and never shifts one.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import stat
import struct
import zlib
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from smpo_fast import embedded
from smpo_fast.config import EMBEDDED, SettingsError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
IMPORT_INFO, REJECTED_FILE = "import.json", "rejected.parquet"  # beside the parts of an imported table
PICTURES_KEY = b"smpo_fast.pictures"  # in a table's metadata: the folder that its paths start from
MAX_FILE_BYTES = 256 << 20
MAX_PIXELS = 80_000_000  # a bomb of a few kB can decode to gigabytes; real pictures stay far below this
MIN_SIDE = 8  # px; one latent pixel of the VAE: smaller pictures are broken downloads and placeholders
MAX_ASPECT = 4  # beyond it a picture is cropped before it is resized, which bounds the memory
REWARD_COLUMNS = (("reward_0", "reward_1"), ("ps_score_0", "ps_score_1"))
LABEL_COLUMNS = ("label_0", "label_1")
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_BATCH_ROWS = 16
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class RawPair:
    """One usable row of the table, not yet decoded."""

    row: int  # counted from 0 over the whole table
    uid: str
    prompt: str
    images: tuple[bytes, bytes]
    label: float | None  # 1: picture 0 is preferred, 0: picture 1, 0.5: a tie; None: no human label
    rewards: tuple[float, float] | None  # None: not scored


@dataclass(frozen=True)
class Rejected:
    """A row that cannot be used. ``reason`` is 'what: detail', and counts are kept by what."""

    row: int
    uid: str
    reason: str


class Unusable(Exception):
    """Why a row cannot be used: 'what: detail'."""


class BadPicture(ValueError):
    """Bytes that do not decode to a usable picture; the message is 'what: detail'."""


def source_path(pairs: str) -> Path:
    """The file or folder that ``data.pairs`` names; raises SettingsError when it is not there."""
    path = embedded.pairs_path() if pairs == EMBEDDED else Path(pairs).expanduser()
    if not path.exists():
        raise SettingsError(f"data.pairs: {path} does not exist; give 'embedded', a parquet file or a folder of them")
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
        raise SettingsError(f"data.pairs: the folder {path} holds no *.parquet file")
    return found


def _imported_parts(path: Path) -> list[Path]:
    try:
        parts = [path / str(part["name"]) for part in json.loads((path / IMPORT_INFO).read_text())["parts"]]
    except (ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"data.pairs: {path / IMPORT_INFO} is damaged ({error}): import again") from error
    missing = next((part for part in parts if not part.is_file()), None)
    if missing:
        raise SettingsError(f"data.pairs: {missing} is gone, but {IMPORT_INFO} names it: import again")
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


def decode(data: bytes) -> Image.Image:
    """An upright RGB picture from JPEG, PNG, WebP, BMP or GIF bytes (of an animation the first frame).

    Transparency is laid over white, 16 bits are scaled to 8, the EXIF orientation is applied.  Raises BadPicture
    for bytes that are no such picture, truncated ones, more than MAX_PIXELS, or a side below MIN_SIDE px.
    """
    image = _opened(data)
    try:
        image.load()
        return _upright(_to_rgb(image), _orientation(image))
    except DECODE_ERRORS as error:
        raise BadPicture(f"cannot be decoded: {error}") from error


def sniff(data: bytes) -> tuple[int, int]:
    """Width and height as a picture's header states them, without decoding it; raises BadPicture like ``decode``."""
    return _opened(data).size


def content_hash(data: bytes) -> int:
    """64 bits of an encoded picture or text: what tells those of a table apart."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def read_inside(folder: Path, name: str, fence: Path | None = None) -> bytes:
    """The bytes of the file ``name`` below ``folder``; raises BadPicture where they are not to be had.

    A path or symbolic link that leaves ``fence`` (default: the folder) is refused, and so is what is no regular
    file or larger than MAX_FILE_BYTES.
    """
    if "\0" in name:
        raise BadPicture("leaves its folder: a path with a null character")
    path = Path(os.path.realpath(folder / name))
    if not path.is_relative_to(os.path.realpath(fence or folder)):
        raise BadPicture(f"leaves its folder: '{name}' is not below {fence or folder}")
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise BadPicture(f"no file: '{name}' is a folder or a device")
        if facts.st_size > MAX_FILE_BYTES:
            raise BadPicture(f"too large: '{name}' has {facts.st_size >> 20} MB, the limit is {MAX_FILE_BYTES >> 20}")
        return path.read_bytes()
    except OSError as error:
        raise BadPicture(f"no file: '{name}' cannot be read ({error.strerror})") from error


def _opened(data: bytes) -> Image.Image:
    """A picture of which the header is read; raises BadPicture for what is none and for sizes out of bounds."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        raise BadPicture(f"not a picture: {len(data)} bytes that are none of {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise BadPicture(f"too large: {error}") from error
    except DECODE_ERRORS as error:
        raise BadPicture(f"cannot be decoded: {error}") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadPicture(f"too large: {width}x{height} px, the limit is {MAX_PIXELS / 1e6:g} million")
    if min(width, height) < MIN_SIDE:
        raise BadPicture(f"too small: {width}x{height} px, the shorter side must have {MIN_SIDE}")
    return image


def _open(file: Path) -> pq.ParquetFile:
    try:
        # A buffered stream per column: without it a row group's pictures, gigabytes at times, are read at once.
        return pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
    except (pa.ArrowException, OSError) as error:
        raise SettingsError(f"data.pairs: {file} cannot be read as parquet: {error}") from error


def _used_columns(schema: pa.Schema, file: Path) -> list[str]:
    """Names of the columns to read; raises SettingsError for a missing one or a wrong type."""
    there = set(schema.names)

    def require(name: str, is_right: Callable[[pa.DataType], bool], wanted: str) -> str:
        if name not in there:
            raise SettingsError(f"data.pairs: {file} has no column '{name}'; its columns are {', '.join(schema.names)}")
        if not is_right(schema.field(name).type):
            raise SettingsError(
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
        raise SettingsError(f"data.pairs: {file} is damaged near row {row} of the table: {error}") from error


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
    raise SettingsError(f"data.pairs: {file} names pictures below {places[0]}, which is gone: import again")


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
    except BadPicture as error:
        raise Unusable(f"{name} {error}") from error
    if known is not None and content_hash(data) != known:
        raise Unusable(f"{name} has changed: '{path}' is not the picture that was imported")
    return data


def label_of(cell: Callable[[str], Any]) -> float | None:
    """The share of picture 0 in the preference; null and NaN both mean that nobody was asked.

    cell: the number in a column of LABEL_COLUMNS, or None.  Raises Unusable.
    """
    values = []
    for name in LABEL_COLUMNS:
        value = _number(cell(name))
        if value is not None and not 0 <= value <= 1:
            raise Unusable(f"label outside 0 to 1: {name} = {value:g}")
        values.append(value)
    zero, one = values
    if zero is None:
        return None if one is None else 1 - one
    if one is not None and abs(zero + one - 1) > 1e-3:
        raise Unusable(f"labels contradict each other: label_0 = {zero:g}, label_1 = {one:g}")
    return zero


def rewards_of(cell: Callable[[str], Any], there: Container[str]) -> tuple[float, float] | None:
    """The pair's scores from the first of REWARD_COLUMNS that is ``there``; None: not scored. Raises Unusable."""
    names = next((names for names in REWARD_COLUMNS if names[0] in there), None)
    if names is None:
        return None
    values = [_number(_only(cell(name), name)) for name in names]
    for name, value in zip(names, values, strict=True):
        if value is not None and math.isinf(value):
            raise Unusable(f"reward is not finite: {name} = {value}")
    zero, one = values
    if zero is None and one is None:
        return None
    if zero is None or one is None:
        missing = names[0] if zero is None else names[1]
        raise Unusable(f"one reward of two: {missing} is null or NaN, so the other has nothing to be compared with")
    return zero, one


def _only(value: Any, name: str) -> Any:
    if not isinstance(value, list):
        return value
    if len(value) > 1:
        raise Unusable(f"more than one reward: {name} is a list of {len(value)}")
    return value[0] if value else None


def _number(value: Any) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: convert() would clip it to white
        grey = np.asarray(image).astype(np.float32) / 257
        return Image.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except DECODE_ERRORS:  # broken notes about a picture do not make the picture unusable
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)
