"""The import program: resuming, refusing, reporting, and bounded memory."""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.images import noise
from helpers.import_sources import (
    BAD,
    LOSERS,
    WINNERS,
    csv_pairs,
    hpd_json,
    jsonl_chosen,
    manifest,
    pickapic,
    rejected_rows,
    stored_pairs,
    stored_table,
    winners_and_losers,
    write_images,
    write_tar,
)

from smpo_fast import cli
from smpo_fast.common import storage
from smpo_fast.common.errors import DataError, UserError
from smpo_fast.common.storage import unsealed
from smpo_fast.config.commands import ImportOptions
from smpo_fast.data.ingest.importer import import_pairs
from smpo_fast.data.pairs import reader, writer
from smpo_fast.data.pairs.pair import Rejected
from smpo_fast.data.pairs.reader import read_pairs


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
    with pytest.raises(UserError, match=r"holds another table \(it differs in check\)"):
        import_pairs(source, tmp_path / "out", ImportOptions(check=True))
    with pytest.raises(UserError, match="exists already and is not an import"):
        import_pairs(source, tmp_path / "in", ImportOptions())


def change_image(folder: Path) -> None:
    (folder / "w" / "p0.png").write_bytes(LOSERS[2])


def remove_image(folder: Path) -> None:
    (folder / "l" / "p1.png").unlink()


def change_prompt(folder: Path) -> None:
    (folder / "p0.txt").write_text("q0\n")


@pytest.mark.parametrize("change", [change_image, remove_image, change_prompt], ids=lambda f: f.__name__)
def test_a_changed_folder_is_not_imported_already(tmp_path: Path, change: Callable[[Path], None]) -> None:
    (tmp_path / "in").mkdir()
    source = winners_and_losers(tmp_path / "in")
    import_pairs(str(source), tmp_path / "out", ImportOptions())
    import_pairs(str(source), tmp_path / "out", ImportOptions())
    folders = {folder: folder.stat() for folder in (source, source / "w", source / "l")}
    change(source)
    for folder, facts in folders.items():
        os.utime(folder, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    with pytest.raises(DataError, match=r"out holds another table \(it differs in source\)"):
        import_pairs(str(source), tmp_path / "out", ImportOptions())


@pytest.mark.parametrize("make", [jsonl_chosen, csv_pairs, hpd_json], ids=lambda f: f.__name__)
def test_an_image_behind_an_unchanged_manifest_is_noticed(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    (tmp_path / "in").mkdir()
    source = make(tmp_path / "in")
    import_pairs(str(source), tmp_path / "out", ImportOptions())
    import_pairs(str(source), tmp_path / "out", ImportOptions())
    image = tmp_path / "in" / "pics" / "w3.png"
    image.write_bytes(image.read_bytes()[::-1])  # of the same size
    with pytest.raises(DataError, match="it differs in source"):
        import_pairs(str(source), tmp_path / "out", ImportOptions())


def test_a_manifest_is_known_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    source = csv_pairs(tmp_path / "in")
    import_pairs(str(source), tmp_path / "out", ImportOptions())
    facts = source.stat()
    source.write_bytes(source.read_bytes().replace(b"p0", b"q0"))
    os.utime(source, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert source.stat().st_size == facts.st_size
    with pytest.raises(DataError, match="it differs in source"):
        import_pairs(str(source), tmp_path / "out", ImportOptions())


def test_an_interrupted_import_starts_again_when_an_image_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    source = str(jsonl_chosen(tmp_path / "in"))
    with monkeypatch.context() as patch:
        patch.setattr(writer.TableWriter, "finish", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            import_pairs(source, tmp_path / "out", ImportOptions(), part_bytes=1)
    (tmp_path / "in" / "pics" / "w0.png").write_bytes(WINNERS[2])
    import_pairs(source, tmp_path / "out", ImportOptions())
    assert stored_pairs(tmp_path / "out")[0] == ("p0", WINNERS[2], LOSERS[0])


def forget_fingerprint(out: Path) -> None:
    """Make an import look like one by a version that wrote neither a fingerprint nor a seal."""
    summary = unsealed(json.loads((out / "import.json").read_text()))
    del summary["source"]["fingerprint"]
    (out / "import.json").write_text(json.dumps(summary))


def test_an_import_by_an_earlier_version(tmp_path: Path) -> None:
    for name in ("bytes", "paths"):
        (tmp_path / name).mkdir()
    by_bytes, by_path = pickapic(tmp_path / "bytes"), jsonl_chosen(tmp_path / "paths")
    for source in (by_bytes, by_path):
        import_pairs(str(source), tmp_path / f"{source.name}.out", ImportOptions())
        forget_fingerprint(tmp_path / f"{source.name}.out")
    import_pairs(str(by_bytes), tmp_path / "bytes.out", ImportOptions())
    with pytest.raises(DataError, match="imported by an earlier version, .* the state of its 8 image files"):
        import_pairs(str(by_path), tmp_path / "paths.out", ImportOptions())
    with pytest.raises(DataError, match="differs in check"):
        import_pairs(str(by_path), tmp_path / "paths.out", ImportOptions(check=True))
    (by_bytes / "train-00000-of-00001.parquet").touch()
    with pytest.raises(DataError, match="differs in source"):
        import_pairs(str(by_bytes), tmp_path / "bytes.out", ImportOptions())


def test_a_summary_that_is_no_object_is_damage(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    source = str(pickapic(tmp_path / "in"))
    import_pairs(source, tmp_path / "out", ImportOptions())
    (tmp_path / "out" / "import.json").write_text("[]")
    with pytest.raises(DataError, match="import.json is damaged .*: remove"):
        import_pairs(source, tmp_path / "out", ImportOptions())


def test_two_imports_at_a_time_are_kept_apart(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / ".out.partial").mkdir()
    with (tmp_path / ".out.partial" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is importing to"):
            import_pairs(str(pickapic(tmp_path / "in")), tmp_path / "out", ImportOptions())


def test_nothing_usable_is_an_error_that_says_why(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a"], "chosen": [BAD], "rejected": [LOSERS[0]]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"no usable pair; rejected: 1: jpg_0 not a picture \(1\)\. The first: row 0"):
        import_pairs(str(tmp_path / "a.parquet"), tmp_path / "out", ImportOptions())
    assert {p.name for p in tmp_path.iterdir()} == {"a.parquet"}


def test_every_file_of_a_table_is_on_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, publish = set[str](), writer.publish_folder
    monkeypatch.setattr(writer, "sync", lambda path: synced.add(path.name.removesuffix(".tmp")) or storage.sync(path))

    def checked(building: Path, out: Path) -> None:
        parts = {file.name for file in building.glob("*.parquet")}
        assert len(parts) > 2 and parts <= synced
        publish(building, out)

    monkeypatch.setattr(writer, "publish_folder", checked)
    import_pairs(str(pickapic(tmp_path)), tmp_path / "out", ImportOptions(), part_bytes=1)


def test_a_part_that_is_gone_is_missed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    import_pairs(str(pickapic(tmp_path / "in")), tmp_path / "out", ImportOptions(), part_bytes=1)
    parts = reader.files(tmp_path / "out")
    assert [p.name for p in parts] == [f"pairs-0000{i}.parquet" for i in range(3)]
    parts[1].unlink()
    with pytest.raises(UserError, match="pairs-00001.parquet is missing, but import.json names it"):
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
        "jpg_0": [WINNERS[r[1]] for r in rows],
        "jpg_1": [WINNERS[r[2]] for r in rows],
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
    assert stored_pairs(tmp_path / "out") == [(f"p{i}", WINNERS[i], LOSERS[i]) for i in (0, 1, 3)]
    assert sum(file.stat().st_size for file in reader.files(tmp_path / "out")) < 10_000

    (tmp_path / "in" / "pics" / "w0.png").write_bytes(WINNERS[2])
    (tmp_path / "in" / "pics" / "w1.png").unlink()
    (tmp_path / "outside.png").write_bytes(WINNERS[3])
    (tmp_path / "in" / "pics" / "w3.png").unlink()
    (tmp_path / "in" / "pics" / "w3.png").symlink_to(tmp_path / "outside.png")
    reasons = [item.reason.partition(":")[0] for item in read_pairs(tmp_path / "out") if isinstance(item, Rejected)]
    assert reasons == ["jpg_0 has changed", "jpg_0 no file", "jpg_0 leaves its folder"]


def test_pictures_and_table_may_move_together(tmp_path: Path) -> None:
    (tmp_path / "here" / "in").mkdir(parents=True)
    jsonl_chosen(tmp_path / "here" / "in")
    import_pairs(str(tmp_path / "here" / "in"), tmp_path / "here" / "out", ImportOptions(paths=True))
    (tmp_path / "here").rename(tmp_path / "there")
    assert len(stored_pairs(tmp_path / "there" / "out")) == 3
    (tmp_path / "there" / "in").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="stores paths of images in .*, which does not exist: import again"):
        list(read_pairs(tmp_path / "there" / "out"))


KILLED = """
import os, signal, sys
from pathlib import Path
from smpo_fast.config.commands import ImportOptions
from smpo_fast.data.ingest.importer import import_pairs
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
        content = BAD if i % 7 == 6 else noise(100 + i)
        if form == "pairs":
            members += [
                (f"{i:02d}.w.png", content),
                (f"{i:02d}.l.png", noise(200 + i)),
                (f"{i:02d}.txt", b"p%d" % i),
            ]
        else:
            about = json.dumps({"prompt": f"p{i % 5}", "label": i % 2}).encode()
            members += [(f"{i:02d}.png", content), (f"{i:02d}.json", about)]
    return write_tar(folder / f"{form}.tar", members)


TWENTY = [int(n) for n in np.random.default_rng(0).integers(1, 15, 20)]


@pytest.mark.parametrize(
    ("form", "points"),
    [
        ("pairs", [9, 3]),
        ("single", [14]),
        pytest.param("pairs", [14, 11, *TWENTY], marks=pytest.mark.slow),
        pytest.param("single", [9, 3, *TWENTY], marks=pytest.mark.slow),
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
        taken_up += "resuming an interrupted import" in ended.stdout
        if ended.returncode:
            assert ended.returncode == -signal.SIGKILL, ended.stderr
            kills += 1
            assert not (tmp_path / "out").exists() or (tmp_path / "out" / "import.json").is_file()
            continue
        assert stored_table(tmp_path / "out").equals(stored_table(tmp_path / "whole"))
        assert rejected_rows(tmp_path / "out") == rejected_rows(tmp_path / "whole")
        summaries = [json.loads((tmp_path / name / "import.json").read_text()) for name in ("out", "whole")]
        assert summaries[0] == summaries[1]
        assert not list(tmp_path.glob(".*partial"))
        shutil.rmtree(tmp_path / "out")
    assert kills >= len(points) // 2
    assert taken_up


def test_a_kill_just_after_publishing_leaves_nothing_for_good(tmp_path: Path) -> None:
    source = many(tmp_path, "pairs")
    import_pairs(str(source), tmp_path / "out", ImportOptions())
    table = sorted(tmp_path.glob("out/*"))
    for leftover in ("lock", "identity.json", "pairs-00000.parquet.json", "rejected-pairs-00000.parquet"):
        (tmp_path / "out" / leftover).touch()
    import_pairs(str(source), tmp_path / "out", ImportOptions())
    assert sorted(tmp_path.glob("out/*")) == table


def test_a_flipped_bit_in_an_imported_caption_is_noticed(tmp_path: Path) -> None:
    """Pages have checksums: without them, one letter of a caption would just be another."""
    import_pairs(str(many(tmp_path, "pairs")), tmp_path / "out", ImportOptions())
    (file,) = tmp_path.glob("out/pairs-*.parquet")
    content = bytearray(file.read_bytes())
    with pq.ParquetFile(file) as table:
        names = table.schema_arrow.names
        begin = table.metadata.row_group(0).column(names.index("caption")).dictionary_page_offset
    content[begin + 40] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="is damaged near row"):
        list(read_pairs(tmp_path / "out"))


def test_a_leftover_of_another_import_is_not_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = many(tmp_path, "pairs")
    with monkeypatch.context() as patch:
        patch.setattr(writer.TableWriter, "finish", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            import_pairs(str(source), tmp_path / "out", ImportOptions(), part_bytes=3000)
    assert (tmp_path / ".out.partial" / "pairs-00000.parquet").is_file()
    (tmp_path / "in").mkdir()
    import_pairs(str(pickapic(tmp_path / "in")), tmp_path / "out", ImportOptions())
    assert stored_pairs(tmp_path / "out") == [(f"p{i}", WINNERS[i], LOSERS[i]) for i in (0, 1, 3)]


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    write_images(tmp_path / "in", w=WINNERS[0], l=LOSERS[0])
    source = manifest(tmp_path / "in", text=["a cat"], good=["w.png"], bad=["l.png"])
    words = ["import", source, "--columns", "chosen=good,rejected=bad", str(tmp_path / "out")]
    assert cli.main([*words, "--dry-run"]) == 0
    assert "row 0 (w.png/l.png): label_0 = 1.0, rewards = None, 24x16 and 24x16 px, 'a cat'" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert cli.main(["import", source, str(tmp_path / "out"), "--columns", "chosen"]) == 2
    assert "give meaning=column" in capsys.readouterr().err
    assert cli.main([*words, "--paths", "--strict"]) == 0
    assert stored_pairs(tmp_path / "out") == [("a cat", WINNERS[0], LOSERS[0])]


MEASURED = """
import re, sys, time
from pathlib import Path
from smpo_fast.config.commands import ImportOptions
from smpo_fast.data.ingest.importer import import_pairs

def resident():  # MB of this process's own memory; mapped files are the system's to take back
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

before, began = resident(), time.monotonic()
peak = before
import smpo_fast.data.ingest.importer as importer
inspect_images = importer.inspect_images

def watched(units, decode):
    global peak
    for i, unit in enumerate(inspect_images(units, decode=decode)):
        if i % 50 == 0:
            peak = max(peak, resident())
        yield unit

importer.inspect_images = watched
summary = import_pairs(sys.argv[1], Path(sys.argv[2]), ImportOptions())
print("MEASURED", summary["pairs"], max(peak, resident()) - before, time.monotonic() - began)
"""


def padded(i: int, body: bytes = np.random.default_rng(0).bytes(100_000)) -> bytes:
    """100 kB, of which the head is a picture."""
    return noise(i, (64, 64), "JPEG") + body


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
