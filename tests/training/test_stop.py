"""Runs that are stopped by a signal, or killed, continue exactly."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from helpers.small_run import assert_same_run, finish, launch, run, wait_for_step

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "kind",
    [signal.SIGTERM, signal.SIGKILL, pytest.param(signal.SIGINT, marks=SLOW), pytest.param(signal.SIGHUP, marks=SLOW)],
)
def test_stopped_or_killed_and_started_again(kind: signal.Signals, cache: str, plain: Path, tmp_path: Path) -> None:
    process = launch(tmp_path / "run", cache, ds=None)
    wait_for_step(tmp_path / "run", 3, process)
    process.send_signal(kind)
    out = finish(process, status=-kind if kind == signal.SIGKILL else 0)
    if kind != signal.SIGKILL and "complete" not in out:
        assert f"stopped by {kind.name}" in out
        assert (tmp_path / "run" / "checkpoints" / "step-000003").is_dir(), "the last finished step is saved"
    assert run(tmp_path / "run", cache) == 0
    assert_same_run(plain, tmp_path / "run")


@SLOW
def test_two_ranks_stopped_by_ctrl_c_go_on_exactly(cache: str, plain: Path, tmp_path: Path) -> None:
    """A terminal sends SIGINT to the launcher and the ranks; the launcher then sends SIGTERM to the ranks."""
    process = launch(tmp_path / "run", cache, ranks=2)
    wait_for_step(tmp_path / "run", 1, process)
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert "stopped by SIGINT; the state is saved" in out and list((tmp_path / "run" / "checkpoints").iterdir())
    finish(launch(tmp_path / "run", cache, ranks=2))
    assert_same_run(plain, tmp_path / "run", tolerance=2e-4)


@SLOW
def test_sigterm_to_the_launcher_stops_the_run_and_saves(cache: str, plain: Path, tmp_path: Path) -> None:
    """The program ``deepspeed`` ends at once, without a word to its ranks."""
    process = launch(tmp_path / "run", cache, ranks=2)
    wait_for_step(tmp_path / "run", 1, process)
    process.terminate()
    out, _ = process.communicate(timeout=120)
    assert "stopped by SIGTERM; the state is saved" in out and list((tmp_path / "run" / "checkpoints").iterdir())
