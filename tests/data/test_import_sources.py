"""Where sources are found: files, folders, the hub, and remote folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest
from helpers.import_sources import (
    LOSERS,
    WINNERS,
    arrow_file,
    chosen_parquet,
    chosen_table,
    hpd_json,
    jsonl_chosen,
    manifest,
    pickapic,
    rejected_rows,
    saved_to_disk,
    stored_pairs,
    tar_letters,
    winners_and_losers,
    write_images,
)

from smpo_fast.common import remote
from smpo_fast.common.errors import UserError
from smpo_fast.config.commands import ImportOptions
from smpo_fast.data.ingest.importer import dry_run, import_pairs


def test_folders_of_several_kinds_or_splits(tmp_path: Path) -> None:
    for name in ("test-00000-of-00001.parquet", "dev-00000-of-00001.parquet"):
        pq.write_table(chosen_table(), tmp_path / name)
    with pytest.raises(UserError, match="has the splits dev, test: choose one with --split"):
        dry_run(str(tmp_path), ImportOptions())
    assert "split test" in str(dry_run(str(tmp_path), ImportOptions(split="test")))
    jsonl_chosen(tmp_path)
    with pytest.raises(UserError, match=r"several kinds of data \(.*parquet: .*json: a.jsonl.*--container"):
        dry_run(str(tmp_path), ImportOptions(split="test"))
    assert ": json, 1 file" in str(dry_run(str(tmp_path), ImportOptions(container="json")))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.md").write_text("nothing")
    with pytest.raises(UserError, match="holds nothing to import .* it holds: notes.md"):
        dry_run(str(tmp_path / "empty"), ImportOptions())


def test_names_that_mean_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist: give a file, a folder, an address"):
        dry_run(str(tmp_path / "gone.parquet"), ImportOptions())
    (tmp_path / "a.bin").write_bytes(b"\x80\x04what")
    with pytest.raises(UserError, match="tell which container it is: name it with --container"):
        dry_run(str(tmp_path / "a.bin"), ImportOptions())
    with pytest.raises(UserError, match="Protocol not known"):
        dry_run("nowhere://bucket/a.parquet", ImportOptions())


def test_containers_are_known_by_their_first_bytes(tmp_path: Path) -> None:
    for i, make in enumerate((chosen_parquet, arrow_file, tar_letters)):
        (tmp_path / str(i)).mkdir()
        bare = make(tmp_path / str(i)).rename(tmp_path / f"{i}.bin")
        assert "format chosen" in str(dry_run(str(bare), ImportOptions()))


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
    assert [p for p, _, _ in stored_pairs(tmp_path / "out")] == ["p0", "p1", "p3"]
    assert (asked["name"], asked["repo_type"], asked["revision"]) == ("someone/pairs", "dataset", "v2")
    assert {"*.parquet", "*.jsonl", "*.png"} <= set(asked["allow_patterns"])
    assert not any("py" in pattern or "pkl" in pattern for pattern in asked["allow_patterns"])
    with pytest.raises(UserError, match="not in a permanent folder"):
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
    assert "split test" in str(dry_run("someone/pairs", ImportOptions(split="test")))
    assert [file.name for file in folder.iterdir()] == ["test-00000-of-00001.parquet"]


def test_the_hub_s_refusal_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, **options: Any) -> str:
        raise remote.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(remote, "snapshot_download", refuse)
    with pytest.raises(UserError, match="'someone/gone' is not a local folder, and the hub answered: no connection"):
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
    assert stored_pairs(tmp_path / "out") == [(f"p{i}", WINNERS[i], LOSERS[i]) for i in (0, 1, 3)]
    assert sum(summary["rejected"].values()) == 1
    with pytest.raises(UserError, match="--paths"):
        import_pairs("memory://bucket", tmp_path / "other", ImportOptions(paths=True))


def test_a_changed_image_in_a_remote_folder_is_noticed(tmp_path: Path, bucket: Any) -> None:
    (tmp_path / "in").mkdir()
    jsonl_chosen(tmp_path / "in")
    source = bucket(tmp_path / "in")
    import_pairs(source, tmp_path / "out", ImportOptions())
    import_pairs(source, tmp_path / "out", ImportOptions())
    fsspec.filesystem("memory").pipe_file("/bucket/pics/w0.png", WINNERS[2])
    with pytest.raises(UserError, match="it differs in source"):
        import_pairs(source, tmp_path / "out", ImportOptions())


def test_paths_in_a_bucket_stay_in_it(tmp_path: Path, bucket: Any) -> None:
    fsspec.filesystem("memory").pipe_file("/secret/w.png", WINNERS[0])
    write_images(tmp_path, w=WINNERS[0], l=LOSERS[0])
    losers = ["l.png", "memory://bucket/l.png", "../secret/w.png", "/secret/w.png", "memory://secret/w.png", "gone.png"]
    manifest(tmp_path, prompt=["p"] * 6, chosen=["w.png"] * 6, rejected=losers)
    import_pairs(f"{bucket(tmp_path)}/a.jsonl", tmp_path / "out", ImportOptions())
    assert stored_pairs(tmp_path / "out") == [("p", WINNERS[0], LOSERS[0])] * 2
    assert [r.partition(":")[0] for r in rejected_rows(tmp_path / "out").values()] == [
        *["jpg_1 leaves its folder"] * 3,
        "jpg_1 no file",
    ]
