"""Ranks do not outlive their launcher: when it has gone, however it ended, they stop as on SIGTERM."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

POLL_SECONDS = 1.0
GRACE_SECONDS = 120.0  # for saving a checkpoint; a rank that still runs then is ended


def watch_launcher() -> None:
    """Stop this process, in a thread, once the launcher that started it has gone; nothing without a launcher."""
    if "LOCAL_RANK" in os.environ and "MASTER_ADDR" in os.environ:
        ancestors = launching_ancestors()
        threading.Thread(target=_watch, args=(ancestors,), name="launcher-watch", daemon=True).start()


def launching_ancestors() -> list[int]:
    """The processes that must live on: the parent, and the program ``deepspeed`` where it started the parent."""
    parent = os.getppid()
    grandparent = parent_of(parent)
    if grandparent and _is_deepspeed_program(grandparent):
        return [parent, grandparent]
    return [parent]


def parent_of(pid: int) -> int:
    """The parent of a process; 0 where it cannot be known."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(text.rpartition(")")[2].split()[1])  # after the name, which may contain anything


def _is_deepspeed_program(pid: int) -> bool:
    """Whether a process is the script ``deepspeed``, not a shell whose command line contains the word."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(os.path.basename(word) == b"deepspeed" for word in words[:2])


def _watch(ancestors: list[int]) -> None:
    while _alive(ancestors):
        time.sleep(POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(1)


def _alive(ancestors: list[int]) -> bool:
    """Whether each of the ancestors is still the parent of the one before it."""
    found = os.getppid()
    for pid in ancestors:
        if found != pid:
            return False
        found = parent_of(pid)
    return True
