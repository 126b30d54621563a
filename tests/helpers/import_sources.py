"""Preference data in every container and format that can be imported, and what an import made of it."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from helpers.images import noise
from smpo_fast.data.pairs import reader
from smpo_fast.data.pairs.pair import RawPair
from smpo_fast.data.pairs.reader import read_pairs

WINNERS, LOSERS = [noise(10 + i) for i in range(4)], [noise(20 + i) for i in range(4)]
BAD = b"not a picture at all"


def stored_pairs(out: Path) -> list[tuple[str, bytes, bytes]]:
    """Prompt, preferred picture and the other of every pair."""
    found = []
    for pair in read_pairs(out):
        assert isinstance(pair, RawPair), pair
        assert pair.label in (0.0, 1.0)
        better = 0 if pair.label else 1
        found.append((pair.prompt, pair.images[better], pair.images[1 - better]))
    return found


def stored_table(out: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(file) for file in reader.files(out))


def rejected_rows(out: Path) -> dict[int, str]:
    return {row["row"]: row["reason"] for row in pq.read_table(out / "rejected.parquet").to_pylist()}


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write_images(folder: Path, **pictures: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in pictures.items():
        (folder / f"{name}.png").write_bytes(content)


# --- one source of every format: the functions return its path, and its third record is bad -----------------------


def pickapic(folder: Path) -> Path:
    table = {
        "caption": ["p0", "p1", "p2", "p3"],
        "jpg_0": [WINNERS[0], LOSERS[1], None, WINNERS[3]],
        "jpg_1": [LOSERS[0], WINNERS[1], LOSERS[2], LOSERS[3]],
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
            "chosen": images([WINNERS[0], WINNERS[1], b"", WINNERS[3]]),
            "rejected": images([LOSERS[0], LOSERS[1], LOSERS[2], LOSERS[3]]),
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
    members = [
        (f"a/{i:03d}.{side}.png", content) for i in range(4) for side, content in (("w", WINNERS[i]), ("l", LOSERS[i]))
    ]
    members += [(f"a/{i:03d}.txt", f"p{i}\n".encode()) for i in range(4)]
    members.sort()
    members[members.index(("a/002.w.png", WINNERS[2]))] = ("a/002.w.png", BAD)
    return write_tar(folder / "a.tar", members)


def tar_numbers(folder: Path) -> Path:
    members = []
    for i in range(4):
        first, second = (WINNERS[i], LOSERS[i]) if i % 2 else (LOSERS[i], WINNERS[i])
        label = "x" if i == 2 else i % 2
        about = json.dumps({"caption": f"p{i}", "label_0": label}).encode()
        members += [(f"{i}.0.png", first), (f"{i}.1.png", second), (f"{i}.json", about), (f"{i}.npy", b"ignored")]
    return write_tar(folder / "a.tar.gz", members, "w:gz")


def tar_pickapic(folder: Path) -> Path:
    members = []
    for i in range(4):
        members += [
            (f"{i}.jpg_0.jpg", noise(i, kind="JPEG")),
            (f"{i}.jpg_1.jpg", LOSERS[i]),
            (f"{i}.label_0.txt", b"1" if i != 2 else b"7"),
            (f"{i}.original_prompt.txt", f"p{i}".encode()),
        ]
    return write_tar(folder / "00000.tar", members)


def manifest_pictures(folder: Path) -> None:
    write_images(
        folder / "pics", **{f"w{i}": WINNERS[i] for i in range(4)}, **{f"l{i}": LOSERS[i] for i in range(4) if i != 2}
    )


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
        "images": [[{"bytes": x, "path": None} for x in (LOSERS[i], WINNERS[i])] for i in range(4)],
        "ranking": [[2, 1], [2, 1], [2], [4, 3]],
    }
    pq.write_table(pa.table(table), folder / "a.parquet")
    return folder


def winners_and_losers(folder: Path) -> Path:
    write_images(folder / "w", **{f"p{i}": WINNERS[i] for i in range(4)})
    write_images(folder / "l", **{f"p{i}": LOSERS[i] for i in range(4) if i != 2})
    for i in range(4):
        (folder / ("", "w", "l", "w")[i] / f"p{i}.txt").write_text(f"p{i}\n")
    return folder


def suffixes(folder: Path) -> Path:
    names = {0: "p0-rejected", 1: "p1-rejectedlabel", 3: "p3-rejected-2"}
    write_images(folder, **{f"p{i}": WINNERS[i] for i in range(4)}, **{name: LOSERS[i] for i, name in names.items()})
    for i in range(4):
        (folder / f"p{i}.txt").write_text(f"p{i}")
    return folder


LABELS = [("a", 1), ("b", 0), ("a", 0), ("c", 1), ("a", 0), ("b", 1), ("b", None)]


def single_csv(folder: Path) -> Path:
    write_images(folder, **{f"x{i}": noise(i) for i in range(len(LABELS))})
    words = {1: "exclusive_win", 0: "exclusive_lose", None: ""}
    rows = [f"x{i}.png,{prompt},{words[label]}" for i, (prompt, label) in enumerate(LABELS)]
    (folder / "a.csv").write_text("\r\n".join(["file_path,caption,label", *rows]))
    return folder / "a.csv"


def single_tar(folder: Path) -> Path:
    """Bytes of pictures that belong together lie apart, so they wait on the disk."""
    members = []
    for i, (prompt, label) in enumerate(LABELS):
        about = json.dumps({"prompt": prompt, "label": None if label is None else bool(label)}).encode()
        members += [(f"{i}.png", noise(i)), (f"{i}.json", about)]
    return write_tar(folder / "a.tar", members)


def manifest(folder: Path, **columns: Sequence[Any]) -> str:
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "a.jsonl")
