"""How every program ends: exit status, and one line for what a user can correct."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from smpo_fast import __version__
from smpo_fast.common.console import BAD, coloured, printable
from smpo_fast.common.errors import EnvironmentProblem, UserError, environment_problem

DONE, UNMET, MISTAKE, FAILED = 0, 1, 2, 3  # exit status; UNMET: a check that was asked for has a negative answer
INTERRUPTED = 130  # as a shell reports a process that Ctrl-C ended

_LIBRARIES = ("torch", "triton", "diffusers", "transformers", "deepspeed", "peft", "bitsandbytes")


def versions() -> str:
    """The version of this package, of Python and of the installed libraries that results depend on; imports none."""
    found = []
    for name in _LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return f"smpo_fast {__version__}, Python {platform.python_version()}; {', '.join(found)}"


class Failure(Exception):
    """The work was begun and cannot be finished, through no mistake in what was given."""


def run(act: Callable[[], int]) -> int:
    """The exit status of a program: that of ``act``, or of the way it failed.

    A UserError and what the machine refuses (a full disk, a file that may not be written) give MISTAKE and one line,
    a Failure FAILED, and Ctrl-C INTERRUPTED. Any other exception is a bug and keeps its traceback.
    """
    configure_allocator()
    try:
        return act()
    except UserError as error:
        return _report(error, MISTAKE)
    except Failure as error:
        return _report(error, FAILED)
    except KeyboardInterrupt:
        _say_interrupted()
        return INTERRUPTED
    except Exception as error:
        problem = machine_problem(error)
        if problem is None:
            raise
        return _report(problem, MISTAKE)


@contextmanager
def ended_by_interrupt() -> Iterator[None]:
    """Inside, Ctrl-C ends the process at once: for imports before any work, which may swallow KeyboardInterrupt."""

    def end(number: int, frame: object) -> None:
        _say_interrupted()
        os._exit(INTERRUPTED)

    if threading.current_thread() is not threading.main_thread():  # it cannot have handlers
        yield
        return
    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _say_interrupted() -> None:
    if os.environ.get("RANK", "0") == "0":
        print("\ninterrupted: start the same command again to continue", file=sys.stderr, flush=True)


def configure_allocator() -> None:
    """Let CUDA's memory grow in place, unless the user configured torch's allocator; to be called before CUDA starts.

    A step alternates between calls of different sizes, which leave holes between fixed blocks of memory.
    """
    if not any(os.environ.get(name) for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def machine_problem(error: BaseException) -> EnvironmentProblem | None:
    """What the machine refused, if that is behind an exception; None for any other exception, which is a bug."""
    for found in _chain(error):
        names = [str(name) for name in (getattr(found, "filename", None), getattr(found, "filename2", None)) if name]
        problem = environment_problem(found, " and ".join(names) or "this machine")
        if problem is not None:
            return problem
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, and those that it was raised from or while handling."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _report(error: Exception, status: int) -> int:
    # every rank reports: a file may be missing on one node only
    rank = f" (rank {os.environ.get('RANK', 0)})" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    print(f"{coloured(f'error{rank}:', BAD, sys.stderr)} {printable(error, lines=True)}", file=sys.stderr, flush=True)
    return status
