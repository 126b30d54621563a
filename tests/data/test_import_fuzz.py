"""Values of any type in every column: an import or a reading ends with a table or a UserError, never a traceback."""

from __future__ import annotations

import csv
import decimal
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.images import noise
from helpers.import_sources import chosen_table, tar_letters
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smpo_fast.common.errors import UserError
from smpo_fast.config.commands import ImportOptions
from smpo_fast.data.ingest.importer import import_pairs
from smpo_fast.data.pairs.reader import read_pairs

GOOD: dict[str, dict[str, Any]] = {
    "pairs": {
        "prompt": "p", "image_0": "w.png", "image_1": "l.png", "label_0": 1, "label_1": 0,
        "reward_0": 1.0, "reward_1": 0.5, "image_0_uid": "u", "image_1_uid": "v",
    },
    "chosen": {"prompt": "p", "chosen": "w.png", "rejected": "l.png"},
    "ranking": {"prompt": "p", "images": ["w.png", "l.png"], "rank": [1, 2], "scores": [0.5, 0.4]},
    "single": {"prompt": "p", "image": "w.png", "label": 1, "score": 0.1},
}  # fmt: skip
TEXTS = [
    "w.png",
    "l.png",
    "[1, 2]",
    "[[",
    "..",
    "/etc/passwd",
    "a\0b",
    "\ud800",
    "true",
    "http://x/y",
    "\x1b[2J",
    "inf",
]
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TYPES = [
    pa.timestamp("ns"), pa.timestamp("us", "UTC"), pa.duration("ns"), pa.time64("ns"), pa.date64(), pa.float16(),
    pa.decimal128(38, 10), pa.list_(pa.list_(pa.float64())), pa.list_(pa.timestamp("ns")), pa.list_(pa.int64(), 2),
    pa.map_(pa.string(), pa.int64()), pa.struct([("bytes", pa.timestamp("ns")), ("path", pa.string())]),
    pa.struct([("bytes", pa.binary()), ("path", pa.timestamp("ns"))]), STRUCT, pa.list_(STRUCT), pa.list_(pa.binary()),
    pa.struct([("bytes", pa.binary()), ("path", pa.int64())]), pa.binary(), pa.large_binary(), pa.binary(4),
    pa.string(), pa.bool_(), pa.null(), pa.uint64(), pa.month_day_nano_interval(),
    pa.dictionary(pa.int32(), pa.string()),
]  # fmt: skip
QUICK = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(TEXTS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["bytes", "path"]), inner, max_size=2),
    max_leaves=5,
)


@st.composite
def odd_records(draw: st.DrawFn) -> tuple[str, list[dict[str, Any]]]:
    """A format, and records of it of which most have some value of another type."""
    form = draw(st.sampled_from(list(GOOD)))
    records = [GOOD[form]]
    for _ in range(draw(st.integers(1, 4))):
        columns = draw(st.lists(st.sampled_from(list(GOOD[form])), min_size=1, max_size=3))
        records.append({**GOOD[form], **{column: draw(json_values) for column in columns}})
    return form, draw(st.permutations(records))


@st.composite
def odd_tables(draw: st.DrawFn) -> tuple[str, pa.Table]:
    """A format, and a table of it in which some columns have another type."""
    form = draw(st.sampled_from(list(GOOD)))
    odd = draw(st.lists(st.sampled_from(list(GOOD[form])), min_size=1, max_size=3))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    columns = {name: pa.array([value] * 3) for name, value in GOOD[form].items()}
    columns |= {name: odd_column(draw(st.sampled_from(TYPES)), rng) for name in odd}
    return form, pa.table(columns)


def odd_column(kind: pa.DataType, rng: np.random.Generator) -> pa.Array:
    if pa.types.is_date(kind) or pa.types.is_temporal(kind) and not pa.types.is_interval(kind):
        return pa.array(rng.integers(0, 2**62, 3)).cast(kind) if kind.bit_width == 64 else pa.nulls(3, kind)
    return pa.array([odd_value(kind, rng) for _ in range(3)], kind)


def odd_value(kind: pa.DataType, rng: np.random.Generator) -> Any:
    if rng.random() < 0.15 or pa.types.is_null(kind):
        return None
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        return [odd_value(kind.value_type, rng) for _ in range(2)]
    if pa.types.is_struct(kind):
        return {field.name: odd_value(field.type, rng) for field in kind}
    made: list[tuple[Callable[[pa.DataType], bool], Callable[[], Any]]] = [
        (pa.types.is_map, lambda: [("a", 1)]),
        (pa.types.is_decimal, lambda: decimal.Decimal(int(rng.integers(100)))),
        (pa.types.is_fixed_size_binary, lambda: bytes(4)),
        (lambda k: pa.types.is_binary(k) or pa.types.is_large_binary(k), lambda: noise(int(rng.integers(9)))),
        (pa.types.is_boolean, lambda: True),
        (lambda k: pa.types.is_string(k) or pa.types.is_dictionary(k), lambda: str(rng.choice(["w.png", "1", ""]))),
        (pa.types.is_interval, lambda: pa.MonthDayNano([1, 2, 3])),
        (pa.types.is_floating, lambda: np.float16(rng.random())),
    ]
    return next((make() for is_kind, make in made if is_kind(kind)), int(rng.integers(2**62)))


def try_import(source: Path, form: str) -> None:
    """Import a source with images beside it; only a UserError may escape."""
    for name, seed in (("w.png", 1), ("l.png", 2)):
        (source.parent / name).write_bytes(noise(seed))
    out = source.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    try:
        import_pairs(str(source), out, ImportOptions(format=form, pairs="all"))
    except UserError as error:
        assert "Traceback" not in str(error)


@QUICK
@given(odd_records())
def test_values_of_any_type_in_manifests(tmp_path_factory: pytest.TempPathFactory, case: Any) -> None:
    form, records = case
    folder = tmp_path_factory.mktemp("in")
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    (folder / "a.json").write_text(json.dumps(records))
    with (folder / "a.csv").open("w", newline="", errors="surrogatepass") as stream:
        rows = csv.DictWriter(stream, list(GOOD[form]))
        rows.writeheader()
        for record in records:
            rows.writerow({k: json.dumps(v) if isinstance(v, (list, dict)) else v for k, v in record.items()})
    for name in ("a.jsonl", "a.json", "a.csv"):
        try_import(folder / name, form)


@QUICK
@given(odd_tables())
def test_columns_of_any_type_in_tables(tmp_path_factory: pytest.TempPathFactory, case: Any) -> None:
    form, table = case
    folder = tmp_path_factory.mktemp("in")
    try:
        pq.write_table(table, folder / "a.parquet")
    except pa.ArrowNotImplementedError:  # a type that parquet has no column for
        return
    with pa.ipc.new_stream(folder / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    try_import(folder / "a.parquet", form)
    try_import(folder / "a.arrow", form)
    renamed = {"prompt": "caption", "image_0": "jpg_0", "image_1": "jpg_1"}
    pq.write_table(table.rename_columns([renamed.get(c, c) for c in table.column_names]), folder / "pairs.parquet")
    try:
        list(read_pairs(folder / "pairs.parquet"))
    except UserError:
        pass


@pytest.mark.parametrize("kind", [pa.timestamp("ns"), pa.list_(pa.timestamp("ns")), pa.date64()])
def test_a_cell_without_a_python_value_is_rejected_by_row(tmp_path: Path, kind: pa.DataType) -> None:
    """A timestamp with nanoseconds, a date beyond the year 9999."""
    times = pa.array([2**62 + 1, None], pa.int64()).cast(kind if not pa.types.is_list(kind) else kind.value_type)
    values = pa.array([[times[0]], None], kind) if pa.types.is_list(kind) else times
    table = pa.table({"caption": ["p", "q"], "jpg_0": [noise(1)] * 2, "jpg_1": [noise(2)] * 2, "label_0": values})
    pq.write_table(table, tmp_path / "a.parquet")
    assert import_pairs(str(tmp_path / "a.parquet"), tmp_path / "out", ImportOptions())["rejected"] == {
        "label_0 cannot be read": 1
    }


def test_a_path_that_is_no_text_is_no_image(tmp_path: Path) -> None:
    """In a table of pairs only the type of an image struct's bytes is checked."""
    for kind in (pa.timestamp("ns"), pa.int64()):
        struct = pa.struct([("bytes", pa.binary()), ("path", kind)])
        cells = pa.StructArray.from_arrays(
            [pa.nulls(1, pa.binary()), pa.array([2**62 + 1]).cast(kind)], fields=list(struct)
        )
        table = pa.table({"caption": ["p"], "jpg_0": cells, "jpg_1": [noise(1)], "label_0": [1.0]})
        pq.write_table(table, tmp_path / "a.parquet")
        (row,) = read_pairs(tmp_path / "a.parquet")
        assert "jpg_0" in getattr(row, "reason", "")


@pytest.mark.parametrize("depth", [200_000])
def test_json_that_is_nested_too_deeply_is_rejected(tmp_path: Path, depth: int) -> None:
    good = json.dumps(GOOD["chosen"])
    deep = '{"prompt": ' + "[" * depth + "]" * depth + "}"
    for name, text in (("a.jsonl", f"{good}\n{deep}\n{good}"), ("a.json", f"[{good}, {deep}, {good}]")):
        (tmp_path / name).write_text(text)
        try_import(tmp_path / name, "chosen")
        rejected = pq.read_table(tmp_path / "out" / "rejected.parquet").to_pylist()
        assert rejected[0]["row"] == 1 and "nested too deeply" in rejected[0]["reason"]


def test_flipped_bytes_in_any_container(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pq.write_table(chosen_table(), tmp_path / "good.parquet")
    with pa.ipc.new_stream(tmp_path / "good.arrow", chosen_table().schema) as writer:
        writer.write_table(chosen_table())
    tar_letters(tmp_path).rename(tmp_path / "good.tar")
    for name in ("good.parquet", "good.tar"):
        good = np.frombuffer((tmp_path / name).read_bytes(), np.uint8)
        for trial in range(12):
            broken = good.copy()
            broken[rng.integers(0, len(broken), rng.integers(1, 6))] = rng.integers(0, 256)
            cut = len(broken) if trial % 3 else int(rng.integers(1, len(broken)))
            (tmp_path / f"broken-{name}").write_bytes(broken[:cut].tobytes())
            try_import(tmp_path / f"broken-{name}", "")
