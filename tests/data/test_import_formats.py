"""Every container and format becomes pairs: each record is used or rejected in its place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.images import noise
from helpers.import_sources import (
    LOSERS,
    WINNERS,
    arrow_file,
    chosen_parquet,
    csv_pairs,
    hpd_json,
    jsonl_chosen,
    manifest,
    pickapic,
    ranked_parquet,
    rejected_rows,
    saved_to_disk,
    single_csv,
    single_tar,
    stored_pairs,
    stored_table,
    suffixes,
    tar_letters,
    tar_numbers,
    tar_pickapic,
    winners_and_losers,
    write_images,
    write_tar,
)
from helpers.paths import SAMPLES, needs_samples

from smpo_fast.config.commands import ImportOptions
from smpo_fast.data.ingest import ranking
from smpo_fast.data.ingest.importer import dry_run, import_pairs
from smpo_fast.data.ingest.ranking import better_and_worse
from smpo_fast.data.pairs.pair import RawPair
from smpo_fast.data.pairs.reader import read_pairs


@pytest.mark.parametrize(
    ("make", "container", "form", "reason"),
    [
        (pickapic, "parquet", "pairs", "image_0 holds no bytes: it is null"),
        (chosen_parquet, "parquet", "chosen", "chosen holds no bytes: it is empty"),
        (saved_to_disk, "arrow", "chosen", "chosen holds no bytes: it is empty"),
        (arrow_file, "arrow", "chosen", "chosen holds no bytes: it is empty"),
        (tar_letters, "tar", "chosen", "jpg_0 not a picture: 20 bytes"),
        (tar_numbers, "tar", "pairs", "label_0 is no number: 'x'"),
        (tar_pickapic, "tar", "pairs", "label outside 0 to 1: label_0 = 7"),
        (jsonl_chosen, "json", "chosen", "jpg_1 no file: 'pics/l2.png' cannot be read (No such file"),
        (csv_pairs, "csv", "pairs", "jpg_1 no file: 'pics/l2.png'"),
        (hpd_json, "json", "ranking", "no file: 'pics/l2.png'"),
        (ranked_parquet, "parquet", "ranking", "lists of unequal length: 2 images, 1 rank"),
        (winners_and_losers, "w-l", "chosen", "unpaired: w/p2.png has no partner in l/"),
        (suffixes, "suffix", "chosen", "unpaired: p2.png: one 'p2' and at least one 'p2-rejected'"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_format(
    tmp_path: Path, make: Callable[[Path], Path], container: str, form: str, reason: str, capsys: Any
) -> None:
    (tmp_path / "in").mkdir()
    source = make(tmp_path / "in")
    shown = str(dry_run(str(source), ImportOptions()))
    assert f": {container}, 1 file" in shown
    assert f"format {form}" in shown
    summary = import_pairs(str(source), tmp_path / "out", ImportOptions())
    assert (summary["container"], summary["format"], summary["pairs"]) == (container, form, 3)
    wanted = [(f"p{i}", WINNERS[i], LOSERS[i]) for i in (0, 1, 3)]
    if make is tar_pickapic:
        wanted = [(f"p{i}", noise(i, kind="JPEG"), LOSERS[i]) for i in (0, 1, 3)]
    assert stored_pairs(tmp_path / "out") == wanted
    assert list(rejected_rows(tmp_path / "out")) == [2]
    assert reason in rejected_rows(tmp_path / "out")[2]
    assert summary["rejected"] == {rejected_rows(tmp_path / "out")[2].partition(":")[0]: 1}
    assert stored_table(tmp_path / "out")["source_row"].to_pylist() == [0, 1, 3]
    assert "3 pairs in 1 part(s), rejected: 1:" in capsys.readouterr().out


def test_rewards_uids_and_ties_are_kept(tmp_path: Path) -> None:
    table = {
        "caption": ["a", "b", "c"],
        "jpg_0": WINNERS[:3],
        "jpg_1": LOSERS[:3],
        "label_0": [0.5, None, 1.0],
        "ps_score_0": [[0.1], [0.2], []],
        "ps_score_1": [[0.3], [0.1], []],
        "image_0_uid": ["u", "v", None],
        "image_1_uid": ["x", "y", None],
    }
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    summary = import_pairs(str(tmp_path / "a.parquet"), tmp_path / "out", ImportOptions())
    pairs = list(read_pairs(tmp_path / "out"))
    assert [(p.label, p.rewards, p.uid) for p in pairs if isinstance(p, RawPair)] == [
        (0.5, (0.1, 0.3), "u/x"),
        (None, (0.2, 0.1), "v/y"),
        (1.0, None, "row-2"),
    ]
    assert (summary["statistics"]["ties"], summary["statistics"]["scored"]) == (1, 2)


@needs_samples
def test_hostile_rows_are_imported_or_rejected_each_with_its_number(tmp_path: Path) -> None:
    path = SAMPLES / "hostile_pairs.parquet"
    cases = pq.read_table(path, columns=["case"])["case"].to_pylist()
    summary = import_pairs(str(path), tmp_path / "out", ImportOptions(check=True))
    fate = {cases[row]: reason.partition(":")[0] for row, reason in rejected_rows(tmp_path / "out").items()}
    assert fate == {
        "truncated jpeg": "jpg_0 cannot be decoded",
        "not an image": "jpg_0 not a picture",
        "empty bytes": "image_0 holds no bytes",
        "null image": "image_0 holds no bytes",
        "1x1 pixel": "jpg_0 too small",
        "null caption": "no caption",
        "label out of range": "label outside 0 to 1",
        "identical images": "the same picture twice",
        "nan reward": "one reward of two",
        "inf reward": "reward is not finite",
    }
    rows = stored_table(tmp_path / "out")["source_row"].to_pylist()
    assert sorted([*rows, *rejected_rows(tmp_path / "out")]) == list(range(22))
    assert summary["statistics"]["undecided"] == 1  # "nan label"
    before = {p.row: p for p in read_pairs(path) if isinstance(p, RawPair)}
    for row, pair in zip(rows, read_pairs(tmp_path / "out"), strict=True):
        assert isinstance(pair, RawPair)
        assert (pair.prompt, pair.images, pair.label) == (before[row].prompt, before[row].images, before[row].label)


# --- several images a prompt ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "expected"),
    [("all", [(2, 0), (2, 3), (2, 1), (0, 1), (3, 1)]), ("ends", [(2, 1)]), ("once", [(2, 1)])],
)
def test_pairings_of_a_ranking_with_a_tie(how: str, expected: list) -> None:
    assert list(better_and_worse([2.0, 1.0, 3.0, 2.0], how)) == expected


def test_pairings_of_nothing_and_of_equals() -> None:
    for how in ranking.PAIRINGS:
        for values in ([], [1.0], [1.0] * 3):
            assert list(better_and_worse(values, how)) == []


@pytest.mark.parametrize(("how", "count"), [("all", 6), ("ends", 1), ("once", 2), ("", 6)])
def test_rankings_give_all_pairs_or_the_extremes(tmp_path: Path, how: str, count: int) -> None:
    write_images(tmp_path, **{f"x{i}": WINNERS[i] for i in range(4)})
    record = {"prompt": "p", "generations": [f"x{i}.png" for i in range(4)], "scores": [0.1, 0.9, 0.4, 0.3]}
    (tmp_path / "a.json").write_text(json.dumps([record]))
    import_pairs(str(tmp_path / "a.json"), tmp_path / "out", ImportOptions(pairs=how))
    found = [p for p in read_pairs(tmp_path / "out") if isinstance(p, RawPair)]
    assert len(found) == count
    assert all(p.rewards and p.rewards[0] > p.rewards[1] and p.label == 1.0 for p in found)
    ends = [p for p in found if p.images == (WINNERS[1], WINNERS[0])]
    assert [p.rewards for p in ends] == [(0.9, 0.1)]


def test_a_ranking_of_two_equals_is_a_tie_and_of_more_is_rejected(tmp_path: Path) -> None:
    write_images(tmp_path, **{f"x{i}": WINNERS[i] for i in range(3)})
    records = [{"prompt": "p", "images": [f"x{i}.png" for i in range(n)], "rank": [1] * n} for n in (2, 3)]
    records.append({"prompt": "p", "images": ["x0.png", "x1.png", None], "rank": [2, 1, 3]})
    records.append({"prompt": "p", "images": ["x0.png", "x1.png", "x2.png"], "rank": [2, None, 3]})
    (tmp_path / "a.json").write_text(json.dumps(records))
    summary = import_pairs(str(tmp_path / "a.json"), tmp_path / "out", ImportOptions())
    found = [p for p in read_pairs(tmp_path / "out") if isinstance(p, RawPair)]
    assert [p.label for p in found] == [0.5, 1.0, 1.0]
    assert found[1].images == (WINNERS[1], WINNERS[0])
    assert found[2].images == (WINNERS[0], WINNERS[2])
    assert summary["rejected"] == {"nothing is better": 1, "images[2] holds no bytes": 1, "no rank": 1}


def test_numbered_members_of_a_tar_can_be_ranked(tmp_path: Path) -> None:
    members = [(f"a.{i}.png", WINNERS[i]) for i in (2, 0, 1)]
    write_tar(tmp_path / "a.tar", [*members, ("a.json", b'{"prompt": "p", "ranks": [2, 1, 3]}')])
    import_pairs(str(tmp_path / "a.tar"), tmp_path / "out", ImportOptions(pairs="ends"))
    assert stored_pairs(tmp_path / "out") == [("p", WINNERS[1], WINNERS[2])]


@pytest.mark.parametrize("make", [single_csv, single_tar], ids=lambda f: f.__name__)
def test_single_labels_are_paired_within_a_prompt(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    (tmp_path / "in").mkdir()
    source = make(tmp_path / "in")
    summary = import_pairs(str(source), tmp_path / "once", ImportOptions())
    assert summary["format"] == "single"
    assert stored_pairs(tmp_path / "once") == [
        ("a", noise(0), noise(4)),
        ("b", noise(5), noise(1)),
    ]
    assert {row: reason.partition(":")[0] for row, reason in rejected_rows(tmp_path / "once").items()} == {
        2: "unpaired",
        3: "unpaired",
        6: "no preference",
    }
    import_pairs(str(source), tmp_path / "all", ImportOptions(pairs="all"))
    assert stored_pairs(tmp_path / "all")[:2] == [
        ("a", noise(0), noise(2)),
        ("a", noise(0), noise(4)),
    ]
    assert len(stored_pairs(tmp_path / "all")) == 3


def test_single_pictures_with_ranks_and_scores(tmp_path: Path) -> None:
    write_images(tmp_path, **{f"x{i}": WINNERS[i] for i in range(4)})
    images = [f"x{i}.png" for i in range(4)]
    source = manifest(tmp_path, prompt=["p", "q", "p", "p"], image=images, rank=[3, 1, 1, 2], reward=[0.1, 9, 0.2, 0.3])
    import_pairs(source, tmp_path / "out", ImportOptions(pairs="all"))
    found = [(p.images, p.rewards) for p in read_pairs(tmp_path / "out") if isinstance(p, RawPair)]
    assert found == [
        ((WINNERS[2], WINNERS[3]), (0.2, 0.3)),
        ((WINNERS[2], WINNERS[0]), (0.2, 0.1)),
        ((WINNERS[3], WINNERS[0]), (0.3, 0.1)),
    ]
    assert list(rejected_rows(tmp_path / "out")) == [1]
