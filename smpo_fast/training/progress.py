"""What happens before every network call of a step: the progress bar moves, and a requested stop takes effect."""

from __future__ import annotations

from tqdm import tqdm

from smpo_fast.common.runtime import StopSignal


class CallHook:
    """Called before every network call of a run.

    The bar counts pairs; within a step it moves in proportion to the work done, so that a long step shows progress.
    """

    def __init__(self, stop: StopSignal, bar: tqdm) -> None:
        self._stop, self._bar = stop, bar
        self.begin_step(0, 1)

    def begin_step(self, pairs: int, work: int) -> None:
        """A step of ``pairs`` pairs begins that costs ``work`` forward passes of a pair on this rank."""
        self._pairs, self._work, self._done, self._shown = pairs, work, 0, 0

    def __call__(self, pairs: int, cost: int = 1) -> None:
        """A call for some pairs follows, at ``cost`` forward passes each. Collective.

        Raises Stopped on every rank once a signal to stop has reached any of them.
        """
        self._stop.check()
        self._done += pairs * cost
        now = self._pairs * min(self._done, self._work) // self._work
        self._bar.update(now - self._shown)
        self._shown = now
