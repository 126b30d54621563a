"""Two trainings in one run folder are refused, and ranks do not outlive their launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.small_run import run

from smpo_fast.common import launcher
from smpo_fast.common.errors import EnvironmentProblem
from smpo_fast.common.storage import take_lock
from smpo_fast.training import run_lock as module
from smpo_fast.training.run_lock import LOCK_FILE, run_lock


def test_a_second_training_in_a_run_folder_names_the_first(
    cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with run_lock(tmp_path):
        owner = json.loads((tmp_path / LOCK_FILE).read_text())
        assert owner["pid"] == os.getpid()
        assert run(tmp_path, cache) == 2
        error = capsys.readouterr().err
        assert f"process {os.getpid()} on {owner['host']} trains in it since {owner['since']}" in error
        assert json.loads((tmp_path / LOCK_FILE).read_text()) == owner, "the owner's entry is kept"
        assert [file.name for file in tmp_path.iterdir()] == [LOCK_FILE], "nothing of the run was touched"
    assert list(tmp_path.iterdir()) == []
    with run_lock(tmp_path):
        pass


def test_the_lock_of_a_killed_process_does_not_stay(tmp_path: Path) -> None:
    code = "import sys, time, pathlib; from smpo_fast.training.run_lock import run_lock\n"
    code += "with run_lock(pathlib.Path(sys.argv[1])): print('locked', flush=True); time.sleep(600)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
    with pytest.raises(EnvironmentProblem, match=f"process {holder.pid}"), run_lock(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with run_lock(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_a_file_that_is_no_longer_the_lock_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between our opening and our locking it, its holder ended, and another run began and ended."""
    later = [lambda: (tmp_path / LOCK_FILE).unlink(), lambda: (tmp_path / LOCK_FILE).write_text("")]

    def take(file: Any, *, wait: bool) -> bool:
        while later:
            later.pop(0)()
        return take_lock(file, wait=wait)

    monkeypatch.setattr(module, "take_lock", take)
    with run_lock(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_the_lock_is_held_until_its_file_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the file of the run that takes the lock next would be removed."""
    unlink, removed = Path.unlink, []

    def removing(path: Path, **how: bool) -> None:
        with path.open("a") as other:
            assert not take_lock(other, wait=False)
        removed.append(path.name)
        unlink(path, **how)

    with run_lock(tmp_path):
        monkeypatch.setattr(Path, "unlink", removing)
    assert removed == [LOCK_FILE]


def test_without_locks_there_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_locks(*_: object, **__: object) -> bool:
        raise EnvironmentProblem("the file system has no locks")

    monkeypatch.setattr(module, "take_lock", no_locks)
    with run_lock(tmp_path):
        assert "start no second training" in capsys.readouterr().err


RANK = """
import importlib.util, os, sys, time
spec = importlib.util.spec_from_file_location("launcher", sys.argv[1])
launcher = importlib.util.module_from_spec(spec)
spec.loader.exec_module(launcher)
os.environ |= {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
launcher.POLL_SECONDS = 0.05
launcher.watch_launcher()
print(os.getpid(), flush=True)
time.sleep(600)
"""
LAUNCH = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"


@pytest.mark.parametrize("killed", ["parent", "deepspeed"])
def test_a_rank_ends_with_its_launcher(killed: str, tmp_path: Path) -> None:
    """As DeepSpeed starts it: the program ``deepspeed``, a launching process of each node, the rank."""
    (tmp_path / "deepspeed").write_text(LAUNCH)
    (tmp_path / "launch.py").write_text(LAUNCH)
    (tmp_path / "rank.py").write_text(RANK)
    words = [str(tmp_path / name) for name in ("deepspeed", "launch.py", "rank.py")]
    program = subprocess.Popen([sys.executable, *words, launcher.__file__], stdout=subprocess.PIPE, text=True)
    assert program.stdout is not None
    rank = int(program.stdout.readline())
    time.sleep(0.5)
    assert launcher.parent_of(rank) and not _ended(rank)
    os.kill(launcher.parent_of(rank) if killed == "parent" else program.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while not _ended(rank):
        assert time.monotonic() < deadline, "the rank outlives its launcher"
        time.sleep(0.05)
    program.kill()
    program.wait()


def _ended(pid: int) -> bool:
    """Whether a process has ended; it may still be a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
