"""Files are written completely or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from smpo_fast.common.storage import atomic_write, write_text


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "f.txt"
    write_text(file, "old")
    with pytest.raises(OSError, match="full"), atomic_write(file) as draft:
        draft.write_text("half")
        raise OSError("the disk is full")
    assert file.read_text() == "old"
    assert [f.name for f in tmp_path.iterdir()] == ["f.txt"]
