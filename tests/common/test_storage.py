"""Files are written completely or not at all."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smpo_fast.common.storage import atomic_write, publish_folder, remove_drafts, replace_folder, write_text


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "f.txt"
    write_text(file, "old")
    with pytest.raises(OSError, match="full"), atomic_write(file) as draft:
        draft.write_text("half")
        raise OSError("the disk is full")
    assert file.read_text() == "old"
    assert [f.name for f in tmp_path.iterdir()] == ["f.txt"]


def test_the_draft_of_a_killed_process_is_removed_and_nothing_else(tmp_path: Path) -> None:
    if not os.fork():
        with atomic_write(tmp_path / "f.txt") as draft:
            draft.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.wait()
    (tmp_path / ".export.tmp").mkdir()  # an export in the making
    assert len(list(tmp_path.glob("f.txt.*.tmp"))) == 1
    remove_drafts(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == [".export.tmp"]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is synced and renamed, in order, each with its name at that time."""
    seen: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def synced(handle: int) -> None:
        seen.append(("sync", Path(f"/proc/self/fd/{handle}").resolve().name))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    for name, move in (("rename", rename), ("replace", replace)):
        monkeypatch.setattr(os, name, lambda a, b, m=move: seen.append(("rename", Path(a).name)) or m(a, b))
    return seen


def test_a_file_is_on_disk_before_it_gets_its_name(tmp_path: Path, events: list[tuple[str, str]]) -> None:
    write_text(tmp_path / "f.txt", "content")
    (synced, renamed) = events
    assert synced == ("sync", renamed[1]) and renamed[0] == "rename" and renamed[1].endswith(".tmp")


def test_a_published_folder_and_its_name_are_on_disk(tmp_path: Path, events: list[tuple[str, str]]) -> None:
    (tmp_path / "building" / "inner").mkdir(parents=True)
    publish_folder(tmp_path / "building", tmp_path / "target")
    assert set(events[:2]) == {("sync", "inner"), ("sync", "building")}
    assert events[2:] == [("rename", "building"), ("sync", tmp_path.name)]


def test_while_a_folder_is_replaced_the_earlier_or_the_new_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    building, target = tmp_path / ".target.tmp", tmp_path / "target"
    for folder in (building, target):
        folder.mkdir()
        (folder / "f.txt").write_text(folder.name)
    moments = []

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*words: Any, **more: Any) -> Any:
            result = function(*words, **more)
            moments.append((target / "f.txt").read_text())
            return result

        return call

    monkeypatch.setattr(shutil, "rmtree", watched(shutil.rmtree))
    for name in ("rename", "replace", "fsync"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    replace_folder(building, target)
    assert moments[0] == "target" and moments[-1] == ".target.tmp"
    assert [file.name for file in tmp_path.iterdir()] == ["target"]
