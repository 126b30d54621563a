"""Work shared through a folder: each part once, nothing of a part lost, whoever is killed and whenever."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smpo_fast.common import shared_work, storage
from smpo_fast.common.errors import EnvironmentProblem, UserError
from smpo_fast.common.shared_work import AlreadyFinished, Draft, SharedWork, agreed_values, publish


def work(folder: Path, kind: str = "a", intact: Callable[[dict[str, Any]], bool] = lambda manifest: True) -> SharedWork:
    return SharedWork(folder, {"kind": kind}, intact)


def test_a_part_is_done_once_and_its_note_kept(tmp_path: Path) -> None:
    done = []
    for _ in range(2):
        with work(tmp_path / "w") as shared:
            shared.do_parts(["p-0", "p-1"], lambda name: done.append(name) or {"name": name})
            assert shared.manifest("p-1") == {"name": "p-1"}
    assert done == ["p-0", "p-1"]


def test_parts_that_are_no_longer_intact_and_other_work_are_done_again(tmp_path: Path) -> None:
    done: list[str] = []

    def share(**options: Any) -> None:
        with work(tmp_path / "w", **options) as shared:
            shared.do_parts(["p-0", "p-1"], lambda name: done.append(name) or {"name": name})

    share()
    share(intact=lambda manifest: manifest["name"] != "p-1")
    assert done == ["p-0", "p-1", "p-1"]
    share(kind="b")
    assert done[3:] == ["p-0", "p-1"]


@pytest.mark.parametrize("lost", range(0, 60, 7))
def test_a_draft_keeps_whole_records_only(tmp_path: Path, lost: int) -> None:
    draft = Draft(tmp_path, "p-0")
    for number in range(3):
        draft.append({"number": number}, [b"x" * 10, bytes([number]) * 5])
    for end in (".log", ".data"):
        for file in tmp_path.iterdir():
            file.write_bytes(file.read_bytes())
        torn = tmp_path / f"p-0{end}"
        whole = {file: file.read_bytes() for file in tmp_path.iterdir()}
        os.truncate(torn, max(0, torn.stat().st_size - lost))
        again = Draft(tmp_path, "p-0")
        numbers = [record["number"] for record in again.records]
        assert numbers == list(range(len(numbers)))
        assert again.data() == b"".join(b"x" * 10 + bytes([n]) * 5 for n in numbers)
        if not lost:
            assert len(numbers) == 3
        again.append({"number": 9}, [b"end"])
        assert Draft(tmp_path, "p-0").data().endswith(b"end")
        for file, content in whole.items():
            file.write_bytes(content)


@pytest.mark.parametrize("left", [".data", ".log"])
def test_a_kill_between_the_first_two_writes_leaves_nothing_that_a_resumed_draft_reads(
    tmp_path: Path, left: str
) -> None:
    """The bytes of the first record are on the disk but not its line (or the reverse, if the machine crashed)."""
    Draft(tmp_path, "p-0").append({"number": 0}, [b"orphan"])
    (tmp_path / f"p-0{'.log' if left == '.data' else '.data'}").unlink()
    resumed = Draft(tmp_path, "p-0")
    assert resumed.records == []
    for number in (1, 2):
        resumed.append({"number": number}, [b"good" * number])
    assert resumed.data() == Draft(tmp_path, "p-0").data() == b"goodgoodgood"
    assert [record["number"] for record in Draft(tmp_path, "p-0").records] == [1, 2]


def test_a_write_that_fails_half_way_leaves_no_trace_in_the_same_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = Draft(tmp_path, "p-0")
    draft.append({"number": 0}, [b"zero"])
    write = shared_work._write_at

    def full(file: Path, offset: int, content: bytes) -> None:
        write(file, offset, content[:2])
        raise OSError(28, "No space left on device")

    for broken in (".data", ".log"):
        monkeypatch.setattr(shared_work, "_write_at", lambda f, *a, b=broken: (full if f.suffix == b else write)(f, *a))
        with pytest.raises(OSError, match="No space"):
            draft.append({"number": 9}, [b"nine"])
        monkeypatch.setattr(shared_work, "_write_at", write)
    draft.append({"number": 1}, [b"one"])
    assert draft.data() == b"zeroone"
    assert [record["number"] for record in Draft(tmp_path, "p-0").records] == [0, 1]


def test_bytes_that_changed_while_the_part_was_done_are_not_passed_on(tmp_path: Path) -> None:
    draft = Draft(tmp_path, "p-0")
    draft.append({}, [b"aaaa"])
    for content in (b"aaab", b"aaa", b"aaaaa"):
        (tmp_path / "p-0.data").write_bytes(content)
        with pytest.raises(EnvironmentProblem, match=r"p-0\.data has changed since it was written"):
            draft.data()


def test_a_draft_whose_bytes_changed_ends_before_the_change(tmp_path: Path) -> None:
    draft = Draft(tmp_path, "p-0")
    draft.append({"number": 0}, [b"aaaa"])
    draft.append({"number": 1}, [b"bbbb"])
    (tmp_path / "p-0.data").write_bytes(b"aaaabbxb")
    assert [record["number"] for record in Draft(tmp_path, "p-0").records] == [0]


def test_a_finished_work_gets_its_name_without_what_served_it(tmp_path: Path) -> None:
    folder, target = tmp_path / ".w", tmp_path / "w"
    agreed_values(folder, lambda known: {"hash": 1})
    with work(folder) as shared:
        shared.do_parts(["p-0"], lambda name: {})
        (folder / "result").write_text("kept")
        for leftover in ("result.tmp", ".tmpAb12Cd"):  # of processes that were killed; the second by safetensors
            (folder / leftover).touch()
        publish(folder, target, "proof")
        assert not target.exists()
        (folder / "proof").touch()
        publish(folder, target, "proof")
        with pytest.raises(AlreadyFinished):
            shared.do_parts(["p-0"], lambda name: {})
    publish(folder, target, "proof")
    assert sorted(file.name for file in target.iterdir()) == ["proof", "result"]
    assert not folder.exists()


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "left undone"])
def test_a_part_of_another_process_is_waited_for_and_done_only_if_that_one_leaves_it(
    finished: bool, tmp_path: Path
) -> None:
    """The other process is a thread here: locks belong to open files."""
    done: list[str] = []

    def second() -> None:
        with work(tmp_path / "w") as shared:
            shared.do_parts(["p-0", "p-1"], lambda name: done.append(name) or {})
            done.append("end")

    thread = threading.Thread(target=second, daemon=True)
    with work(tmp_path / "w") as shared, shared.claim("p-0", wait=False) as claimed:
        assert claimed
        thread.start()
        deadline = time.monotonic() + 20
        while done != ["p-1"]:  # both work at the same time
            assert thread.is_alive() and time.monotonic() < deadline
            time.sleep(0.01)
        thread.join(0.2)
        assert done == ["p-1"], "p-0 is waited for"
        if finished:
            storage.write_json(tmp_path / "w" / "p-0.json", {})
    thread.join(20)
    assert done == (["p-1", "end"] if finished else ["p-1", "p-0", "end"])


def test_no_part_is_begun_while_the_folder_is_being_published(tmp_path: Path) -> None:
    with work(tmp_path / "w") as shared:
        (tmp_path / "w" / shared_work.WORK_FILE).unlink()  # with which publishing begins
        with pytest.raises(AlreadyFinished):
            shared.do_parts(["p-0"], lambda name: {})


def test_a_finished_part_whose_kept_bytes_are_gone_is_done_again(tmp_path: Path) -> None:
    done: list[str] = []
    for content in (b"kept", b"cut"):
        with SharedWork(tmp_path / "w", {}) as shared:
            shared.do_parts(["p-0"], lambda name: done.append(name) or shared.keep(name, b"kept"))  # noqa: B023
            shared.kept("p-0").write_bytes(content)
    with SharedWork(tmp_path / "w", {}) as shared:
        shared.do_parts(["p-0"], lambda name: done.append(name) or shared.keep(name, b"kept"))
        assert shared.kept("p-0").read_bytes() == b"kept"
    assert len(done) == 2


def test_what_one_process_found_out_is_known_to_the_next(tmp_path: Path) -> None:
    assert agreed_values(tmp_path / "w", lambda known: {"times": known.get("times", 0) + 1}) == {"times": 1}
    with work(tmp_path / "w") as shared:
        shared.do_parts(["p-0"], lambda name: {})
    assert agreed_values(tmp_path / "w", lambda known: {"times": known.get("times", 0) + 1}) == {"times": 2}


def test_joining_the_work_leaves_the_values_that_another_process_is_writing(tmp_path: Path) -> None:
    """It has not joined yet, so the one that cleans up is alone in the work."""
    folder = tmp_path / "w"
    agreed_values(folder, lambda known: {"hash": "1"})
    writing = folder / "agreed.json.4711-0b3a8e9f.tmp"
    writing.write_text("{")
    with work(folder) as shared:
        assert writing.exists()
        shared.do_parts(["p-0"], lambda name: {})
        storage.write_json(folder / "proof", {})
    publish(folder, tmp_path / "done", "proof")
    assert [file.name for file in (tmp_path / "done").iterdir()] == ["proof"]


def test_a_file_system_without_locks_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: object, how: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(storage.fcntl, "flock", refuse)
    with pytest.raises(UserError, match=r"cannot be locked \(Function not implemented\)"), work(tmp_path / "w"):
        pass
