"""Reading a pair table: every row comes out once, in its place, used or rejected with a reason."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.images import noise
from helpers.paths import SAMPLES, needs_samples
from PIL import Image

from smpo_fast.common.errors import DataError, UserError
from smpo_fast.data.aspect_buckets import fit
from smpo_fast.data.images import BadImage, decode
from smpo_fast.data.pairs import reader
from smpo_fast.data.pairs.pair import RawPair, Rejected
from smpo_fast.data.pairs.reader import read_pairs


def to_square(image: Image.Image, resolution: int) -> np.ndarray:
    return fit(image, (resolution, resolution))[0]


def table(path: Path, rows: int = 5, row_group_size: int = 2, **columns: list) -> Path:
    """A parquet file of good pairs, with some columns replaced or added (None: left out)."""
    values = {
        "caption": [f"prompt {i}" for i in range(rows)],
        "jpg_0": [noise(2 * i) for i in range(rows)],
        "jpg_1": [noise(2 * i + 1) for i in range(rows)],
        "label_0": [float(i % 2) for i in range(rows)],
    } | columns
    pq.write_table(pa.table({k: v for k, v in values.items() if v is not None}), path, row_group_size=row_group_size)
    return path


def reasons(path: Path) -> dict[int, str]:
    return {item.row: item.reason for item in read_pairs(path) if isinstance(item, Rejected)}


def test_rows_come_in_order_over_row_groups(tmp_path: Path) -> None:
    pairs = list(read_pairs(table(tmp_path / "a.parquet", 5)))
    assert [p.row for p in pairs] == [0, 1, 2, 3, 4]
    assert all(isinstance(p, RawPair) for p in pairs)
    assert pairs[3] == RawPair(3, "row-3", "prompt 3", (noise(6), noise(7)), 1.0, None)


@pytest.mark.parametrize(
    ("start", "limit", "rows"), [(0, 3, [0, 1, 2]), (2, 0, [2, 3, 4, 5, 6]), (3, 5, [3, 4]), (6, 6, [])]
)
def test_start_and_limit_count_rows_of_the_whole_table(tmp_path: Path, start: int, limit: int, rows: list[int]) -> None:
    table(tmp_path / "b.parquet", 4, caption=[f"second {i}" for i in range(4)])
    table(tmp_path / "a.parquet", 3)
    found = list(read_pairs(tmp_path, start=start, max_pairs=limit))
    assert [p.row for p in found] == rows
    assert [p.prompt for p in found] == [f"second {r - 3}" if r > 2 else f"prompt {r}" for r in rows]
    assert reader.count_rows(tmp_path, max_pairs=limit) == (limit or 7)


@pytest.mark.parametrize("missing", ["caption", "jpg_1"])
def test_missing_column_names_file_column_and_what_is_there(tmp_path: Path, missing: str) -> None:
    file = table(tmp_path / "a.parquet", **{missing: None})
    with pytest.raises(UserError, match=f"a.parquet has no column '{missing}'; its columns are .*label_0"):
        next(read_pairs(file))


@pytest.mark.parametrize(
    ("columns", "what"),
    [
        ({"caption": [1, 2, 3, 4, 5]}, "column 'caption' holds int64 instead of text"),
        ({"jpg_0": ["a.jpg"] * 5}, "column 'jpg_0' holds string instead of bytes"),
        ({"label_0": ["1"] * 5}, "column 'label_0' holds string instead of a number"),
        ({"reward_0": [1.0] * 5}, "no column 'reward_1'"),
    ],
)
def test_wrong_types_and_half_of_two_columns(tmp_path: Path, columns: dict, what: str) -> None:
    with pytest.raises(UserError, match=what):
        next(read_pairs(table(tmp_path / "a.parquet", **columns)))


def test_what_is_not_parquet_or_not_there_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but no")
    with pytest.raises(UserError, match=r"a\.parquet cannot be read as parquet"):
        next(read_pairs(tmp_path / "a.parquet"))
    with pytest.raises(UserError, match="does not exist"):
        reader.source_path(str(tmp_path / "b.parquet"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"contains no \*\.parquet"):
        reader.files(tmp_path / "empty")


def test_damage_in_the_middle_of_the_file_is_a_clear_error(tmp_path: Path) -> None:
    file = table(tmp_path / "a.parquet", 8)
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 3 : len(raw) // 3 + 3000] = bytes(3000)
    file.write_bytes(raw)
    try:
        items = list(read_pairs(file))
    except UserError as error:
        assert "is damaged near row" in str(error)
    else:  # parquet has no checksums by default: the damage may have hit pixels only
        assert len(items) == 8


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"label_0": [1.0, 0.0, 0.5, None, float("nan")]}, [1.0, 0.0, 0.5, None, None]),
        ({"label_0": [1, 0, 1, 0, 1]}, [1.0, 0.0, 1.0, 0.0, 1.0]),
        ({"label_0": None, "label_1": [1.0, 0.0, 0.5, None, 0.25]}, [0.0, 1.0, 0.5, None, 0.75]),
        ({"label_0": None}, [None] * 5),
    ],
)
def test_labels_as_they_are_written(tmp_path: Path, labels: dict, expected: list) -> None:
    assert [p.label for p in read_pairs(table(tmp_path / "a.parquet", **labels))] == expected


@pytest.mark.parametrize(
    "rewards",
    [
        {"reward_0": [0.1, 0.2, 0.3, 0.4, None], "reward_1": [0.5, 0.6, 0.7, 0.8, float("nan")]},
        {"ps_score_0": [[0.1], [0.2], [0.3], [0.4], None], "ps_score_1": [[0.5], [0.6], [0.7], [0.8], []]},
    ],
)
def test_rewards_as_they_are_written(tmp_path: Path, rewards: dict) -> None:
    found = [p.rewards for p in read_pairs(table(tmp_path / "a.parquet", **rewards))]
    assert found == [(0.1, 0.5), (0.2, 0.6), (0.3, 0.7), (0.4, 0.8), None]


def test_bad_rows_are_rejected_where_they_stand(tmp_path: Path) -> None:
    bad = {
        "caption": ["fine", None, "", "d", "e", "f"],
        "jpg_1": [noise(9), noise(9), noise(9), None, b"", noise(9)],
        "label_0": [1.0, 1.0, 1.0, 1.0, 1.0, 1.5],
    }
    found = reasons(table(tmp_path / "a.parquet", 6, **bad))
    assert list(found) == [1, 3, 4, 5]
    assert found[1].startswith("no caption")
    assert found[3] == "jpg_1 holds no bytes: it is null"
    assert found[4] == "jpg_1 holds no bytes: it is empty"
    assert found[5] == "label outside 0 to 1: label_0 = 1.5"


def test_contradicting_labels_and_broken_rewards(tmp_path: Path) -> None:
    inf, nan = float("inf"), float("nan")
    columns = {
        "label_0": [1.0, 1.0, 1.0, 1.0],
        "label_1": [1.0, 0.0, 0.0, 0.0],
        "reward_0": [0.1, nan, -inf, 0.2],
        "reward_1": [0.1, 0.2, 0.3, 0.1],
    }
    found = reasons(table(tmp_path / "a.parquet", 4, **columns))
    assert [found[i].partition(":")[0] for i in range(3)] == [
        "labels contradict each other",
        "one reward of two",
        "reward is not finite",
    ]
    assert list(found) == [0, 1, 2]
    lists = {"ps_score_0": [[1.0, 2.0]] * 2, "ps_score_1": [[1.0]] * 2}
    assert "list of 2" in reasons(table(tmp_path / "b.parquet", 2, **lists))[0]


def test_hugging_face_image_struct_and_uids(tmp_path: Path) -> None:
    cells = [{"bytes": noise(i), "path": None} for i in range(4)] + [{"bytes": None, "path": "x.png"}]
    uids = {"image_0_uid": ["a", "b", "c", "d", "e"], "image_1_uid": ["v", "w", None, "y", "z"]}
    items = list(read_pairs(table(tmp_path / "a.parquet", jpg_0=cells, **uids)))
    assert items[1].images[0] == noise(1)
    assert [item.uid for item in items] == ["a/v", "b/w", "row-2", "d/y", "e/z"]
    assert isinstance(items[4], Rejected)
    assert "only the path 'x.png'" in items[4].reason


def test_a_foreign_table_s_paths_are_not_followed(tmp_path: Path) -> None:
    """Only a table of ``smpo import`` says where its pictures lie; a hash in it is compared there alone, too."""
    (tmp_path / "x.png").write_bytes(noise(1))
    cells = [{"bytes": noise(1), "path": "x.png"}, {"bytes": None, "path": "x.png"}]
    found = reasons(table(tmp_path / "a.parquet", 2, jpg_0=cells, hash_0=[1, 2]))
    assert list(found) == [1]
    assert "smpo import stores the images" in found[1]


def with_metadata(file: Path, places: object) -> Path:
    """A table whose images are paths below the folder that its metadata names."""
    by_path = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = pq.read_table(table(file, 2, jpg_0=pa.array([{"bytes": None, "path": "x.png"}] * 2, by_path)))
    rows = rows.replace_schema_metadata({b"smpo_fast.pictures": json.dumps(places).encode()})
    pq.write_table(rows, file)
    return file


@pytest.mark.parametrize("places", [["/", "/"], ["{}", "."], ["/nowhere", "../elsewhere"], ["{}", "{}"]])
def test_a_table_does_not_decide_alone_where_images_are_read(tmp_path: Path, places: list[str]) -> None:
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "t").mkdir()
    elsewhere.mkdir()
    (elsewhere / "x.png").write_bytes(noise(1))
    file = with_metadata(tmp_path / "t" / "a.parquet", [place.format(elsewhere) for place in places])
    with pytest.raises(DataError, match="stores paths of images in /.*images are not read from it; import again"):
        list(read_pairs(file))
    # an import.json that names another folder, or a table that stores bytes, confirms nothing
    for summary in ({"paths": True, "source": {"root": str(tmp_path)}}, {"paths": False, "source": {"root": "/"}}):
        (tmp_path / "t" / "import.json").write_text(json.dumps(summary))
        with pytest.raises(DataError, match="images are not read from it"):
            list(read_pairs(file))


def test_the_root_of_a_file_system_is_never_read(tmp_path: Path) -> None:
    file = with_metadata(tmp_path / "a.parquet", ["/", "/"])
    (tmp_path / "import.json").write_text(json.dumps({"paths": True, "source": {"root": "/"}}))
    with pytest.raises(DataError, match="images are not read from it"):
        list(read_pairs(file))


def test_images_below_the_table_s_own_folder_are_read(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "x.png").write_bytes(noise(9))
    pairs = list(read_pairs(with_metadata(tmp_path / "a.parquet", ["/gone", "images"])))
    assert [pair.images[0] for pair in pairs if isinstance(pair, RawPair)] == [noise(9)] * 2


@pytest.mark.parametrize("places", [1, [], ["a"], {"a": 1}])
def test_damaged_metadata_is_an_error(tmp_path: Path, places: object) -> None:
    with pytest.raises(DataError, match="has damaged metadata .*: import again"):
        list(read_pairs(with_metadata(tmp_path / "a.parquet", places)))


def test_rejected_rows_beside_a_table_are_no_part_of_it(tmp_path: Path) -> None:
    table(tmp_path / "a.parquet")
    table(tmp_path / "rejected.parquet")
    assert reader.files(tmp_path) == [tmp_path / "a.parquet"]


def test_the_summary_of_an_import_names_the_parts(tmp_path: Path) -> None:
    for name in ("a", "b"):
        table(tmp_path / f"{name}.parquet")
    (tmp_path / "import.json").write_text('{"parts": [{"name": "b.parquet"}]}')
    assert reader.files(tmp_path) == [tmp_path / "b.parquet"]
    (tmp_path / "import.json").write_text('{"par')
    with pytest.raises(UserError, match="import.json is damaged .*: import again"):
        reader.files(tmp_path)


def test_text_that_is_not_utf8_is_rejected(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"\xff\xfe bad"], pa.binary()).view(pa.string())
    found = reasons(table(tmp_path / "a.parquet", 2, caption=raw))
    assert list(found) == [1]
    assert found[1].startswith("caption is not UTF-8")


@needs_samples
def test_hostile_rows_are_used_or_rejected_each_in_its_place() -> None:
    path = SAMPLES / "hostile_pairs.parquet"
    cases = pq.read_table(path, columns=["case"])["case"].to_pylist()
    fate: dict[str, str] = {}
    for case, item in zip(cases, read_pairs(path), strict=True):
        if isinstance(item, RawPair):
            try:
                pictures = [to_square(decode(raw), 32) for raw in item.images]
                fate[case] = "used" if item.label is not None else "no label"
                assert all(p.shape == (32, 32, 3) and p.dtype == np.uint8 for p in pictures)
            except BadImage as error:
                fate[case] = str(error).partition(":")[0]
        else:
            fate[case] = item.reason.partition(":")[0]
    used = {case for case, what in fate.items() if what == "used"}
    assert used == {
        "grayscale",
        "rgba",
        "cmyk jpeg",
        "exif-rotated",
        "very wide",
        "different sizes",
        "16-bit png",
        "empty caption",
        "very long caption",
        "unicode caption",
        "tie",
        "identical images",  # left out by prepare, which compares decoded pictures
    }
    assert {case: what for case, what in fate.items() if case not in used} == {
        "truncated jpeg": "cannot be decoded",
        "not an image": "not a picture",
        "empty bytes": "jpg_0 holds no bytes",
        "null image": "jpg_0 holds no bytes",
        "1x1 pixel": "too small",
        "null caption": "no caption",
        "nan label": "no label",
        "label out of range": "label outside 0 to 1",
        "nan reward": "one reward of two",
        "inf reward": "reward is not finite",
    }


@needs_samples
def test_real_pairs_are_all_usable() -> None:
    pairs = list(read_pairs(SAMPLES / "real_pairs.parquet"))
    assert len(pairs) == 23
    assert all(isinstance(p, RawPair) for p in pairs)
    assert sum(p.rewards is not None for p in pairs) == 7
    assert to_square(decode(pairs[14].images[0]), 256).std() > 5
