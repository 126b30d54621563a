"""How programs end: one line for what can be corrected, a traceback for our own mistakes, and the exit status."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest

from smpo_fast.common import programs
from smpo_fast.common.errors import DataError


def raising(error: BaseException) -> int:
    raise error


def wrapped() -> int:
    try:
        raise OSError(errno.ENOSPC, "No space left on device", "run/checkpoint/weights")
    except OSError:
        raise RuntimeError("a library that hides the cause") from None


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (DataError("row 3 has no image"), 2, "error: row 3 has no image\n"),
        (programs.Failure("too many bad steps"), 3, "error: too many bad steps\n"),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/a.bin"),
            2,
            "error: out/a.bin: the disk is full",
        ),
        (OSError(errno.EROFS, "", "out"), 2, "error: out: the file system is read-only"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 2, "No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted: start the same command again to continue\n"),
        (DataError("a \x1b[2J caption"), 2, "error: a \\x1b[2J caption\n"),
    ],
)
def test_one_line(error: BaseException, status: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert programs.run(lambda: raising(error)) == status
    printed = capsys.readouterr().err
    assert message in printed and len(printed.strip().splitlines()) == 1


def test_a_full_disk_behind_another_exception(capsys: pytest.CaptureFixture[str]) -> None:
    assert programs.run(wrapped) == 2
    assert "run/checkpoint/weights: the disk is full" in capsys.readouterr().err


def test_our_own_mistakes_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        programs.run(lambda: 1 // 0)
    with pytest.raises(FileNotFoundError):  # a file that we should have made, or asked the user for
        programs.run(lambda: raising(FileNotFoundError(errno.ENOENT, "No such file or directory", "parts.json")))


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}),
    ],
)
def test_programs_let_cuda_s_memory_grow_in_place_unless_told_otherwise(
    given: dict[str, str], left: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(given))
    assert programs.run(lambda: 0 if os.environ == left else 1) == 0


def test_an_interrupt_that_an_import_swallows_ends_the_program_all_the_same() -> None:
    code = (
        "import os, signal\n"
        "from smpo_fast.common import programs\n"
        "def act():\n"
        "    with programs.ended_by_interrupt():\n"
        "        try:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "        except BaseException:\n"
        "            pass\n"
        "    return 0\n"
        "raise SystemExit(programs.run(act))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == programs.INTERRUPTED
    assert done.stderr.strip() == "interrupted: start the same command again to continue"


def test_after_the_imports_an_interrupt_is_what_it_was() -> None:
    before = signal.getsignal(signal.SIGINT)
    with programs.ended_by_interrupt():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
