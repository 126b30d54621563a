"""Archives that promise more than they hold, or more than fits in memory: bounded time and memory, clear reasons."""

from __future__ import annotations

import errno
import gzip
import os
import tarfile
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.import_sources import (
    LOSERS,
    WINNERS,
    chosen_parquet,
    jsonl_chosen,
    rejected_rows,
    stored_pairs,
    tar_letters,
    winners_and_losers,
)

from smpo_fast import cli
from smpo_fast.common.errors import DataError, EnvironmentProblem
from smpo_fast.data.ingest import tar
from smpo_fast.data.ingest.importer import ImportOptions, import_pairs
from smpo_fast.data.pairs import reader

END = bytes(1024)


def member(name: str, content: bytes, kind: bytes = tarfile.REGTYPE, size: int | None = None) -> bytes:
    """A member as it is in an archive; ``size``: what its header says, if not the truth."""
    info = tarfile.TarInfo(name)
    info.size, info.type = len(content) if size is None else size, kind
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def sample(i: int, *more: bytes) -> bytes:
    pair = member(f"{i}.w.png", WINNERS[i]) + member(f"{i}.l.png", LOSERS[i])
    return pair + member(f"{i}.txt", b"p%d" % i) + b"".join(more)


def prompts(out: Path) -> list[str]:
    return [prompt for prompt, _, _ in stored_pairs(out)]


def test_neighbouring_samples_of_one_name_are_two(tmp_path: Path) -> None:
    twice = [
        member("same.w.png", WINNERS[i]) + member("same.l.png", LOSERS[i]) + member("same.txt", b"p") for i in (0, 1)
    ]
    (tmp_path / "a.tar").write_bytes(b"".join(twice) + END)
    assert import_pairs(str(tmp_path / "a.tar"), tmp_path / "out", ImportOptions())["pairs"] == 2


def test_numbered_members_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"".join(member(f"s.{i}.png", b"%d" % i) for i in range(12)) + END)
    (sample,) = tar.read_tar(fsspec.filesystem("file"), str(tmp_path / "a.tar"))
    assert isinstance(sample, dict) and sample["images"] == [b"%d" % i for i in range(12)]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("size", [2**33, 2**35, 2**62])
def test_a_member_larger_than_the_archive_does_not_keep_the_import_busy(tmp_path: Path, size: int) -> None:
    (tmp_path / "a.tar").write_bytes(sample(0) + sample(1) + member("2.w.png", b"", size=size) + END)
    summary = import_pairs(str(tmp_path / "a.tar"), tmp_path / "out", ImportOptions())
    assert prompts(tmp_path / "out") == ["p0"], "the last sample may lack a member"
    assert summary["rejected"] == {"refused": 1, "damaged": 1}
    assert "the archive ends within a member" in rejected_rows(tmp_path / "out")[2]


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_large_headers_are_not_read(tmp_path: Path, kind: bytes) -> None:
    content = b"9000000 comment=" + bytes(16 << 20)
    with gzip.open(tmp_path / "a.tar.gz", "wb", 1) as stream:
        stream.write(sample(0) + sample(1) + member("pax", content, kind) + sample(2) + END)
    tracemalloc.start()
    try:
        import_pairs(str(tmp_path / "a.tar.gz"), tmp_path / "out", ImportOptions())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < len(content) / 2
    assert prompts(tmp_path / "out") == ["p0"]
    assert "an extended header of 167" in rejected_rows(tmp_path / "out")[1]


def test_a_chain_of_headers_is_damage(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(sample(0) + sample(1) + member("x", b"y", tarfile.GNUTYPE_LONGNAME) * 3000 + END)
    import_pairs(str(tmp_path / "a.tar"), tmp_path / "out", ImportOptions())
    assert prompts(tmp_path / "out") == ["p0"]
    assert rejected_rows(tmp_path / "out")[1].startswith("damaged: a.tar cannot be read from sample '1' on")


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ([member(f"1.{c}.txt", bytes(400)) for c in "abc"], "has more than 0 MB of text"),
        ([member(f"1.{c}.png", bytes(4000)) for c in "abcdef"], "has more than 0 MB"),
        ([member(f"1.{i}.npy", b"") for i in range(60)], "has more than 50 members"),
    ],
)
def test_members_of_one_sample_do_not_add_up_without_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: Sequence[bytes], reason: str
) -> None:
    monkeypatch.setattr(tar, "_MAX_TEXT_BYTES", 1000)
    monkeypatch.setattr(tar, "_MAX_SAMPLE_BYTES", 20_000)
    monkeypatch.setattr(tar, "_MAX_SAMPLE_MEMBERS", 50)
    (tmp_path / "a.tar").write_bytes(sample(0) + sample(1, *more) + sample(2) + END)
    import_pairs(str(tmp_path / "a.tar"), tmp_path / "out", ImportOptions())
    assert prompts(tmp_path / "out") == ["p0", "p2"]
    assert rejected_rows(tmp_path / "out") == {1: f"too large: sample '1' {reason}"}


def test_members_that_are_not_used_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    extract = tarfile.TarFile.extractfile

    def noting(self: tarfile.TarFile, info: tarfile.TarInfo) -> object:
        read.append(info.name)
        return extract(self, info)

    monkeypatch.setattr(tarfile.TarFile, "extractfile", noting)
    (tmp_path / "a.tar").write_bytes(sample(0, member("0.npy", bytes(5000)), member("0.json", b"{}")) + END)
    import_pairs(str(tmp_path / "a.tar"), tmp_path / "out", ImportOptions())
    assert prompts(tmp_path / "out") == ["p0"]
    assert "0.json" in read and "0.npy" not in read


def test_nothing_but_damage_is_an_error_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(member("0.w.png", b"", size=2**40))
    with pytest.raises(DataError, match="has no readable record: (refused|damaged)"):
        import_pairs(str(tmp_path / "a.tar"), tmp_path / "out", ImportOptions())


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN])
@pytest.mark.parametrize(
    ("form", "owner", "name"),
    [
        (jsonl_chosen, Path, "read_bytes"),
        (chosen_parquet, pq.ParquetFile, "iter_batches"),
        (chosen_parquet, pa, "OSFile"),
        (tar_letters, tarfile, "open"),
        (winners_and_losers, Path, "read_bytes"),
    ],
)
def test_a_machine_that_has_run_out_rejects_no_record(
    form: Callable[[Path], Any], owner: Any, name: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The records are good: left out, they would be missing from the table for ever."""
    (tmp_path / "in").mkdir()
    source = form(tmp_path / "in") or tmp_path / "in"

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, refuse)
        with pytest.raises(EnvironmentProblem, match=os.strerror(number)):
            import_pairs(str(source), tmp_path / "out", ImportOptions())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in"], "nothing to continue with"
    assert import_pairs(str(source), tmp_path / "out", ImportOptions())["pairs"] == 3


def test_an_error_has_a_line_of_its_own_below_the_progress_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The traceback still holds the generator that draws the bar when the error is printed."""
    source, records = jsonl_chosen(tmp_path), (tmp_path / "a.jsonl").read_text(encoding="utf-8-sig")
    (tmp_path / "a.jsonl").write_text(records * 10)  # more than are read ahead

    def refuse(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert cli.main(["import", str(source), str(tmp_path / "out")]) == 2
    said = capfd.readouterr().err.splitlines()
    assert any(line.startswith("import: ") for line in said) and said[-1].startswith("error: ")


def test_a_table_that_cannot_be_opened_for_want_of_descriptors_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = chosen_parquet(tmp_path)
    monkeypatch.setattr(pq, "ParquetFile", lambda *_, **__: (_ for _ in ()).throw(OSError(24, "Too many open files")))
    with pytest.raises(EnvironmentProblem, match="raise its limit"):
        reader.count_rows(table)
