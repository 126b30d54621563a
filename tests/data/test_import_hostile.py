"""Hostile and damaged sources: nothing outside the source is read, and no record stops an import."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.images import noise
from helpers.import_sources import (
    LOSERS,
    WINNERS,
    arrow_file,
    manifest,
    rejected_rows,
    stored_pairs,
    stored_table,
    tar_letters,
    write_images,
    write_tar,
)
from helpers.paths import ROOT

from smpo_fast.config.commands import ImportOptions
from smpo_fast.data.ingest.columns import FORMATS
from smpo_fast.data.ingest.importer import import_pairs


def huge_png() -> bytes:
    """A header that promises 60000 x 60000 px."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_paths_links_bombs_and_devices_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write_images(folder, w=WINNERS[0], l=LOSERS[0], bomb=huge_png())
    write_images(tmp_path, outside=LOSERS[1])
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "inner.png").symlink_to(folder / "l.png")
    os.mkfifo(folder / "pipe.png")
    losers = ["inner.png", str(folder / "l.png"), "../outside.png", str(tmp_path / "outside.png"), "link.png"]
    losers += ["pipe.png", ".", "a\0b", "\ud800.png", "http://host/l.png", "bomb.png", "w.png", 5, None]
    manifest(folder, prompt=["p"] * len(losers), chosen=["w.png"] * len(losers), rejected=losers)
    import_pairs(str(folder), tmp_path / "out", ImportOptions(container="json"))
    assert stored_pairs(tmp_path / "out") == [("p", WINNERS[0], LOSERS[0])] * 2
    found = {row: reason.partition(":")[0] for row, reason in rejected_rows(tmp_path / "out").items()}
    assert found == {
        **dict.fromkeys((2, 3, 4), "jpg_1 leaves its folder"),
        **dict.fromkeys((5, 6), "jpg_1 no file"),
        7: "jpg_1 leaves its folder",
        8: "path of rejected is not UTF-8 text",
        9: "jpg_1 not here",
        10: "jpg_1 too large",
        11: "the same picture twice",
        12: "rejected is no picture",
        13: "rejected holds no bytes",
    }
    import_pairs(str(folder), tmp_path / "wider", ImportOptions(container="json", root=str(tmp_path / "in")))
    assert len(stored_pairs(tmp_path / "wider")) == 2


def test_members_of_a_tar_that_leave_it_are_refused(tmp_path: Path) -> None:
    good = [(f"{i}.{side}.png", content) for i in range(2) for side, content in (("w", WINNERS[i]), ("l", LOSERS[i]))]
    good += [("0.txt", b"p0"), ("1.txt", b"p1")]
    good.sort()
    write_tar(tmp_path / "a.tar", good)
    with tarfile.open(tmp_path / "a.tar", "a") as archive:
        for name in ("/etc/x.w.png", "../x.w.png", "a/../../x.w.png"):
            info = tarfile.TarInfo(name)
            info.size = len(WINNERS[2])
            archive.addfile(info, io.BytesIO(WINNERS[2]))
        for name, content in (("2.w.png", WINNERS[2]), ("2.txt", b"p2"), ("2.pkl", b"\x80\x04cos\nsystem\n.")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("2.l.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    summary = import_pairs(str(tmp_path / "a.tar"), tmp_path / "out", ImportOptions())
    assert stored_pairs(tmp_path / "out") == [("p0", WINNERS[0], LOSERS[0]), ("p1", WINNERS[1], LOSERS[1])]
    assert summary["rejected"] == {"refused": 4, "rejected holds no bytes": 1}
    assert "'2.l.png' is a link or a device" in " ".join(rejected_rows(tmp_path / "out").values())


@pytest.mark.parametrize("where", ["header", "cut"])
def test_a_damaged_tar_gives_what_is_before_the_damage(tmp_path: Path, where: str) -> None:
    source = tar_letters(tmp_path)
    raw = bytearray(source.read_bytes())
    at = raw.index(b"a/003.l.png")
    if where == "header":
        raw[at + 148 : at + 156] = b"99999999"  # the checksum
    source.write_bytes(raw if where == "header" else raw[: at + 600])
    summary = import_pairs(str(source), tmp_path / "out", ImportOptions())
    assert [p for p, _, _ in stored_pairs(tmp_path / "out")] == ["p0", "p1"]
    assert summary["rejected"]["damaged"] == 1
    assert "from sample 'a/00" in rejected_rows(tmp_path / "out")[max(rejected_rows(tmp_path / "out"))]


def test_a_damaged_row_group_keeps_the_numbers_of_the_others(tmp_path: Path) -> None:
    table = pa.table({"prompt": [f"p{i}" for i in range(6)], "chosen": (WINNERS * 2)[:6], "rejected": (LOSERS * 2)[:6]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2, compression="none", use_dictionary=False)
    meta = pq.ParquetFile(tmp_path / "a.parquet").metadata
    raw = bytearray((tmp_path / "a.parquet").read_bytes())
    at = meta.row_group(1).column(0).data_page_offset
    raw[at : at + 8] = b"\xff" * 8
    (tmp_path / "a.parquet").write_bytes(raw)
    pq.write_table(table.slice(0, 1), tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 but no")
    pq.write_table(table.slice(5, 1), tmp_path / "d.parquet")
    import_pairs(str(tmp_path), tmp_path / "out", ImportOptions())
    assert stored_table(tmp_path / "out")["source_row"].to_pylist() == [0, 1, 4, 5, 6, 8]
    assert [reason.partition(":")[0] for reason in rejected_rows(tmp_path / "out").values()] == ["damaged"] * 3
    assert list(rejected_rows(tmp_path / "out")) == [2, 3, 7]


def test_bad_lines_of_manifests_are_rejected_one_by_one(tmp_path: Path) -> None:
    write_images(tmp_path, w=WINNERS[0], l=LOSERS[0])
    good = b'{"prompt": "p", "chosen": "w.png", "rejected": "l.png"}'
    lines = [good, b"{broken", b'"text"', b'{"prompt": "\xff", "chosen": "w.png", "rejected": "l.png"}']
    lines += [good.replace(b'"p"', b'"\\ud800"'), good.replace(b'"p"', b"null"), good.replace(b'"p"', b"[1]"), good]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    import_pairs(str(tmp_path / "a.jsonl"), tmp_path / "json", ImportOptions())
    assert {row: reason.partition(":")[0] for row, reason in rejected_rows(tmp_path / "json").items()} == {
        1: "not JSON",
        2: "no record",
        3: "not UTF-8 text",
        4: "caption is not UTF-8 text",
        5: "no caption",
        6: "caption is not text",
    }
    rows = [b"prompt;chosen;rejected", b"p;w.png;l.png", b"p;w.png", b"\xff;w.png;l.png", b'"a;b\nc";w.png;l.png']
    (tmp_path / "a.csv").write_bytes(b"\n".join(rows))
    import_pairs(str(tmp_path / "a.csv"), tmp_path / "csv", ImportOptions())
    assert [p for p, _, _ in stored_pairs(tmp_path / "csv")] == ["p", "a;b\nc"]
    assert {row: reason.partition(":")[0] for row, reason in rejected_rows(tmp_path / "csv").items()} == {
        1: "not CSV",
        2: "caption is not UTF-8 text",
    }


def test_a_json_array_is_read_in_chunks_and_may_be_cut(tmp_path: Path) -> None:
    write_images(tmp_path, w=WINNERS[0], l=LOSERS[0])
    record = {"prompt": "p" * 3000, "chosen": "w.png", "rejected": "l.png"}
    text = json.dumps([record] * 800)  # more than two chunks
    (tmp_path / "a.json").write_text(text[: len(text) - 100])
    summary = import_pairs(str(tmp_path / "a.json"), tmp_path / "out", ImportOptions())
    assert summary["pairs"] == 799
    assert list(rejected_rows(tmp_path / "out")) == [799]
    assert rejected_rows(tmp_path / "out")[799].startswith("damaged: the rest of the JSON array")


ODD: list[Any] = [None, True, 0, -1e400, 10**400, "", "nan", "x" * 300, [], [None], [[1]], {}, {"bytes": 3, "path": []}]


@pytest.mark.parametrize("form", FORMATS)
def test_no_value_whatever_stops_an_import(tmp_path: Path, form: str) -> None:
    write_images(tmp_path, w=WINNERS[0], l=LOSERS[0])
    good: dict[str, Any] = {
        "pairs": {"prompt": "p", "image_0": "w.png", "image_1": "l.png", "label_0": 1, "reward_0": 1, "reward_1": 0},
        "chosen": {"prompt": "p", "chosen": "w.png", "rejected": "l.png"},
        "ranking": {"prompt": "p", "images": ["w.png", "l.png"], "rank": [1, 2], "scores": [0.5, 0.4]},
        "single": {"prompt": "p", "image": "w.png", "label": 1, "score": 0.1},
    }[form]
    records = [good, {**good, "image": "l.png", "label": 0}] * 4
    records += [{**good, column: odd} for column in good for odd in ODD]
    records += [{**good, column: [odd, odd]} for column in good for odd in ODD]
    records += [{}, good]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    import_pairs(str(tmp_path / "a.jsonl"), tmp_path / "out", ImportOptions(format=form))
    used = set(stored_table(tmp_path / "out")["source_row"].to_pylist())
    if form == "single":  # there a pair is two records, and may be one picture twice
        assert used
    else:
        assert {0, 2, 4} <= used
        assert used | set(rejected_rows(tmp_path / "out")) == set(range(len(records)))


def test_truncated_pictures_show_with_check(tmp_path: Path) -> None:
    whole = noise(1, (64, 64), "JPEG")
    table = {"prompt": ["a", "b"], "chosen": [whole, whole[: len(whole) // 2]], "rejected": LOSERS[:2]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    assert import_pairs(str(tmp_path / "a.parquet"), tmp_path / "out", ImportOptions())["pairs"] == 2
    summary = import_pairs(str(tmp_path / "a.parquet"), tmp_path / "checked", ImportOptions(check=True))
    assert summary["rejected"] == {"jpg_0 cannot be decoded": 1}


def test_arrow_offsets_beyond_the_data_are_damage(tmp_path: Path) -> None:
    """In a process of its own, because reading such a string ends the process."""
    file = arrow_file(tmp_path)
    content, offsets = file.read_bytes(), np.array([0, 2, 4, 6, 8], np.int32).tobytes()
    assert content.count(offsets) == 1  # of the prompts
    file.write_bytes(content.replace(offsets, np.array([0, 2, 4, 6, 1 << 30], np.int32).tobytes()))
    words = ["import", str(file), str(tmp_path / "out")]
    ended = subprocess.run([sys.executable, "-m", "smpo_fast.cli", *words], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 2 and ended.stderr.count("error: ") == 1, ended
    assert "no readable record: damaged" in ended.stderr
