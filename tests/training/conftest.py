"""Runs that the tests of training share, made once per session."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.small_run import SMALL, run

import smpo_fast.training.run  # noqa: F401  (train.py imports it late: perhaps after a test has replaced something)
from smpo_fast import cli


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The embedded pairs, prepared once: `data.cache=...`."""
    folder = tmp_path_factory.mktemp("prepared") / "cache"
    assert cli.main(["prepare", *SMALL, f"data.cache={folder}", f"run.dir={folder.parent}"]) == 0
    return f"data.cache={folder}"


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory, cache: str) -> Path:
    """Four steps, uninterrupted, in plain PyTorch, which other runs are compared with."""
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    assert run(run_dir, cache) == 0
    return run_dir
