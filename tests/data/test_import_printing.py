"""Text from a source reaches the terminal with its control characters escaped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.images import noise
from helpers.import_sources import manifest, write_images

from smpo_fast.common.errors import UserError
from smpo_fast.config.commands import ImportOptions
from smpo_fast.data.ingest.importer import dry_run, import_pairs
from smpo_fast.data.pairs.reader import files, read_pairs

EVIL = "\x1b[2J\x9b31m\u202e\nerror: forged"
SHOWN = r"\x1b[2J\x9b31m\u202e\nerror: forged"


@pytest.fixture
def source(tmp_path: Path) -> str:
    write_images(tmp_path / "in", w=noise(1), l=noise(2))
    chosen = ["w.png", f"{EVIL}.png"]
    return manifest(tmp_path / "in", prompt=[EVIL, "p"], chosen=chosen, rejected=["l.png"] * 2, odd=["", ""])


def test_a_dry_run_shows_them_escaped(source: str) -> None:
    shown = str(dry_run(source, ImportOptions()))
    assert shown.count(SHOWN) == 3, "a caption; a path in a row's name and in the reason"
    assert all(line.isprintable() for line in shown.splitlines())


def test_errors_and_reports_show_them_escaped(source: str, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(UserError) as caught:
        import_pairs(source, tmp_path / "out", ImportOptions(strict=True))
    assert str(caught.value).isprintable() and SHOWN in str(caught.value)
    import_pairs(source, tmp_path / "out", ImportOptions())
    assert all(line.isprintable() for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(
    "columns", [{EVIL: "x"}, {"prompt": "p", "image_0": "w.png", "image_1": "l.png", "label": EVIL}]
)
def test_columns_in_errors(tmp_path: Path, columns: dict[str, str]) -> None:
    columns = {**columns, EVIL: "x"}
    for options in (ImportOptions(), ImportOptions(columns={"chosen": "gone"}), ImportOptions(columns={EVIL: EVIL})):
        (tmp_path / "a.jsonl").write_text(json.dumps(columns))
        with pytest.raises(UserError) as caught:
            dry_run(str(tmp_path / "a.jsonl"), options)
        assert str(caught.value).isprintable()


def test_file_names_in_errors(tmp_path: Path) -> None:
    (tmp_path / EVIL.replace("/", "")).write_text("x")
    with pytest.raises(UserError) as caught:
        dry_run(str(tmp_path), ImportOptions())
    assert str(caught.value).isprintable() and SHOWN in str(caught.value)


def test_columns_and_parts_of_a_pair_table_in_errors(tmp_path: Path) -> None:
    pq.write_table(pa.table({EVIL: [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError) as caught:
        list(read_pairs(tmp_path / "a.parquet"))
    assert str(caught.value).isprintable() and SHOWN in str(caught.value)
    (tmp_path / "import.json").write_text(json.dumps({"parts": [{"name": EVIL}]}))
    with pytest.raises(UserError) as caught:
        files(tmp_path)
    assert str(caught.value).isprintable() and SHOWN in str(caught.value)


def test_nothing_usable(tmp_path: Path) -> None:
    source = manifest(tmp_path, prompt=["p"], chosen=[EVIL], rejected=["l.png"])
    with pytest.raises(UserError) as caught:
        import_pairs(source, tmp_path / "out", ImportOptions())
    assert str(caught.value).isprintable() and SHOWN in str(caught.value)
