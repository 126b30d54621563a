"""The meaning of columns is detected, or an error says what was found and how to name it."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.import_sources import (
    LOSERS,
    WINNERS,
    manifest,
    stored_pairs,
    write_images,
)

from smpo_fast.common.errors import UserError
from smpo_fast.config.commands import ImportOptions
from smpo_fast.data.ingest.importer import dry_run, import_pairs


def test_unknown_columns_are_listed_and_can_be_named(tmp_path: Path) -> None:
    write_images(tmp_path, w=WINNERS[0], l=LOSERS[0])
    source = manifest(tmp_path, description=["p"], good=["w.png"], worse=["l.png"])
    with pytest.raises(UserError, match=r"Found: description, good, worse\. Needed: pairs: prompt .*--columns"):
        import_pairs(source, tmp_path / "out", ImportOptions())
    names = {"prompt": "description", "chosen": "good", "rejected": "worse"}
    import_pairs(source, tmp_path / "out", ImportOptions(columns=names))
    assert stored_pairs(tmp_path / "out") == [("p", WINNERS[0], LOSERS[0])]
    with pytest.raises(UserError, match="'best' is none of prompt, image_0"):
        dry_run(source, ImportOptions(columns={"best": "good"}))
    with pytest.raises(UserError, match="no such column; it has description, good, worse"):
        dry_run(source, ImportOptions(columns={"chosen": "god"}))


def test_what_can_be_read_in_two_ways_is_asked_for(tmp_path: Path) -> None:
    columns = {"prompt": ["p"], "image_0": ["w.png"], "image_1": ["l.png"]}
    both = manifest(tmp_path, **columns, label_0=[1], chosen=["w.png"], rejected=["l.png"])
    with pytest.raises(UserError, match="can be read as pairs: .* and as chosen: .*choose with --format"):
        dry_run(both, ImportOptions())
    assert "format chosen" in str(dry_run(both, ImportOptions(format="chosen")))
    two = manifest(tmp_path, **columns, text=["q"], label_0=[1])
    with pytest.raises(UserError, match="prompt could be prompt or text: say which, --columns prompt=prompt"):
        dry_run(two, ImportOptions())
    open_label = manifest(tmp_path, **columns, label=[1])
    with pytest.raises(UserError, match="'label' may say which image is better, but not how"):
        dry_run(open_label, ImportOptions())
    assert "label_1   = column 'label'" in str(dry_run(open_label, ImportOptions(columns={"label_1": "label"})))
