"""Signals that stop a run: noticed at the next network call, also when the terminal has gone."""

from __future__ import annotations

import os
import pty
import signal
import sys
import time
from pathlib import Path

import pytest
from helpers.ranks import run_ranks

from smpo_fast.common import runtime
from smpo_fast.common.runtime import STOP_SIGNALS, Stopped, StopSignal, World
from smpo_fast.engine import collectives


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda s: s.name)
def test_a_signal_stops_at_the_next_check(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    stop = StopSignal(World())
    try:
        stop.check()
        signal.raise_signal(number)
        with pytest.raises(Stopped, match=number.name):
            stop.check()
        stop.restore()
        if number != signal.SIGINT:
            signal.raise_signal(number)  # a launcher may repeat it: the process ends by itself, with its own status
    finally:
        for each in STOP_SIGNALS:
            signal.signal(each, before if each == number else signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_second_ctrl_c_ends_the_process_and_a_launchers_sigterm_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Ctrl-C a launcher makes a SIGTERM to each rank, and may repeat it while the rank is saving."""
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    monkeypatch.setattr(runtime, "FORCE_STOP_SECONDS", -1.0)
    stop = StopSignal(World())
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(Stopped, match="SIGINT"):
            stop.check()
    finally:
        for number, handler in zip(STOP_SIGNALS, before, strict=True):
            signal.signal(number, handler)


def stopped_on(rank: int, size: int, signalled: int) -> str:
    """The signal on which a rank stops of which one rank knows."""
    world = World(rank, size)
    collectives.join(world)
    stop = StopSignal(world)
    try:
        stop.check()
        if rank == signalled:
            signal.raise_signal(signal.SIGTERM)
        stop.check()
    except Stopped as stopped:
        return str(stopped)
    finally:
        stop.wanted = 0
        stop.restore()
    return "not stopped"


@pytest.mark.parametrize("signalled", [0, 1])
def test_all_ranks_stop_when_one_is_signalled(signalled: int) -> None:
    assert run_ranks(stopped_on, 2, signalled=signalled) == ["SIGTERM", "SIGTERM"]


def test_handlers_are_restored_without_a_stop() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    StopSignal(World()).restore()
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopSignal(World())
        signal.raise_signal(signal.SIGHUP)
        stop.check()
        stop.restore()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


PROGRAM = """
import sys, time
from pathlib import Path
from smpo_fast.common.runtime import Stopped, StopSignal, World, print0
stop = StopSignal(World())
print("ready", flush=True)
try:
    while True:
        stop.check()
        time.sleep(0.01)
except Stopped as stopped:
    stop.restore()
    print0("the terminal has gone, so nobody reads this")
    Path(sys.argv[1]).write_text(str(stopped))
"""


def test_a_run_whose_terminal_goes_away_ends_by_itself(tmp_path: Path) -> None:
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-c", PROGRAM, str(tmp_path / "stopped")])
    text = b""
    while b"ready" not in text:
        text += os.read(terminal, 1000)
    os.close(terminal)
    deadline, ended = time.monotonic() + 60, 0
    while not ended and time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.05)
    assert ended and os.waitstatus_to_exitcode(status) == 0
    assert (tmp_path / "stopped").read_text() == "SIGHUP"
