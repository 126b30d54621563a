"""What an earlier version left on disk still opens: fixtures/formats, made by its make.py, read through the programs.

Every artefact is copied first, so that it is opened in another folder than it was made in, with other file times; the
settings in it name its neighbours by relative paths, as a user's may. expected.json has what was seen when they were
made. Weights, latents, scores and tables come back bit for bit on any machine; losses agree but for the order of sums.
"""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.formats import (
    FACTS,
    FORMATS,
    LAST,
    MEMORY_TABLE,
    SAVED,
    SCORE,
    TOYS,
    cache_facts,
    contents,
    logged,
    nearly,
    state_digest,
    store_facts,
    table_facts,
    to_memory,
    toy_engine,
    toy_steps,
)
from safetensors.torch import load_file

from smpo_fast import cli, train
from smpo_fast.common.runtime import World
from smpo_fast.config import loading
from smpo_fast.data.cache.reader import CachedPairs
from smpo_fast.engine import checkpoint, create
from smpo_fast.engine.checkpoint import Progress
from smpo_fast.training.facts import fact_defaults
from smpo_fast.training.job import Job
from smpo_fast.training.policy import load_policy
from smpo_fast.training.run import open_store


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FORMATS / "expected.json").read_text())
    return found


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the artefacts, which is the current folder."""
    folder = tmp_path / "moved"
    shutil.copytree(FORMATS, folder, copy_function=shutil.copyfile)  # contents, not times
    monkeypatch.chdir(folder)
    return folder


def test_the_settings_of_a_run_load(old: Path) -> None:
    written = tomllib.loads((old / "run/config.toml").read_text())
    values = loading.load(old / "run/config.toml").model_dump()
    kept = {section: {key: values[section][key] for key in keys} for section, keys in written.items()}
    assert kept == written
    assert written["lora"]["rank"] == 1 and written["optim"]["lr"] == 0.02, "not the defaults"


def test_a_run_goes_on_from_its_checkpoint(old: Path, expected: dict[str, Any]) -> None:
    """Trajectories are computed again, and the new ones are as those that the store had."""
    shutil.rmtree("store")
    before = contents(old / "cache")
    assert [p.name for p in checkpoint.list_checkpoints("run")] == ["step-000002"]
    assert train.main(["--config", "run/config.toml"]) == 0
    assert logged(Path("run")) == nearly(expected["run"]["logged"])
    assert [p.name for p in checkpoint.list_checkpoints("run")] == ["step-000002", "step-000004"]
    manifest = json.loads(Path("run/checkpoints/step-000004/manifest.json").read_text())
    assert manifest["progress"]["step"] == 4 and manifest["progress"]["pairs_seen"] == 16
    assert contents(old / "cache") == before, "the cache served as it was"
    for step in (2, 3):
        name = f"store/step-{step:06d}.0-of-1.safetensors"
        torch.testing.assert_close(load_file(name), load_file(FORMATS / name), rtol=1e-2, atol=1e-2)


def test_the_adapters_in_a_checkpoint_are_what_was_trained(old: Path, expected: dict[str, Any]) -> None:
    job = Job(loading.load(old / "run/config.toml"), None)
    policy = load_policy(job.config, job.source, job.precision, job.world.device)
    trained = create.make_engine(policy, job.config, job.world, job.precision, None)
    progress = checkpoint.restore_latest("run", trained, job.world, job.facts, fact_defaults(job.facts))
    assert progress is not None and (progress.step, progress.pairs_seen, progress.skipped) == (2, 8, 0)
    adapters = {name: t for name, t in trained.full_state().items() if ".lora_" in name}
    assert state_digest(adapters) == expected["run"]["adapters"]


@pytest.mark.parametrize("name", TOYS)
def test_weights_buffers_and_optimizer_state_come_back(name: str, old: Path, expected: dict[str, Any]) -> None:
    trained, settings = toy_engine(name)
    fresh = state_digest(trained.full_state())
    progress = checkpoint.restore_latest(old / "toy" / name, trained, World(), FACTS)
    assert progress == Progress(step=SAVED, pairs_seen=SAVED * 4, seconds=1.5, skipped=1)
    found = state_digest(trained.full_state())
    assert found == expected["toy"][name]["weights"] != fresh
    relative = 1e-2 if settings.model.precision == "bf16" else 1e-4
    assert toy_steps(trained, settings, SAVED, LAST) == nearly(expected["toy"][name]["steps"], relative)


def test_a_cache_verifies_and_gives_its_numbers(old: Path, expected: dict[str, Any]) -> None:
    """With the settings it is also asked whether it serves them: time and place of the pair table do not count."""
    assert cli.main(["verify", "cache", "--config", "run/config.toml"]) == 0
    assert cache_facts(CachedPairs(old / "cache")) == expected["cache"]


def test_a_cache_is_prepared_already(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(old / "cache")
    assert cli.main(["prepare", "--config", "run/config.toml"]) == 0
    assert "cache: already prepared, 8 pairs" in capsys.readouterr().out
    assert contents(old / "cache") == before


def test_a_store_is_complete_and_gives_its_numbers(old: Path, expected: dict[str, Any]) -> None:
    """Asked for by the run's settings: the facts that it was made with are those of today."""
    store = open_store(Job(loading.load(old / "run/config.toml"), None))
    assert store is not None and store.complete(0, 4) and not store.complete(0, 5)
    assert store_facts(store, 4, 4) == expected["store"]


def test_another_run_trains_from_the_store(old: Path, expected: dict[str, Any]) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in (old / "store").iterdir()}
    assert train.main(["--config", "run/config.toml", "run.dir=another"]) == 0
    assert logged(Path("another")) == nearly(expected["run"]["logged"])
    after = {file.name: file.stat().st_mtime_ns for file in (old / "store").iterdir()}
    assert after == before, "nothing was inverted, so nothing was written"


def test_an_imported_table_reads(old: Path, expected: dict[str, Any]) -> None:
    assert table_facts(old / "imported") == expected["pairs"]


def test_an_import_is_done_already(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An import remembers where its source was, and its time (hence the table in memory); another is refused."""
    source = (old / "source.parquet").read_bytes()
    made = json.loads((old / "imported/import.json").read_text())["source"]["files"][0]
    before = contents(old / "imported")
    to_memory(source, made["stamp"])
    assert cli.main(["import", MEMORY_TABLE, "imported"]) == 0
    assert "imported: imported already" in capsys.readouterr().out
    to_memory(source)
    assert cli.main(["import", MEMORY_TABLE, "imported"]) == 2
    assert "imported holds another table (it differs in source): remove it" in capsys.readouterr().err
    assert contents(old / "imported") == before


def test_scores_are_there_already(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = (old / "scores/scores.parquet").stat().st_mtime_ns
    assert cli.main(SCORE) == 0
    assert "of 8 pairs scored" in capsys.readouterr().out
    assert (old / "scores/scores.parquet").stat().st_mtime_ns == written, "nothing was scored again"


def test_scores_are_looked_up_for_a_table_without_rewards(old: Path, expected: dict[str, Any]) -> None:
    """The table is another one than was scored, with some of its images."""
    assert all(rewards is None for *_, rewards, _ in expected["pairs"])
    words = ["data.pairs=imported", "data.max_pairs=0", "data.scores=scores", "data.cache=scored"]
    assert cli.main(["prepare", "--config", "run/config.toml", *words]) == 0
    assert CachedPairs(old / "scored").rewards.tolist() == expected["scores"]
