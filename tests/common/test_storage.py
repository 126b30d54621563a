"""Files are written completely or not at all."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from smpo_fast.common.storage import atomic_write, remove_drafts, write_text


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
