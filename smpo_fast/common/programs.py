"""How every program ends: exit status, and one line for what a user can correct."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from smpo_fast.common.errors import UserError

DONE, UNMET, MISTAKE, FAILED = 0, 1, 2, 3  # exit status; UNMET: a check that was asked for has a negative answer


class Failure(Exception):
    """The work was begun and cannot be finished, through no mistake in what was given."""


def run(act: Callable[[], int]) -> int:
    """The exit status of a program: that of ``act``, MISTAKE after a UserError, FAILED after a Failure."""
    try:
        return act()
    except UserError as error:
        return _report(error, MISTAKE)
    except Failure as error:
        return _report(error, FAILED)


def _report(error: Exception, status: int) -> int:
    # every rank reports: a file may be missing on one node only
    rank = f" (rank {os.environ.get('RANK', 0)})" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    print(f"error{rank}: {error}", file=sys.stderr, flush=True)
    return status
