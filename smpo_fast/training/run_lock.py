"""One training per run folder: a lock, and who holds it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO

from smpo_fast.common.errors import EnvironmentProblem
from smpo_fast.common.runtime import warn0
from smpo_fast.common.storage import take_lock

LOCK_FILE = "run.lock"


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Lock a run folder for this process; the file ``run.lock`` in it says for whom, and since when.

    The lock is released when the process ends, however it ends. On a file system without locks there is a warning
    instead of a lock. Raises EnvironmentProblem while another process holds the lock.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    file = _open(run_dir / LOCK_FILE)
    try:
        yield
    finally:
        (run_dir / LOCK_FILE).unlink(missing_ok=True)  # before the lock is released: nobody else can hold it now
        file.close()


def _open(path: Path) -> IO[str]:
    while True:
        file = path.open("a+")
        try:
            mine = take_lock(file, wait=False)
        except EnvironmentProblem as error:
            warn0(f"{error}. Training goes on without a lock: start no second training in this folder")
            return file
        if not mine:
            file.close()
            raise EnvironmentProblem(_in_use(path))
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            break
        file.close()  # its holder removed the file and ended between our opening and locking it
    file.truncate(0)
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now}) + "\n")
    file.flush()
    return file


def _in_use(path: Path) -> str:
    try:
        owner = json.loads(path.read_text())
        who = f"process {owner['pid']} on {owner['host']} trains in it since {owner['since']}"
    except (OSError, ValueError, KeyError):
        who = "another process trains in it"
    return f"run.dir = {path.parent} is in use: {who} ({path}). Wait for it or end it, or set another run.dir"
