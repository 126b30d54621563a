"""Who am I: rank, world and device; randomness as a function; printing on rank 0; stopping together.

Random numbers are drawn on the host by a counter-based generator whose key is (seed, purpose, keys):
the same on every device, for any number of ranks, and after any restart.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

# What the networks' weights are held in, by model.precision.
COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "bf16-autocast": torch.float32}
IMPATIENCE_SECONDS = 2.0
_printing_rank = True


@dataclass(frozen=True)
class World:
    """One process among `size`; `device` is where it computes."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")


def world_from_environment(device: str = "auto") -> World:
    """The world a launcher describes in RANK, WORLD_SIZE and LOCAL_RANK; alone without a launcher.

    Raises ValueError when ``device`` is 'cuda' and there is none.
    """
    global _printing_rank
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device = 'cuda': torch finds no CUDA device; use run.device=auto or cpu")
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(where)
    _printing_rank = rank == 0
    return World(rank, size, where)


def rng(seed: int, purpose: str, *keys: int) -> np.random.Generator:
    """A generator that depends on its arguments alone, e.g. ``rng(seed, "vae", step, pair)``."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{'/'.join(map(str, keys))}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], dtype=np.uint64)))


def uniform(seed: int, purpose: str, *keys: int) -> float:
    """One number in [0, 1)."""
    return float(rng(seed, purpose, *keys).random())


def print0(*words: object) -> None:
    """Print on rank 0 only, at once."""
    if _printing_rank:
        print(*words, flush=True)


def warn0(*words: object) -> None:
    """Like print0, to standard error."""
    if _printing_rank:
        print("warning:", *words, file=sys.stderr, flush=True)


class Stopped(Exception):
    """A stop was asked for by a signal and all ranks have agreed to it."""


class StopSignal:
    """Ctrl-C and SIGTERM as a wish that all ranks notice at the same network call.

    The agreement is a collective of one integer on the host, so it never waits for the device. A launcher answers
    Ctrl-C with SIGTERM to its ranks, so SIGTERM is ignored from then on; a second Ctrl-C, later than
    IMPATIENCE_SECONDS, ends the process at once.
    """

    def __init__(self, world: World) -> None:
        self.wanted = 0
        self._since = 0.0
        self.group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number: int, frame: object) -> None:
        if self.wanted and number == signal.SIGINT and time.monotonic() - self._since > IMPATIENCE_SECONDS:
            raise KeyboardInterrupt
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
            raise Stopped(signal.Signals(wanted).name)

    def restore(self) -> None:
        """Give the signals back to whoever handled them before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
