"""Run a function in N real processes joined by gloo, as a launcher would start them.

``run_ranks(function, size, **arguments)`` returns what the call ``function(rank, size, **arguments)`` returned on each
rank, or raises with the output of the rank that failed. The function must be importable from its file by name. The
processes of a size are started once and kept for later calls, because importing DeepSpeed takes most of the time;
functions in which processes may die, or change more than they restore, go through ``end_ranks``, which starts new ones.
"""

from __future__ import annotations

import atexit
import importlib.util
import inspect
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class RankResult:
    """How one rank ended: exit code (negative: killed by that signal), its output, and what it returned."""

    code: int
    output: str
    value: Any


class RankPool:
    """Processes of one world that wait for calls."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory()
        self._logs = [Path(self._folder.name) / f"{rank}.log" for rank in range(size)]
        port = free_port()
        self._processes = [_start(["--pool"], rank, size, self._logs[rank], port) for rank in range(size)]

    def call(self, function: Callable[..., Any], timeout: float, arguments: dict[str, Any]) -> list[Any]:
        """What the function returned on each rank."""
        with tempfile.TemporaryDirectory() as name:
            folder, begins = Path(name), [log.stat().st_size for log in self._logs]
            torch.save(arguments, folder / "arguments.pt")
            for process in self._processes:
                assert process.stdin is not None
                process.stdin.write(json.dumps([inspect.getfile(function), function.__name__, name]).encode() + b"\n")
                process.stdin.flush()
            deadline, done = time.monotonic() + timeout, [folder / f"{rank}.pt" for rank in range(self.size)]
            while not all(file.exists() for file in done):
                failed = [rank for rank in range(self.size) if (folder / f"{rank}.failed").exists()]
                failed += [rank for rank, process in enumerate(self._processes) if process.poll() is not None]
                late = time.monotonic() > deadline
                if failed or late:
                    self.close()
                    words = "failed" if failed else f"did not finish within {timeout} s"
                    logs = self._logs if late else [self._logs[failed[0]]]
                    texts = [log.read_bytes()[begin:].decode() for log, begin in zip(logs, begins, strict=False)]
                    raise AssertionError(
                        f"{failed or 'some'} of {self.size} ranks {words}:\n" + "\n".join(texts)[-6000:]
                    )
                time.sleep(0.02)
            return [torch.load(file, weights_only=False) for file in done]

    def close(self) -> None:
        """End the processes; a later call with this size starts new ones."""
        _POOLS.pop(self.size, None)
        for process in self._processes:
            process.kill()
            process.wait()


_POOLS: dict[int, RankPool] = {}


@atexit.register
def _close_pools() -> None:
    for pool in list(_POOLS.values()):
        pool.close()


def run_ranks(function: Callable[..., Any], size: int, *, timeout: float = 300, **arguments: Any) -> list[Any]:
    """What ``function(rank, size, **arguments)`` returned on each of ``size`` ranks."""
    if size not in _POOLS:
        _POOLS[size] = RankPool(size)
    return _POOLS[size].call(function, timeout, arguments)


def end_ranks(function: Callable[..., Any], size: int, *, timeout: float = 300, **arguments: Any) -> list[RankResult]:
    """Like ``run_ranks`` in new processes, for functions in which ranks may fail or die: how each rank ended."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(arguments, folder / "arguments.pt")
        logs = [folder / f"{rank}.log" for rank in range(size)]
        port = free_port()
        command = [inspect.getfile(function), function.__name__, str(folder)]
        processes = [_start(command, rank, size, logs[rank], port) for rank in range(size)]
        deadline = time.monotonic() + timeout
        try:
            codes = [process.wait(max(0.1, deadline - time.monotonic())) for process in processes]
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
        files = [folder / f"{rank}.pt" for rank in range(size)]
        values = [torch.load(file, weights_only=False) if file.exists() else None for file in files]
        return [RankResult(c, log.read_text(), v) for c, log, v in zip(codes, logs, values, strict=True)]


def _start(arguments: list[str], rank: int, size: int, log: Path, port: int) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    command = [sys.executable, __file__, *arguments]
    with log.open("wb") as out:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _call(file: str, name: str, folder: str) -> None:
    """Call a function of a file on this rank, and save what it returns."""
    module_name = Path(file).stem
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    arguments = torch.load(Path(folder) / "arguments.pt", weights_only=False)
    result = getattr(sys.modules[module_name], name)(rank, size, **arguments)
    torch.save(result, Path(folder) / f"{rank}.saving")
    (Path(folder) / f"{rank}.saving").rename(Path(folder) / f"{rank}.pt")


def _serve_pool() -> None:
    """Make the calls that are read from standard input, until it is closed."""
    from smpo_fast.engine import collectives

    collectives.shutdown = lambda: None  # a training run leaves the process group; this one stays for the next call
    for line in sys.stdin:
        file, name, folder = json.loads(line)
        try:
            _call(file, name, folder)
        except BaseException:
            traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            (Path(folder) / f"{os.environ['RANK']}.failed").touch()


if __name__ == "__main__":
    if sys.argv[1:] == ["--pool"]:
        _serve_pool()
    else:
        _call(*sys.argv[1:])
