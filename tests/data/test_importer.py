"""Pairs of any format become one table: every record used or rejected in its place, whatever the container."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.paths import SAMPLES, needs_samples
from PIL import Image

from smpo_fast import cli
from smpo_fast.common import remote
from smpo_fast.common.errors import UserError
from smpo_fast.data.ingest import columns as ingest_columns
from smpo_fast.data.ingest import importer, pairing
from smpo_fast.data.ingest.importer import ImportOptions, dry_run, import_pairs
from smpo_fast.data.ingest.pairing import pairings
from smpo_fast.data.pairs import reader
from smpo_fast.data.pairs.reader import read_pairs
from smpo_fast.data.pairs.schema import RawPair, Rejected


def picture(seed: int, size: tuple[int, int] = (24, 16), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, kind)
    return file.getvalue()


W, L = [picture(10 + i) for i in range(4)], [picture(20 + i) for i in range(4)]
BAD = b"not a picture at all"


def pairs_of(out: Path) -> list[tuple[str, bytes, bytes]]:
    """Prompt, preferred picture and the other of every pair."""
    found = []
    for pair in read_pairs(out):
        assert isinstance(pair, RawPair), pair
        assert pair.label in (0.0, 1.0)
        better = 0 if pair.label else 1
        found.append((pair.prompt, pair.images[better], pair.images[1 - better]))
    return found


def stored(out: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(file) for file in reader.files(out))


def rejected(out: Path) -> dict[int, str]:
    return {row["row"]: row["reason"] for row in pq.read_table(out / "rejected.parquet").to_pylist()}


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write_pictures(folder: Path, **pictures: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in pictures.items():
        (folder / f"{name}.png").write_bytes(content)


# --- a real sample of every format: returns the source, and each has one bad record, the third -----------------------


def pickapic(folder: Path) -> Path:
    table = {
        "caption": ["p0", "p1", "p2", "p3"],
        "jpg_0": [W[0], L[1], None, W[3]],
        "jpg_1": [L[0], W[1], L[2], L[3]],
        "label_0": [1.0, 0.0, 1.0, 1.0],
        "label_1": [0.0, 1.0, 0.0, 0.0],
        "are_different": [True] * 4,
    }
    pq.write_table(pa.table(table), folder / "train-00000-of-00001.parquet", row_group_size=2)
    return folder


def chosen_table() -> pa.Table:
    def images(contents: Sequence[bytes | None]) -> list[dict[str, Any]]:
        return [{"bytes": content, "path": f"{i}.png"} for i, content in enumerate(contents)]

    return pa.table(
        {
            "prompt": ["p0", "p1", "p2", "p3"],
            "chosen": images([W[0], W[1], b"", W[3]]),
            "rejected": images([L[0], L[1], L[2], L[3]]),
        }
    )


def chosen_parquet(folder: Path) -> Path:
    pq.write_table(chosen_table(), folder / "a.parquet")
    return folder / "a.parquet"


def saved_to_disk(folder: Path) -> Path:
    """As ``DatasetDict.save_to_disk`` leaves it: an arrow stream a split, and notes in JSON."""
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for split, table in (("train", chosen_table()), ("test", chosen_table().slice(0, 1))):
        (folder / split).mkdir()
        (folder / split / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
        (folder / split / "dataset_info.json").write_text("{}")
        with pa.ipc.new_stream(folder / split / "data-00000-of-00001.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    return folder


def arrow_file(folder: Path) -> Path:
    with pa.ipc.new_file(folder / "a.arrow", chosen_table().schema) as writer:
        writer.write_table(chosen_table())
    return folder / "a.arrow"


def tar_letters(folder: Path) -> Path:
    members = [(f"a/{i:03d}.{side}.png", content) for i in range(4) for side, content in (("w", W[i]), ("l", L[i]))]
    members += [(f"a/{i:03d}.txt", f"p{i}\n".encode()) for i in range(4)]
    members.sort()
    members[members.index(("a/002.w.png", W[2]))] = ("a/002.w.png", BAD)
    return write_tar(folder / "a.tar", members)


def tar_numbers(folder: Path) -> Path:
    members = []
    for i in range(4):
        first, second = (W[i], L[i]) if i % 2 else (L[i], W[i])
        label = "x" if i == 2 else i % 2
        about = json.dumps({"caption": f"p{i}", "label_0": label}).encode()
        members += [(f"{i}.0.png", first), (f"{i}.1.png", second), (f"{i}.json", about), (f"{i}.npy", b"ignored")]
    return write_tar(folder / "a.tar.gz", members, "w:gz")


def tar_pickapic(folder: Path) -> Path:
    members = []
    for i in range(4):
        members += [
            (f"{i}.jpg_0.jpg", picture(i, kind="JPEG")),
            (f"{i}.jpg_1.jpg", L[i]),
            (f"{i}.label_0.txt", b"1" if i != 2 else b"7"),
            (f"{i}.original_prompt.txt", f"p{i}".encode()),
        ]
    return write_tar(folder / "00000.tar", members)


def manifest_pictures(folder: Path) -> None:
    write_pictures(folder / "pics", **{f"w{i}": W[i] for i in range(4)}, **{f"l{i}": L[i] for i in range(4) if i != 2})


def jsonl_chosen(folder: Path) -> Path:
    manifest_pictures(folder)
    lines = [
        json.dumps({"prompt": f"p{i}", "chosen": f"pics/w{i}.png", "rejected": f"pics/l{i}.png"}) for i in range(4)
    ]
    (folder / "a.jsonl").write_text("\ufeff" + "\n\n".join(lines) + "\n")
    return folder


def csv_pairs(folder: Path) -> Path:
    manifest_pictures(folder)
    with (folder / "a.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["", "caption", "image_0", "image_1", "label_0", "reward_0", "reward_1"])
        rows.writerows([[i, f"p{i}", f"pics/w{i}.png", f"pics/l{i}.png", "true", 0.5, 0.25] for i in range(4)])
    return folder / "a.csv"


def hpd_json(folder: Path) -> Path:
    manifest_pictures(folder)
    records = [
        {
            "prompt": f"p{i}",
            "image_path": [f"pics/l{i}.png", f"pics/w{i}.png"],
            "human_preference": [0, 1],
            "user_hash": "u",
        }
        for i in range(4)
    ]
    (folder / "train.json").write_text(json.dumps(records, indent=1))
    return folder / "train.json"


def ranked_parquet(folder: Path) -> Path:
    table = {
        "prompt": ["p0", "p1", "p2", "p3"],
        "images": [[{"bytes": x, "path": None} for x in (L[i], W[i])] for i in range(4)],
        "ranking": [[2, 1], [2, 1], [2], [4, 3]],
    }
    pq.write_table(pa.table(table), folder / "a.parquet")
    return folder


def winners_and_losers(folder: Path) -> Path:
    write_pictures(folder / "w", **{f"p{i}": W[i] for i in range(4)})
    write_pictures(folder / "l", **{f"p{i}": L[i] for i in range(4) if i != 2})
    for i in range(4):
        (folder / ("", "w", "l", "w")[i] / f"p{i}.txt").write_text(f"p{i}\n")
    return folder


def suffixes(folder: Path) -> Path:
    names = {0: "p0-rejected", 1: "p1-rejectedlabel", 3: "p3-rejected-2"}
    write_pictures(folder, **{f"p{i}": W[i] for i in range(4)}, **{name: L[i] for i, name in names.items()})
    for i in range(4):
        (folder / f"p{i}.txt").write_text(f"p{i}")
    return folder


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
    shown = dry_run(str(source), ImportOptions())
    assert f": {container}, 1 file" in shown
    assert f"format {form}" in shown
    summary = import_pairs(str(source), tmp_path / "out", ImportOptions())
    assert (summary["container"], summary["format"], summary["pairs"]) == (container, form, 3)
    wanted = [(f"p{i}", W[i], L[i]) for i in (0, 1, 3)]
    if make is tar_pickapic:
        wanted = [(f"p{i}", picture(i, kind="JPEG"), L[i]) for i in (0, 1, 3)]
    assert pairs_of(tmp_path / "out") == wanted
    assert list(rejected(tmp_path / "out")) == [2]
    assert reason in rejected(tmp_path / "out")[2]
    assert summary["rejected"] == {rejected(tmp_path / "out")[2].partition(":")[0]: 1}
    assert stored(tmp_path / "out")["source_row"].to_pylist() == [0, 1, 3]
    assert "3 pairs in 1 part(s), rejected: 1:" in capsys.readouterr().out


def test_rewards_uids_and_ties_are_kept(tmp_path: Path) -> None:
    table = {
        "caption": ["a", "b", "c"],
        "jpg_0": W[:3],
        "jpg_1": L[:3],
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
    fate = {cases[row]: reason.partition(":")[0] for row, reason in rejected(tmp_path / "out").items()}
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
    rows = stored(tmp_path / "out")["source_row"].to_pylist()
    assert sorted([*rows, *rejected(tmp_path / "out")]) == list(range(22))
    assert summary["statistics"]["undecided"] == 1  # "nan label"
    before = {p.row: p for p in read_pairs(path) if isinstance(p, RawPair)}
    for row, pair in zip(rows, read_pairs(tmp_path / "out"), strict=True):
        assert isinstance(pair, RawPair)
        assert (pair.prompt, pair.images, pair.label) == (before[row].prompt, before[row].images, before[row].label)


# --- several pictures a prompt ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "expected"),
    [("all", [(2, 0), (2, 3), (2, 1), (0, 1), (3, 1)]), ("ends", [(2, 1)]), ("once", [(2, 1)])],
)
def test_pairings_of_a_ranking_with_a_tie(how: str, expected: list) -> None:
    assert list(pairings([2.0, 1.0, 3.0, 2.0], how)) == expected


def test_pairings_of_nothing_and_of_equals() -> None:
    for how in pairing.PAIRINGS:
        assert list(pairings([], how)) == list(pairings([1.0], how)) == list(pairings([1.0] * 3, how)) == []


@pytest.mark.parametrize(("how", "count"), [("all", 6), ("ends", 1), ("once", 2), ("", 6)])
def test_rankings_give_all_pairs_or_the_extremes(tmp_path: Path, how: str, count: int) -> None:
    write_pictures(tmp_path, **{f"x{i}": W[i] for i in range(4)})
    record = {"prompt": "p", "generations": [f"x{i}.png" for i in range(4)], "scores": [0.1, 0.9, 0.4, 0.3]}
    (tmp_path / "a.json").write_text(json.dumps([record]))
    import_pairs(str(tmp_path / "a.json"), tmp_path / "out", ImportOptions(pairs=how))
    found = [p for p in read_pairs(tmp_path / "out") if isinstance(p, RawPair)]
    assert len(found) == count
    assert all(p.rewards and p.rewards[0] > p.rewards[1] and p.label == 1.0 for p in found)
    ends = [p for p in found if p.images == (W[1], W[0])]
    assert [p.rewards for p in ends] == [(0.9, 0.1)]


def test_a_ranking_of_two_equals_is_a_tie_and_of_more_is_rejected(tmp_path: Path) -> None:
    write_pictures(tmp_path, **{f"x{i}": W[i] for i in range(3)})
    records = [{"prompt": "p", "images": [f"x{i}.png" for i in range(n)], "rank": [1] * n} for n in (2, 3)]
    records.append({"prompt": "p", "images": ["x0.png", "x1.png", None], "rank": [2, 1, 3]})
    records.append({"prompt": "p", "images": ["x0.png", "x1.png", "x2.png"], "rank": [2, None, 3]})
    (tmp_path / "a.json").write_text(json.dumps(records))
    summary = import_pairs(str(tmp_path / "a.json"), tmp_path / "out", ImportOptions())
    found = [p for p in read_pairs(tmp_path / "out") if isinstance(p, RawPair)]
    assert [p.label for p in found] == [0.5, 1.0, 1.0]
    assert found[1].images == (W[1], W[0])
    assert found[2].images == (W[0], W[2])
    assert summary["rejected"] == {"nothing is better": 1, "images[2] holds no bytes": 1, "no rank": 1}


def test_numbered_members_of_a_tar_can_be_ranked(tmp_path: Path) -> None:
    members = [(f"a.{i}.png", W[i]) for i in (2, 0, 1)]
    write_tar(tmp_path / "a.tar", [*members, ("a.json", b'{"prompt": "p", "ranks": [2, 1, 3]}')])
    import_pairs(str(tmp_path / "a.tar"), tmp_path / "out", ImportOptions(pairs="ends"))
    assert pairs_of(tmp_path / "out") == [("p", W[1], W[2])]


LABELS = [("a", 1), ("b", 0), ("a", 0), ("c", 1), ("a", 0), ("b", 1), ("b", None)]


def single_csv(folder: Path) -> Path:
    write_pictures(folder, **{f"x{i}": picture(i) for i in range(len(LABELS))})
    words = {1: "exclusive_win", 0: "exclusive_lose", None: ""}
    rows = [f"x{i}.png,{prompt},{words[label]}" for i, (prompt, label) in enumerate(LABELS)]
    (folder / "a.csv").write_text("\r\n".join(["file_path,caption,label", *rows]))
    return folder / "a.csv"


def single_tar(folder: Path) -> Path:
    """Bytes of pictures that belong together lie apart, so they wait on the disk."""
    members = []
    for i, (prompt, label) in enumerate(LABELS):
        about = json.dumps({"prompt": prompt, "label": None if label is None else bool(label)}).encode()
        members += [(f"{i}.png", picture(i)), (f"{i}.json", about)]
    return write_tar(folder / "a.tar", members)


@pytest.mark.parametrize("make", [single_csv, single_tar], ids=lambda f: f.__name__)
def test_single_labels_are_paired_within_a_prompt(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    (tmp_path / "in").mkdir()
    source = make(tmp_path / "in")
    summary = import_pairs(str(source), tmp_path / "once", ImportOptions())
    assert summary["format"] == "single"
    assert pairs_of(tmp_path / "once") == [("a", picture(0), picture(4)), ("b", picture(5), picture(1))]
    assert {row: reason.partition(":")[0] for row, reason in rejected(tmp_path / "once").items()} == {
        2: "unpaired",
        3: "unpaired",
        6: "no preference",
    }
    import_pairs(str(source), tmp_path / "all", ImportOptions(pairs="all"))
    assert pairs_of(tmp_path / "all")[:2] == [("a", picture(0), picture(2)), ("a", picture(0), picture(4))]
    assert len(pairs_of(tmp_path / "all")) == 3


def test_single_pictures_with_ranks_and_scores(tmp_path: Path) -> None:
    write_pictures(tmp_path, **{f"x{i}": W[i] for i in range(4)})
    images = [f"x{i}.png" for i in range(4)]
    source = manifest(tmp_path, prompt=["p", "q", "p", "p"], image=images, rank=[3, 1, 1, 2], reward=[0.1, 9, 0.2, 0.3])
    import_pairs(source, tmp_path / "out", ImportOptions(pairs="all"))
    found = [(p.images, p.rewards) for p in read_pairs(tmp_path / "out") if isinstance(p, RawPair)]
    assert found == [
        ((W[2], W[3]), (0.2, 0.3)),
        ((W[2], W[0]), (0.2, 0.1)),
        ((W[3], W[0]), (0.3, 0.1)),
    ]
    assert list(rejected(tmp_path / "out")) == [1]


# --- recognition ------------------------------------------------------------------------------------------------------


def manifest(folder: Path, **columns: Sequence[Any]) -> str:
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "a.jsonl")


def test_unknown_columns_are_listed_and_can_be_named(tmp_path: Path) -> None:
    write_pictures(tmp_path, w=W[0], l=L[0])
    source = manifest(tmp_path, description=["p"], good=["w.png"], worse=["l.png"])
    with pytest.raises(UserError, match=r"Found: description, good, worse\. Wanted: pairs: prompt .*--columns"):
        import_pairs(source, tmp_path / "out", ImportOptions())
    names = {"prompt": "description", "chosen": "good", "rejected": "worse"}
    import_pairs(source, tmp_path / "out", ImportOptions(columns=names))
    assert pairs_of(tmp_path / "out") == [("p", W[0], L[0])]
    with pytest.raises(UserError, match="'best' is none of prompt, image_0"):
        dry_run(source, ImportOptions(columns={"best": "good"}))
    with pytest.raises(UserError, match="no such column; it has description, good, worse"):
        dry_run(source, ImportOptions(columns={"chosen": "god"}))


def test_what_can_be_read_in_two_ways_is_asked_for(tmp_path: Path) -> None:
    columns = {"prompt": ["p"], "image_0": ["w.png"], "image_1": ["l.png"]}
    both = manifest(tmp_path, **columns, label_0=[1], chosen=["w.png"], rejected=["l.png"])
    with pytest.raises(UserError, match="can be read as pairs: .* and as chosen: .*choose with --format"):
        dry_run(both, ImportOptions())
    assert "format chosen" in dry_run(both, ImportOptions(format="chosen"))
    two = manifest(tmp_path, **columns, text=["q"], label_0=[1])
    with pytest.raises(UserError, match="prompt could be prompt or text: say which, --columns prompt=prompt"):
        dry_run(two, ImportOptions())
    open_label = manifest(tmp_path, **columns, label=[1])
    with pytest.raises(UserError, match="'label' may say which picture is better, but not how"):
        dry_run(open_label, ImportOptions())
    assert "label_1   = column 'label'" in dry_run(open_label, ImportOptions(columns={"label_1": "label"}))


def test_folders_of_several_kinds_or_splits(tmp_path: Path) -> None:
    for name in ("test-00000-of-00001.parquet", "dev-00000-of-00001.parquet"):
        pq.write_table(chosen_table(), tmp_path / name)
    with pytest.raises(UserError, match="has the splits dev, test: choose one with --split"):
        dry_run(str(tmp_path), ImportOptions())
    assert "split test" in dry_run(str(tmp_path), ImportOptions(split="test"))
    jsonl_chosen(tmp_path)
    with pytest.raises(UserError, match=r"several kinds of data \(.*parquet: .*json: a.jsonl.*--container"):
        dry_run(str(tmp_path), ImportOptions(split="test"))
    assert ": json, 1 file" in dry_run(str(tmp_path), ImportOptions(container="json"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.md").write_text("nothing")
    with pytest.raises(UserError, match="holds nothing to import .* it holds: notes.md"):
        dry_run(str(tmp_path / "empty"), ImportOptions())


def test_names_that_mean_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not there: give a file, a folder, an address"):
        dry_run(str(tmp_path / "gone.parquet"), ImportOptions())
    (tmp_path / "a.bin").write_bytes(b"\x80\x04what")
    with pytest.raises(UserError, match="no container that is known .* name it with --container"):
        dry_run(str(tmp_path / "a.bin"), ImportOptions())
    with pytest.raises(UserError, match="--pairs: 'some' is none of all, ends, once"):
        dry_run(str(tmp_path), ImportOptions(pairs="some"))
    with pytest.raises(UserError, match="Protocol not known"):
        dry_run("nowhere://bucket/a.parquet", ImportOptions())


def test_containers_are_known_by_their_first_bytes(tmp_path: Path) -> None:
    for i, make in enumerate((chosen_parquet, arrow_file, tar_letters)):
        (tmp_path / str(i)).mkdir()
        bare = make(tmp_path / str(i)).rename(tmp_path / f"{i}.bin")
        assert "format chosen" in dry_run(str(bare), ImportOptions())


# --- from elsewhere ---------------------------------------------------------------------------------------------------


def test_hub_ids_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the hub: its cache, in which a snapshot is links to blobs."""
    repository = tmp_path / "datasets--someone--pairs"
    snapshot = repository / "snapshots" / "abc"
    (repository / "blobs").mkdir(parents=True)
    (snapshot / "pics").mkdir(parents=True)
    (tmp_path / "made").mkdir()
    jsonl_chosen(tmp_path / "made")
    for file in (tmp_path / "made").rglob("*.*"):
        target = repository / "blobs" / file.name
        target.write_bytes(file.read_bytes())
        (snapshot / file.relative_to(tmp_path / "made")).symlink_to(target)
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(name=name, **options)
        return str(snapshot)

    monkeypatch.setattr(remote, "snapshot_download", download)
    import_pairs("someone/pairs", tmp_path / "out", ImportOptions(revision="v2"))
    assert [p for p, _, _ in pairs_of(tmp_path / "out")] == ["p0", "p1", "p3"]
    assert (asked["name"], asked["repo_type"], asked["revision"]) == ("someone/pairs", "dataset", "v2")
    assert {"*.parquet", "*.jsonl", "*.png"} <= set(asked["allow_patterns"])
    assert not any("py" in pattern or "pkl" in pattern for pattern in asked["allow_patterns"])
    with pytest.raises(UserError, match="not in a folder here that will stay"):
        import_pairs("someone/pairs", tmp_path / "other", ImportOptions(paths=True))


def test_of_the_hub_only_the_wanted_split_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "repository" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    for split in ("test", "train"):
        pq.write_table(chosen_table(), folder / f"{split}-00000-of-00001.parquet")

    def download(name: str, *, allow_patterns: list[str], **options: Any) -> str:
        for file in list(folder.iterdir()):
            if not any(file.match(pattern) for pattern in allow_patterns):
                file.unlink()
        return str(folder)

    monkeypatch.setattr(remote, "snapshot_download", download)
    assert "split test" in dry_run("someone/pairs", ImportOptions(split="test"))
    assert [file.name for file in folder.iterdir()] == ["test-00000-of-00001.parquet"]


def test_the_hub_s_refusal_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, **options: Any) -> str:
        raise remote.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(remote, "snapshot_download", refuse)
    with pytest.raises(UserError, match="'someone/gone' is no folder here, and the hub gave: no connection"):
        dry_run("someone/gone", ImportOptions())


@pytest.fixture
def bucket() -> Any:
    """An fsspec file system in memory; gives a function that copies a folder into it."""
    fs = fsspec.filesystem("memory")

    def copy(folder: Path) -> str:
        for file in folder.rglob("*"):
            if file.is_file():
                fs.pipe_file(f"/bucket/{file.relative_to(folder)}", file.read_bytes())
        return "memory://bucket"

    yield copy
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


@pytest.mark.parametrize(
    "make", [pickapic, saved_to_disk, tar_letters, jsonl_chosen, hpd_json, winners_and_losers], ids=lambda f: f.__name__
)
def test_a_bucket_is_read_like_a_folder(tmp_path: Path, make: Callable[[Path], Path], bucket: Any) -> None:
    (tmp_path / "in").mkdir()
    make(tmp_path / "in")
    summary = import_pairs(bucket(tmp_path / "in"), tmp_path / "out", ImportOptions())
    assert pairs_of(tmp_path / "out") == [(f"p{i}", W[i], L[i]) for i in (0, 1, 3)]
    assert sum(summary["rejected"].values()) == 1
    with pytest.raises(UserError, match="--paths"):
        import_pairs("memory://bucket", tmp_path / "other", ImportOptions(paths=True))


def test_paths_in_a_bucket_stay_in_it(tmp_path: Path, bucket: Any) -> None:
    fsspec.filesystem("memory").pipe_file("/secret/w.png", W[0])
    write_pictures(tmp_path, w=W[0], l=L[0])
    losers = ["l.png", "memory://bucket/l.png", "../secret/w.png", "/secret/w.png", "memory://secret/w.png", "gone.png"]
    manifest(tmp_path, prompt=["p"] * 6, chosen=["w.png"] * 6, rejected=losers)
    import_pairs(f"{bucket(tmp_path)}/a.jsonl", tmp_path / "out", ImportOptions())
    assert pairs_of(tmp_path / "out") == [("p", W[0], L[0])] * 2
    assert [r.partition(":")[0] for r in rejected(tmp_path / "out").values()] == [
        *["jpg_1 leaves its folder"] * 3,
        "jpg_1 no file",
    ]


# --- hostile sources --------------------------------------------------------------------------------------------------


def huge_png() -> bytes:
    """A header that promises 60000 x 60000 px."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_paths_links_bombs_and_devices_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write_pictures(folder, w=W[0], l=L[0], bomb=huge_png())
    write_pictures(tmp_path, outside=L[1])
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "inner.png").symlink_to(folder / "l.png")
    os.mkfifo(folder / "pipe.png")
    losers = ["inner.png", str(folder / "l.png"), "../outside.png", str(tmp_path / "outside.png"), "link.png"]
    losers += ["pipe.png", ".", "a\0b", "\ud800.png", "http://host/l.png", "bomb.png", "w.png", 5, None]
    manifest(folder, prompt=["p"] * len(losers), chosen=["w.png"] * len(losers), rejected=losers)
    import_pairs(str(folder), tmp_path / "out", ImportOptions(container="json"))
    assert pairs_of(tmp_path / "out") == [("p", W[0], L[0])] * 2
    found = {row: reason.partition(":")[0] for row, reason in rejected(tmp_path / "out").items()}
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
    assert len(pairs_of(tmp_path / "wider")) == 2


def test_members_of_a_tar_that_leave_it_are_refused(tmp_path: Path) -> None:
    good = [(f"{i}.{side}.png", content) for i in range(2) for side, content in (("w", W[i]), ("l", L[i]))]
    good += [("0.txt", b"p0"), ("1.txt", b"p1")]
    good.sort()
    write_tar(tmp_path / "a.tar", good)
    with tarfile.open(tmp_path / "a.tar", "a") as archive:
        for name in ("/etc/x.w.png", "../x.w.png", "a/../../x.w.png"):
            info = tarfile.TarInfo(name)
            info.size = len(W[2])
            archive.addfile(info, io.BytesIO(W[2]))
        for name, content in (("2.w.png", W[2]), ("2.txt", b"p2"), ("2.pkl", b"\x80\x04cos\nsystem\n.")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("2.l.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    summary = import_pairs(str(tmp_path / "a.tar"), tmp_path / "out", ImportOptions())
    assert pairs_of(tmp_path / "out") == [("p0", W[0], L[0]), ("p1", W[1], L[1])]
    assert summary["rejected"] == {"refused": 4, "rejected holds no bytes": 1}
    assert "'2.l.png' is a link or a device" in " ".join(rejected(tmp_path / "out").values())


@pytest.mark.parametrize("where", ["header", "cut"])
def test_a_damaged_tar_gives_what_is_before_the_damage(tmp_path: Path, where: str) -> None:
    source = tar_letters(tmp_path)
    raw = bytearray(source.read_bytes())
    at = raw.index(b"a/003.l.png")
    if where == "header":
        raw[at + 148 : at + 156] = b"99999999"  # the checksum
    source.write_bytes(raw if where == "header" else raw[: at + 600])
    summary = import_pairs(str(source), tmp_path / "out", ImportOptions())
    assert [p for p, _, _ in pairs_of(tmp_path / "out")] == ["p0", "p1"]
    assert summary["rejected"]["damaged"] == 1
    assert "from sample 'a/00" in rejected(tmp_path / "out")[max(rejected(tmp_path / "out"))]


def test_a_damaged_row_group_keeps_the_numbers_of_the_others(tmp_path: Path) -> None:
    table = pa.table({"prompt": [f"p{i}" for i in range(6)], "chosen": (W * 2)[:6], "rejected": (L * 2)[:6]})
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
    assert stored(tmp_path / "out")["source_row"].to_pylist() == [0, 1, 4, 5, 6, 8]
    assert [reason.partition(":")[0] for reason in rejected(tmp_path / "out").values()] == ["damaged"] * 3
    assert list(rejected(tmp_path / "out")) == [2, 3, 7]


def test_bad_lines_of_manifests_are_rejected_one_by_one(tmp_path: Path) -> None:
    write_pictures(tmp_path, w=W[0], l=L[0])
    good = b'{"prompt": "p", "chosen": "w.png", "rejected": "l.png"}'
    lines = [good, b"{broken", b'"text"', b'{"prompt": "\xff", "chosen": "w.png", "rejected": "l.png"}']
    lines += [good.replace(b'"p"', b'"\\ud800"'), good.replace(b'"p"', b"null"), good.replace(b'"p"', b"[1]"), good]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    import_pairs(str(tmp_path / "a.jsonl"), tmp_path / "json", ImportOptions())
    assert {row: reason.partition(":")[0] for row, reason in rejected(tmp_path / "json").items()} == {
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
    assert [p for p, _, _ in pairs_of(tmp_path / "csv")] == ["p", "a;b\nc"]
    assert {row: reason.partition(":")[0] for row, reason in rejected(tmp_path / "csv").items()} == {
        1: "not CSV",
        2: "caption is not UTF-8 text",
    }


def test_a_json_array_is_read_in_chunks_and_may_be_cut(tmp_path: Path) -> None:
    write_pictures(tmp_path, w=W[0], l=L[0])
    record = {"prompt": "p" * 3000, "chosen": "w.png", "rejected": "l.png"}
    text = json.dumps([record] * 800)  # more than two chunks
    (tmp_path / "a.json").write_text(text[: len(text) - 100])
    summary = import_pairs(str(tmp_path / "a.json"), tmp_path / "out", ImportOptions())
    assert summary["pairs"] == 799
    assert list(rejected(tmp_path / "out")) == [799]
    assert rejected(tmp_path / "out")[799].startswith("damaged: the rest of the JSON array")


ODD: list[Any] = [None, True, 0, -1e400, 10**400, "", "nan", "x" * 300, [], [None], [[1]], {}, {"bytes": 3, "path": []}]


@pytest.mark.parametrize("form", ingest_columns.FORMATS)
def test_no_value_whatever_stops_an_import(tmp_path: Path, form: str) -> None:
    write_pictures(tmp_path, w=W[0], l=L[0])
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
    used = set(stored(tmp_path / "out")["source_row"].to_pylist())
    if form == "single":  # there a pair is two records, and may be one picture twice
        assert used
    else:
        assert {0, 2, 4} <= used
        assert used | set(rejected(tmp_path / "out")) == set(range(len(records)))


def test_truncated_pictures_show_with_check(tmp_path: Path) -> None:
    whole = picture(1, (64, 64), "JPEG")
    table = {"prompt": ["a", "b"], "chosen": [whole, whole[: len(whole) // 2]], "rejected": L[:2]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    assert import_pairs(str(tmp_path / "a.parquet"), tmp_path / "out", ImportOptions())["pairs"] == 2
    summary = import_pairs(str(tmp_path / "a.parquet"), tmp_path / "checked", ImportOptions(check=True))
    assert summary["rejected"] == {"jpg_0 cannot be decoded": 1}


# --- the table --------------------------------------------------------------------------------------------------------


def test_strict_stops_at_the_first_bad_row(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    source = jsonl_chosen(tmp_path / "in")
    with pytest.raises(UserError, match=r"row 2 \(.*\) cannot be used: jpg_1 no file: .*--strict"):
        import_pairs(str(source), tmp_path / "out", ImportOptions(strict=True))
    assert {p.name for p in tmp_path.iterdir()} == {"in"}


def test_an_import_is_known_again_and_nothing_else_is_overwritten(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "in").mkdir()
    source = str(pickapic(tmp_path / "in"))
    first = import_pairs(source, tmp_path / "out", ImportOptions())
    assert import_pairs(source, tmp_path / "out", ImportOptions()) == first
    assert "imported already" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"holds another import \(it differs in check\)"):
        import_pairs(source, tmp_path / "out", ImportOptions(check=True))
    with pytest.raises(UserError, match="exists already and is no import"):
        import_pairs(source, tmp_path / "in", ImportOptions())


def test_two_imports_at_a_time_are_kept_apart(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / ".out.partial").mkdir()
    with (tmp_path / ".out.partial" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is importing to"):
            import_pairs(str(pickapic(tmp_path / "in")), tmp_path / "out", ImportOptions())


def test_nothing_usable_is_an_error_that_says_why(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a"], "chosen": [BAD], "rejected": [L[0]]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"no usable pair; rejected: 1: jpg_0 not a picture \(1\)\. The first: row 0"):
        import_pairs(str(tmp_path / "a.parquet"), tmp_path / "out", ImportOptions())
    assert {p.name for p in tmp_path.iterdir()} == {"a.parquet"}


def test_a_part_that_is_gone_is_missed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    import_pairs(str(pickapic(tmp_path / "in")), tmp_path / "out", ImportOptions(), part_bytes=1)
    parts = reader.files(tmp_path / "out")
    assert [p.name for p in parts] == [f"pairs-0000{i}.parquet" for i in range(3)]
    parts[1].unlink()
    with pytest.raises(UserError, match="pairs-00001.parquet is gone, but import.json names it"):
        reader.files(tmp_path / "out")


def test_repetitions_swaps_and_balance_are_counted(tmp_path: Path) -> None:
    rows = [  # prompt, picture 0, picture 1, label_0
        ("a", 0, 1, 1.0),
        ("a", 0, 1, 1.0),  # again
        ("a", 1, 0, 0.0),  # swapped, same preference
        ("a", 1, 0, 1.0),  # swapped, and the other preferred
        ("b", 0, 1, 0.0),  # another prompt: another pair
        ("", 2, 3, 0.5),
        ("c", 2, 0, None),
    ]
    table = {
        "caption": [r[0] for r in rows],
        "jpg_0": [W[r[1]] for r in rows],
        "jpg_1": [W[r[2]] for r in rows],
        "label_0": [r[3] for r in rows],
    }
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    found = import_pairs(str(tmp_path / "a.parquet"), tmp_path / "out", ImportOptions())["statistics"]
    assert (found["repeated_pairs"], found["swapped_pairs"], found["contradicting_pairs"]) == (3, 2, 1)
    assert (found["labelled"], found["ties"], found["undecided"], found["first_preferred"]) == (6, 1, 1, 0.6)
    assert (found["pictures"], found["pictures_in_several_pairs"]) == (4, 3)
    assert (found["prompts"], found["pairs_of_commonest_prompt"], found["empty_prompts"]) == (4, 4, 1)
    assert (found["shorter_side"], found["unequal_sizes"]) == ([16, 16, 16], 0)


def test_paths_in_place_of_pictures(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    jsonl_chosen(tmp_path / "in")
    import_pairs(str(tmp_path / "in"), tmp_path / "out", ImportOptions(paths=True))
    assert pairs_of(tmp_path / "out") == [(f"p{i}", W[i], L[i]) for i in (0, 1, 3)]
    assert sum(file.stat().st_size for file in reader.files(tmp_path / "out")) < 10_000

    (tmp_path / "in" / "pics" / "w0.png").write_bytes(W[2])
    (tmp_path / "in" / "pics" / "w1.png").unlink()
    (tmp_path / "outside.png").write_bytes(W[3])
    (tmp_path / "in" / "pics" / "w3.png").unlink()
    (tmp_path / "in" / "pics" / "w3.png").symlink_to(tmp_path / "outside.png")
    reasons = [item.reason.partition(":")[0] for item in read_pairs(tmp_path / "out") if isinstance(item, Rejected)]
    assert reasons == ["jpg_0 has changed", "jpg_0 no file", "jpg_0 leaves its folder"]


def test_pictures_and_table_may_move_together(tmp_path: Path) -> None:
    (tmp_path / "here" / "in").mkdir(parents=True)
    jsonl_chosen(tmp_path / "here" / "in")
    import_pairs(str(tmp_path / "here" / "in"), tmp_path / "here" / "out", ImportOptions(paths=True))
    (tmp_path / "here").rename(tmp_path / "there")
    assert len(pairs_of(tmp_path / "there" / "out")) == 3
    (tmp_path / "there" / "in").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="names pictures below .*, which is gone: import again"):
        list(read_pairs(tmp_path / "there" / "out"))


KILLED = """
import os, signal, sys
from pathlib import Path
from smpo_fast.data.ingest.importer import ImportOptions, import_pairs
left = int(sys.argv[3])

def counted(function):
    def call(*args, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)
    return call

os.replace, os.rename, os.fsync = counted(os.replace), counted(os.rename), counted(os.fsync)
import_pairs(sys.argv[1], Path(sys.argv[2]), ImportOptions(), part_bytes=3000)
"""


def many(folder: Path, form: str) -> Path:
    """24 records of which every seventh is bad, as a tar of pairs or of single pictures."""
    members: list[tuple[str, bytes]] = []
    for i in range(24):
        content = BAD if i % 7 == 6 else picture(100 + i)
        if form == "pairs":
            members += [(f"{i:02d}.w.png", content), (f"{i:02d}.l.png", picture(200 + i)), (f"{i:02d}.txt", b"p%d" % i)]
        else:
            about = json.dumps({"prompt": f"p{i % 5}", "label": i % 2}).encode()
            members += [(f"{i:02d}.png", content), (f"{i:02d}.json", about)]
    return write_tar(folder / f"{form}.tar", members)


TWENTY = [int(n) for n in np.random.default_rng(0).integers(1, 15, 20)]


@pytest.mark.parametrize(
    ("form", "points"),
    [
        ("pairs", [9, 14, 11, 3]),
        ("single", [9, 14, 3]),
        pytest.param("pairs", TWENTY, marks=pytest.mark.slow),
        pytest.param("single", TWENTY, marks=pytest.mark.slow),
    ],
)
def test_a_kill_loses_and_repeats_nothing(tmp_path: Path, form: str, points: list[int]) -> None:
    """Killed before the n-th time that something is made to stay on the disk, again and again."""
    source = many(tmp_path, form)
    whole = import_pairs(str(source), tmp_path / "whole", ImportOptions(), part_bytes=3000)
    assert len(whole["parts"]) > 2
    kills = taken_up = 0
    for point in [*points, 10_000]:
        ended = subprocess.run(
            [sys.executable, "-c", KILLED, str(source), str(tmp_path / "out"), str(point)],
            capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        taken_up += "going on with an interrupted import" in ended.stdout
        if ended.returncode:
            assert ended.returncode == -signal.SIGKILL, ended.stderr
            kills += 1
            assert not (tmp_path / "out").exists() or (tmp_path / "out" / "import.json").is_file()
            continue
        assert stored(tmp_path / "out").equals(stored(tmp_path / "whole"))
        assert rejected(tmp_path / "out") == rejected(tmp_path / "whole")
        summaries = [json.loads((tmp_path / name / "import.json").read_text()) for name in ("out", "whole")]
        assert summaries[0] == summaries[1]
        assert not list(tmp_path.glob(".*partial"))
        shutil.rmtree(tmp_path / "out")
    assert kills >= len(points) // 2
    assert taken_up


def test_a_leftover_of_another_import_is_not_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = many(tmp_path, "pairs")
    with monkeypatch.context() as patch:
        patch.setattr(importer.TableWriter, "finish", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            import_pairs(str(source), tmp_path / "out", ImportOptions(), part_bytes=3000)
    assert (tmp_path / ".out.partial" / "pairs-00000.parquet").is_file()
    (tmp_path / "in").mkdir()
    import_pairs(str(pickapic(tmp_path / "in")), tmp_path / "out", ImportOptions())
    assert pairs_of(tmp_path / "out") == [(f"p{i}", W[i], L[i]) for i in (0, 1, 3)]


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    write_pictures(tmp_path / "in", w=W[0], l=L[0])
    source = manifest(tmp_path / "in", text=["a cat"], good=["w.png"], bad=["l.png"])
    words = ["import", source, "--columns", "chosen=good,rejected=bad", str(tmp_path / "out")]
    assert cli.main([*words, "--dry-run"]) == 0
    assert "row 0 (w.png/l.png): label_0 = 1.0, rewards = None, 24x16 and 24x16 px, 'a cat'" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert cli.main(["import", source, str(tmp_path / "out"), "--columns", "chosen"]) == 2
    assert "give meaning=column" in capsys.readouterr().err
    assert cli.main([*words, "--paths", "--strict"]) == 0
    assert pairs_of(tmp_path / "out") == [("a cat", W[0], L[0])]


MEASURED = """
import re, sys, time
from pathlib import Path
from smpo_fast.data.ingest.importer import ImportOptions, import_pairs

def resident():  # MB of this process's own memory; mapped files are the system's to take back
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

before, began = resident(), time.monotonic()
peak = before
import smpo_fast.data.ingest.importer as importer
checked = importer._checked

def watched(units, check):
    global peak
    for i, unit in enumerate(checked(units, check)):
        if i % 50 == 0:
            peak = max(peak, resident())
        yield unit

importer._checked = watched
summary = import_pairs(sys.argv[1], Path(sys.argv[2]), ImportOptions())
print("MEASURED", summary["pairs"], max(peak, resident()) - before, time.monotonic() - began)
"""


def padded(i: int, body: bytes = np.random.default_rng(0).bytes(100_000)) -> bytes:
    """100 kB, of which the head is a picture."""
    return picture(i, (64, 64), "JPEG") + body


def big_tables(rows: int) -> Iterator[pa.Table]:
    for start in range(0, rows, 500):
        part = range(start, start + 500)
        yield pa.table(
            {
                "caption": [f"prompt {i % 3000}" for i in part],
                "jpg_0": [padded(2 * i) for i in part],
                "jpg_1": [padded(2 * i + 1) for i in part],
                "label_0": [float(i % 2) for i in part],
            }
        )


def big_parquet(folder: Path, rows: int) -> None:
    schema = next(big_tables(500)).schema
    with pq.ParquetWriter(folder / "a.parquet", schema, compression="none") as writer:
        for table in big_tables(rows):
            writer.write_table(table, row_group_size=100)


def big_arrow(folder: Path, rows: int) -> None:
    with pa.ipc.new_stream(folder / "a.arrow", next(big_tables(500)).schema) as writer:
        for table in big_tables(rows):
            writer.write_table(table, max_chunksize=100)


def big_tar(folder: Path, rows: int) -> None:
    with tarfile.open(folder / "a.tar", "w") as archive:
        for i in range(rows):
            parts = {"jpg_0.jpg": padded(2 * i), "jpg_1.jpg": padded(2 * i + 1), "label_0.txt": b"1"}
            add_sample(archive, i, parts | {"txt": b"prompt %d" % (i % 3000)})


def big_singles(folder: Path, rows: int) -> None:
    """The winners of all prompts, then their losers."""
    with tarfile.open(folder / "a.tar", "w") as archive:
        for i in range(2 * rows):
            add_sample(archive, i, {"jpg": padded(i), "cls": b"%d" % (i < rows), "txt": b"prompt %d" % (i % rows)})


def add_sample(archive: tarfile.TarFile, i: int, parts: dict[str, bytes]) -> None:
    for name, part in parts.items():
        info = tarfile.TarInfo(f"{i:05d}.{name}")
        info.size = len(part)
        archive.addfile(info, io.BytesIO(part))


@pytest.mark.slow
@pytest.mark.parametrize("make", [big_parquet, big_arrow, big_tar, big_singles], ids=lambda f: f.__name__)
def test_memory_is_flat_over_ten_thousand_pairs(tmp_path: Path, make: Callable[[Path, int], None]) -> None:
    growth = {}
    for rows in (1_000, 10_000):
        (tmp_path / "in").mkdir()
        make(tmp_path / "in", rows)
        code = [sys.executable, "-c", MEASURED, str(tmp_path / "in"), str(tmp_path / "out")]
        ended = subprocess.run(code, capture_output=True, text=True)
        for folder in ("in", "out"):
            shutil.rmtree(tmp_path / folder, ignore_errors=True)  # 4 GB
        assert ended.returncode == 0, ended.stderr
        pairs, growth[rows], seconds = map(float, ended.stdout.split()[-3:])
        print(f"{make.__name__}: {pairs:.0f} pairs, {growth[rows]:.0f} MB more, {pairs / seconds:.0f} pairs/s")
        assert pairs == rows
    assert growth[10_000] < growth[1_000] + 20 < 200  # MB; the pictures are 0.2 and 2 GB
