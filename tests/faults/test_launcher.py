"""Two ranks under the DeepSpeed launcher, of which one process is killed: the others end, and the run continues."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers.small_run import SMALL, assert_same_run, finish, launch, wait_for_step

from faults.conftest import Attempt
from faults.server import session_of
from smpo_fast import cli
from smpo_fast.common.launcher import parent_of

SECONDS = 60.0  # in which all processes of a run have ended after one of them was killed


@pytest.mark.faults(share=10)
def test_a_process_is_killed(attempt: Attempt, tmp_path: Path) -> None:
    cache = f"data.cache={tmp_path / 'cache'}"
    assert cli.main(["prepare", *SMALL, cache, f"run.dir={tmp_path}"]) == 0
    finish(launch(tmp_path / "whole", cache, ranks=2))

    def act(fault: tuple[str, int]) -> str:
        victim, step = fault
        run_dir = tmp_path / f"{victim} {step}"
        program = launch(run_dir, cache, ranks=2)
        wait_for_step(run_dir, step, program)
        os.kill(_pid_of(victim, program.pid), signal.SIGKILL)
        program.communicate(timeout=SECONDS)
        if left := _await_end(program):
            return f"{victim} killed after step {step}: {left} live on"
        finish(launch(run_dir, cache, ranks=2))
        assert_same_run(tmp_path / "whole", run_dir)
        return ""

    faults = [(victim, step) for victim in ("launcher", "rank 0", "rank 1") for step in (1, 2, 3)]
    attempt("train under deepspeed", "kill a process", faults, act)


def _pid_of(victim: str, launcher: int) -> int:
    """The program ``deepspeed`` is the launcher; its child starts the ranks."""
    if victim == "launcher":
        return launcher
    (starter,) = _children(launcher)
    rank = victim.removeprefix("rank ")
    return next(p for p in _children(starter) if f"RANK={rank}".encode() in _environment(p))


def _children(parent: int) -> list[int]:
    return [int(p.name) for p in Path("/proc").glob("[0-9]*") if parent_of(int(p.name)) == parent]


def _environment(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


def _await_end(program: subprocess.Popen[str]) -> list[int]:
    """Wait until nothing of a program's session is left; what is left after a while is killed."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and session_of(program.pid):
        time.sleep(0.1)
    left = session_of(program.pid)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return left
