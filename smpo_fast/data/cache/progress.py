"""What preparation reports: a progress bar, forecasts of size and time, and summaries of rejected rows."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from smpo_fast.common.console import printable
from smpo_fast.common.runtime import World, print0, warn0
from smpo_fast.data.pairs import rules


class Progress:
    """A progress bar over the rows of all processes, and with ``forecast`` one estimate of the remaining time."""

    def __init__(self, what: str, total: int, world: World, *, forecast: bool) -> None:
        self._total, self._processes, self._forecast = total, world.size, forecast
        self._bar = tqdm(total=total, unit="pair", desc=what, mininterval=0.5, disable=world.rank != 0)
        self._last_time: float | None = None

    def __enter__(self) -> Progress:
        self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, trace)

    def move_to(self, rows: int) -> None:
        """Show that so many rows are finished, in all processes together; never moves backwards."""
        self._bar.update(max(0, rows - self._bar.n))

    def advance(self, rows: int) -> None:
        """Show that this process has finished more rows.

        The estimate follows the second call: until the first one the networks were warming up.
        """
        self._bar.update(rows)
        now = time.monotonic()
        if self._forecast and self._last_time is not None:
            self._forecast = False
            rate, left = rows / max(1e-9, now - self._last_time), self._total - self._bar.n
            if left > 0:
                print0(
                    f"time: about {_duration(left / rate / self._processes)} for the remaining {left} rows, at "
                    f"{rate:.2f} a second in each of {self._processes} processes (measured)"
                )
        self._last_time = now


def announce_size(root: Path, building: Path, *, total: int, left: int, pair_bytes: int, at_most: bool) -> None:
    """Print how much the latents will take, before the first is made, and warn if the disk is too small.

    total, left: rows of the table, and those not yet encoded.  pair_bytes: size of a pair's latents; ``at_most``: an
    upper bound.  A full disk is no error here: room can be made while the preparation runs, or before it is resumed.
    """
    if left < total:
        print0(f"{root}: resuming an interrupted preparation: {total - left} of {total} rows are done")
    print0(
        f"size: {total} rows x {pair_bytes} bytes = {total * pair_bytes / 1e9:.3f} GB of latents"
        f"{' at most' if at_most else ''}, less what is rejected"
    )
    need, free = pair_bytes * left, shutil.disk_usage(building).free
    if need > free:
        warn0(f"about {need / 1e9:.1f} GB are needed in {building.parent}, where {free / 1e9:.1f} GB are free")


def list_reasons(rejected: Sequence[tuple[int, str, str]]) -> str:
    """The reasons of rejected rows (row, uid, reason) with their counts and first rows."""
    kinds = Counter(rules.reason_kind(reason) for _, _, reason in rejected)
    rows = {kind: [str(row) for row, _, reason in rejected if rules.reason_kind(reason) == kind][:5] for kind in kinds}
    return "; ".join(
        f"{count} x {printable(kind)} (row {', '.join(rows[kind])}{', ..' if count > 5 else ''})"
        for kind, count in kinds.most_common()
    )


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"
