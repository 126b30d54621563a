"""Comparing the files of a cache with the hashes in ``cache.json`` while it is used."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Future

from smpo_fast.common.errors import environment_problem
from smpo_fast.common.storage import sha256
from smpo_fast.data.cache.format import CacheInfo, damaged

CHECK_AT_ONCE = 32 << 20  # bytes; larger shards are hashed in the background


class HashChecks:
    """Hashes each file of a cache at most once. All methods raise CacheError if a file was found to be damaged."""

    def __init__(self, info: CacheInfo) -> None:
        self._info = info
        self._lock = threading.Lock()  # shards are read by several threads
        self._checked: set[str] = set()
        self._pending: dict[str, Future[None]] = {}
        self._queue: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def check(self, name: str) -> None:
        """Hash a file now. Raises EnvironmentProblem if the machine is the reason why it cannot be read."""
        if name in self._checked:
            return
        file = self._info.root / name
        try:
            actual = sha256(file)
        except OSError as error:
            raise environment_problem(error, file) or damaged(file, f"cannot be read ({error})") from error
        if actual != self._info.files[name]["sha256"]:
            raise damaged(file, "its content has changed since it was written (sha256 differs)")
        self._checked.add(name)

    def check_soon(self, name: str) -> None:
        """Hash a small file now, a large one in the background."""
        with self._lock:
            if name in self._checked or name in self._pending:
                return
            if self._info.files[name]["bytes"] <= CHECK_AT_ONCE or not self._can_run_in_background():
                self.check(name)
                return
            self._pending[name] = Future()
            self._queue.put(name)

    def mark_checked(self, name: str) -> None:
        """The hash of a file has been compared elsewhere."""
        self._checked.add(name)

    def raise_if_damaged(self) -> None:
        """Raise the error of a check in the background that has ended with one."""
        for name, outcome in list(self._pending.items()):
            if outcome.done():
                outcome.result()
                self._pending.pop(name, None)

    def finish(self) -> None:
        """Wait for the checks in the background."""
        for outcome in list(self._pending.values()):
            outcome.result()

    def _can_run_in_background(self) -> bool:
        if self._thread is None:
            thread = threading.Thread(target=self._work, name="hash-shards", daemon=True)  # never delays the exit
            try:
                thread.start()
            except RuntimeError:  # too many threads
                return False
            self._thread = thread
        return True

    def _work(self) -> None:
        while True:
            name = self._queue.get()
            try:
                self.check(name)
                self._pending[name].set_result(None)
            except BaseException as error:
                self._pending[name].set_exception(error)
