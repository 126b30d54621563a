"""The process and its environment: rank, world and device; reproducible randomness; printing on rank 0; stopping.

Random numbers are drawn on the host by a counter-based generator whose key is (seed, purpose, keys): the same on
every device, for any number of ranks, and after any restart.
"""

from __future__ import annotations

import os
import signal
import stat
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from smpo_fast.common.console import DOUBTFUL, coloured, printable
from smpo_fast.common.errors import EnvironmentProblem
from smpo_fast.common.storage import sha256_of

# The dtype of the networks' weights, by model.precision.
COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "bf16-autocast": torch.float32}
FORCE_STOP_SECONDS = 2.0
_printing_rank = True


@dataclass(frozen=True)
class World:
    """One process (``rank``) among ``size`` processes; ``device`` is the one it computes on."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")


def world_from_environment(device: str = "auto") -> World:
    """The world a launcher describes in RANK, WORLD_SIZE and LOCAL_RANK; a single process without a launcher.

    Raises EnvironmentProblem if ``device`` is 'cuda' and there is no CUDA device.
    """
    global _printing_rank
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda" and not torch.cuda.is_available():
        raise EnvironmentProblem("run.device = 'cuda': torch finds no CUDA device; use run.device=auto or cpu")
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(where)
    _printing_rank = rank == 0
    return World(rank, size, where)


def rng(seed: int, purpose: str, *keys: int) -> np.random.Generator:
    """A generator that depends only on its arguments, e.g. ``rng(seed, "vae", step, pair)``."""
    digest = sha256_of(f"{seed}/{purpose}/{'/'.join(map(str, keys))}".encode())
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], dtype=np.uint64)))


def uniform(seed: int, purpose: str, *keys: int) -> float:
    """A random number in [0, 1) that depends only on the arguments."""
    return float(rng(seed, purpose, *keys).random())


def print0(*words: object) -> None:
    """Print on rank 0 only, without buffering. Control characters other than line breaks and tabs are escaped."""
    if _printing_rank:
        print(*(printable(word, lines=True) for word in words), flush=True)


def warn0(*words: object) -> None:
    """Print a warning to standard error, like ``print0``."""
    if _printing_rank:
        first = coloured("warning:", DOUBTFUL, sys.stderr)
        print(first, *(printable(word, lines=True) for word in words), file=sys.stderr, flush=True)


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(Exception):
    """A signal requested a stop and all ranks have agreed to it; the message is the signal's name."""


class StopSignal:
    """Turns Ctrl-C, SIGTERM and SIGHUP into a request that all ranks notice at the same network call.

    The ranks agree by a collective of one integer on the host, which never waits for the device. A launcher answers
    Ctrl-C by sending SIGTERM to its ranks, so further SIGTERMs are ignored; a second Ctrl-C, more than
    FORCE_STOP_SECONDS after the first, ends the process at once. SIGHUP comes when the terminal has gone: what is
    printed from then on is discarded. Where SIGHUP is ignored (nohup), it stays ignored.
    """

    def __init__(self, world: World) -> None:
        self.wanted = 0
        self._since = 0.0
        self.group = dist.new_group(backend="gloo") if world.size > 1 else None
        signals = (s for s in STOP_SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN)
        self._before = {s: signal.signal(s, self._on_signal) for s in signals}

    def _on_signal(self, number: int, frame: object) -> None:
        if self.wanted and number == signal.SIGINT and time.monotonic() - self._since > FORCE_STOP_SECONDS:
            raise KeyboardInterrupt
        if number == signal.SIGHUP:
            _leave_terminal()
        if not self.wanted:
            self.wanted, self._since = number, time.monotonic()

    def check(self) -> None:
        """Raise Stopped on every rank once any rank has been signalled. Collective."""
        wanted = self.wanted
        if self.group is not None:
            flag = torch.tensor([wanted])
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group)
            wanted = int(flag)
        if wanted:
            self.wanted = wanted
            raise Stopped(signal.Signals(wanted).name)

    def restore(self) -> None:
        """Reinstall the previous signal handlers.

        After a stop SIGTERM and SIGHUP are ignored: the process is about to end by itself, with its own status.
        """
        for number, handler in self._before.items():
            ignored = self.wanted and number != signal.SIGINT
            signal.signal(number, signal.SIG_IGN if ignored else handler)


def _leave_terminal() -> None:
    """Discard what is printed to a terminal, which has gone: writing to it would fail."""
    for stream in (1, 2):
        if stat.S_ISCHR(os.fstat(stream).st_mode):  # isatty is false for a terminal that has gone
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream)
            os.close(nowhere)
