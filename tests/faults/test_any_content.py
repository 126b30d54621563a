"""Settings, DeepSpeed files and sources of any content: accepted, or refused in a sentence."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import import_sources
from helpers.any_settings import DS_FILES, SECTIONS, TOML, WORDS, load_text, load_values, load_words, resolve
from hypothesis import HealthCheck, given, seed, settings

from faults.campaign import Campaign, refused
from faults.conftest import Attempt
from smpo_fast.common.runtime import rng

BATCHES = range(1000)  # of 100 examples each
SOURCES: dict[str, Callable[[Path], Any]] = {
    "parquet": import_sources.chosen_parquet,
    "arrow": import_sources.arrow_file,
    "tar": import_sources.tar_letters,
    "tar.gz": import_sources.tar_numbers,
    "JSON lines": import_sources.jsonl_chosen,
    "CSV": import_sources.csv_pairs,
    "folders": import_sources.winners_and_losers,
}


@pytest.mark.faults(share=1)
@pytest.mark.parametrize(
    ("what", "strategy", "act"),
    [
        ("words", WORDS, lambda value, folder: load_words(value)),
        ("sections", SECTIONS, lambda value, folder: load_values(value)),
        ("TOML files", TOML, load_text),
        ("DeepSpeed files", DS_FILES, resolve),
    ],
)
def test_settings(what: str, strategy: Any, act: Callable[[Any, Path], None], attempt: Attempt, tmp_path: Path) -> None:
    plan = settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))

    def hundred(number: int) -> str:
        try:
            seed(number)(plan(given(strategy)(lambda value: act(value, tmp_path))))()
        except Exception as error:
            return f"{what}, seed {number}: {error!r}"
        return ""

    attempt(what, "a hundred of any", BATCHES, hundred)


@pytest.mark.faults(share=1)
@pytest.mark.parametrize("form", SOURCES)
def test_a_source(form: str, campaign: Campaign, attempt: Attempt) -> None:
    """Bytes of its files are replaced, removed and repeated; with --check every picture is decoded."""

    def act(number: int) -> str:
        campaign.set_up("import any")
        shutil.rmtree(campaign.work / "source", ignore_errors=True)
        (campaign.work / "source").mkdir()
        SOURCES[form](campaign.work / "source")
        files = sorted(p for p in (campaign.work / "source").rglob("*") if p.is_file())
        at = rng(number, "any source", len(files))
        file = files[int(at.integers(len(files)))]
        content = bytearray(file.read_bytes())
        for _ in range(int(at.integers(1, 5))):
            place, length = (int(at.integers(len(content) + 1)), int(at.integers(1, 9)))
            inserted = bytes(at.integers(0, 256, int(at.integers(0, 9)), dtype="uint8"))
            content[place : place + length] = inserted or content[place : place + length] * 2
        file.write_bytes(content)
        wrong = refused(campaign.run("import any"))
        return wrong and f"{form} {number}, {file.name} changed: {wrong}"

    attempt(f"import {form}", "any content", range(10_000), act)
