"""Run a function in N real processes joined by gloo, as a launcher would start them.

``run_ranks(function, size, **arguments)`` returns what each rank's call ``function(rank, size, **arguments)``
returned, or raises with the failing rank's output. The function must be importable from its file by name.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import socket
import subprocess
import sys
import tempfile
import time
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


def run_ranks(function: Callable[..., Any], size: int, *, timeout: float = 240, **arguments: Any) -> list[Any]:
    """What ``function(rank, size, **arguments)`` returned on each of ``size`` ranks."""
    results = end_ranks(function, size, timeout=timeout, **arguments)
    for rank, result in enumerate(results):
        if result.code:
            raise AssertionError(f"rank {rank} of {size} ended with {result.code}:\n{result.output[-6000:]}")
    return [result.value for result in results]


def end_ranks(function: Callable[..., Any], size: int, *, timeout: float = 240, **arguments: Any) -> list[RankResult]:
    """Like ``run_ranks``, for functions in which ranks may fail or die: how each rank ended."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(arguments, folder / "arguments.pt")
        logs = [folder / f"{rank}.log" for rank in range(size)]
        port = free_port()
        processes = [_start(function, rank, size, folder, logs[rank], port) for rank in range(size)]
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


def _start(
    function: Callable[..., Any], rank: int, size: int, folder: Path, log: Path, port: int
) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    command = [sys.executable, __file__, inspect.getfile(function), function.__name__, str(folder)]
    with log.open("wb") as out:
        return subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _main() -> None:
    file, name, folder = sys.argv[1:]
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    arguments = torch.load(Path(folder) / "arguments.pt", weights_only=False)
    torch.save(getattr(module, name)(rank, size, **arguments), Path(folder) / f"{rank}.pt")


if __name__ == "__main__":
    _main()
