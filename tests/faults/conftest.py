"""Shares the time of the campaign among its tests, and adds up what they tried (``make faults``)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from faults.campaign import Campaign, shuffled
from faults.results import Count, summary, to_json

_FULL_MINUTES = 28.0
_counts: list[Count] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=0, help="decides which faults are tried first")
    parser.addoption("--results", type=Path, help="file for the numbers of faults tried and survived, as JSON")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[_shares] = sum(_share(item) for item in items if item.get_closest_marker("faults"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _counts.extend(
        Count(**value) for name, value in report.user_properties if name == "faults" and report.when == "call"
    )


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if _counts:
        seed = config.getoption("--seed", 0)
        terminalreporter.write_line(summary(_counts))
        if file := config.getoption("--results", None):
            file.write_text(to_json(seed, _counts))


_shares = pytest.StashKey[float]()


def _share(item: pytest.Item) -> float:
    marker = item.get_closest_marker("faults")
    return float(marker.kwargs.get("share", 1)) if marker else 0.0


@pytest.fixture(scope="session")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    """The programs, run once undisturbed; each worker has its own."""
    campaign = Campaign(tmp_path_factory.mktemp("campaign"))
    yield campaign
    campaign.close()


Attempt = Callable[..., None]


@pytest.fixture
def attempt(request: pytest.FixtureRequest, campaign: Campaign) -> Attempt:
    """``attempt(program, kind, faults, act)``: try ``act(fault)`` on as many faults as this test has time for.

    They are tried in an order that the seed decides, at least one of them. ``act`` returns what was wrong, or ''.
    """
    config = request.config
    minutes = config.getoption("minutes") or _FULL_MINUTES
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    available = 0.9 * (minutes * 60 - campaign.ready_after) * workers
    seconds = available * _share(request.node) / config.stash[_shares]

    def try_(program: str, kind: str, faults: Sequence[Any], act: Callable[[Any], str]) -> None:
        began, tried, problems = time.monotonic(), 0, []
        for fault in shuffled(faults, config.getoption("--seed", 0), program, kind):
            if tried and time.monotonic() - began > seconds:
                break
            tried += 1
            if problem := act(fault):
                problems.append(problem)
        count = Count(kind, program, possible=len(faults), tried=tried, survived=tried - len(problems))
        request.node.user_properties.append(("faults", count._asdict()))
        assert not problems, "\n\n".join(problems)

    return try_
