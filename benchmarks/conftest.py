"""The fixture ``bench``, which checks, times and records with pytest-benchmark; and the table of ratios at the end.

pytest-benchmark stores, compares and prints the numbers, but its own clock does not know about devices. So the calls
are timed by ``harness.measure``, and the seconds are played back to pytest-benchmark through a clock they advance.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import harness  # noqa: E402


class Playback:
    """A clock that moves only when ``now`` is changed."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


PLAYBACK = Playback()


@dataclass(frozen=True)
class Row:
    """One result, as the summary shows it."""

    group: str
    case: str
    implementation: str
    baseline: str
    seconds: float
    also: str | None = None  # a second baseline


ROWS: list[Row] = []


def pytest_configure() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise pytest.UsageError("TRITON_INTERPRET=1 is set: times of interpreted kernels are meaningless; unset it")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=PLAYBACK))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """A GPU if there is one, else the CPU."""
    return harness.pick_device("auto")


@dataclass
class Bench:
    """Checks and times one implementation of one case of one group."""

    benchmark: Any
    device: torch.device

    def __call__(
        self,
        group: str,
        case: str,
        implementation: str,
        call: Callable[[], Any],
        *,
        baseline: str,
        reference: Callable[[], Any] | None = None,
        tolerance: float = 1e-4,
        flops: float = 0.0,
        moved: float = 0.0,
        dtype: torch.dtype = torch.float32,
        reset: Callable[[], Any] | None = None,
        seconds: float = 0.3,
        most: int = 200,
        graph: bool = False,
    ) -> None:
        """Compare the result of ``call`` with that of ``reference``, then time it.

        baseline: the implementation of the same case that ratios refer to. flops and moved: the FLOPs of a call, and
        the bytes it must move at least. graph: see ``harness.measure``. Raises WrongResult, without timing, if the
        results differ.
        """
        extra: dict[str, Any] = {}
        if reference is not None:
            if reset is not None:
                reset()
            wanted = reference()
            if reset is not None:
                reset()
            extra["error"] = harness.agree(f"{group}, {case}, {implementation}", call(), wanted, tolerance)
        timing = harness.measure(call, self.device, seconds=seconds, most=most, reset=reset, graph=graph)
        extra |= {"flops": flops, "bytes": moved, "peak_bytes": timing.peak_bytes}
        extra |= harness.shares(timing.median, flops, moved, dtype, harness.ceilings(self.device))
        self.record(group, case, implementation, timing.seconds, baseline=baseline, extra=extra)

    def record(
        self,
        group: str,
        case: str,
        implementation: str,
        seconds: Sequence[float],
        *,
        baseline: str,
        also: str | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Pass seconds that were measured elsewhere to pytest-benchmark and to the summary."""
        self.benchmark.group = group
        facts: dict[str, Any] = {"case": case, "implementation": implementation, "baseline": baseline}
        facts |= {"ceilings": harness.ceilings(self.device), **harness.environment(self.device)}
        self.benchmark.extra_info.update(facts, **(extra or {}))
        remaining = iter(seconds)

        def advance() -> None:
            PLAYBACK.now += next(remaining, 0.0)

        self.benchmark.pedantic(advance, rounds=len(seconds), iterations=1)
        if self.benchmark.enabled:
            median = harness.Timing(tuple(seconds)).median
            ROWS.append(Row(group, case, implementation, baseline, median, also))


@pytest.fixture
def bench(benchmark: Any, device: torch.device) -> Bench:
    """See ``Bench``."""
    return Bench(benchmark, device)


def ratios(rows: Sequence[Row]) -> list[tuple[str, str, str, str]]:
    """Case, implementation, median, and ratio to the named baseline, in the order measured."""
    by_key = {(r.group, r.case, r.implementation): r.seconds for r in rows}
    lines = []
    for row in rows:
        parts = []
        for baseline in filter(None, (row.baseline, row.also)):
            base = by_key.get((row.group, row.case, baseline))
            ratio = f"x{base / row.seconds:.2f}" if base else "not measured:"
            parts.append("baseline" if row.implementation == baseline else f"{ratio} against {baseline}")
        lines.append((f"{row.group}: {row.case}", row.implementation, harness.clock(row.seconds), ", ".join(parts)))
    return lines


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--results", metavar="DIR", help="write the medians as DIR/<device>/suite.json, read by report.py")


def write_results(folder: Path, rows: Sequence[Row], device: torch.device) -> Path:
    """Write the rows of a session, and the environment they were measured in, to ``<folder>/<device>/suite.json``."""
    rounded = [{**vars(row), "seconds": float(f"{row.seconds:.4g}")} for row in rows]
    limits = {name: float(f"{value:.4g}") for name, value in harness.ceilings(device).items()}
    file = folder / harness.folder_name(device) / "suite.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    facts = {"part": "suite", "environment": harness.environment(device), "ceilings": limits, "rows": rounded}
    file.write_text(json.dumps(facts, indent=1) + "\n")
    return file


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    if not ROWS:
        return
    terminalreporter.section("ratios (above 1 is faster than the named baseline)")
    terminalreporter.write_line(harness.table(("case", "implementation", "median", "ratio"), ratios(ROWS)))
    device = harness.pick_device("auto")
    if config.getoption("--results"):
        terminalreporter.write_line(f"wrote {write_results(Path(config.getoption('--results')), ROWS, device)}")
    limits = ", ".join(f"{name} {value:.4g}" for name, value in harness.ceilings(device).items())
    terminalreporter.write_line(f"{harness.device_name(device)}; ceilings measured in this run: {limits}")
