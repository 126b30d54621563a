"""The progress bar within an optimizer step."""

from __future__ import annotations

from tqdm import tqdm


class StepProgress:
    """Moves a bar of pairs forward with every network call of a step, so that a long window shows its progress."""

    def __init__(self, bar: tqdm, pairs: int, calls: int) -> None:
        self._bar, self._pairs, self._calls, self._done, self._shown = bar, pairs, calls, 0, 0

    def advance(self, calls: int) -> None:
        """Some forward passes of a pair are done."""
        self._done += calls
        now = self._pairs * min(self._done, self._calls) // self._calls
        self._bar.update(now - self._shown)
        self._shown = now
