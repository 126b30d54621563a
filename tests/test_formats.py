"""What an earlier version left on disk still opens: fixtures/formats, made by its make.py, read through the programs.

Every artefact is copied first, so that it is opened in another folder than it was made in, with other file times; the
settings in it name its neighbours by relative paths, as a user's may. expected.json has what was seen when they were
made. Weights, latents, scores and tables come back bit for bit on any machine; losses agree but for the order of sums.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tomllib
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
import toy
from safetensors.torch import load_file
from torch import nn

from smpo_fast import checkpoint, cli, config, data, engine, reference, train
from smpo_fast.cache import CachedPairs
from smpo_fast.checkpoint import Progress
from smpo_fast.config import Config
from smpo_fast.engine import Engine
from smpo_fast.metrics import read_metrics
from smpo_fast.runtime import World
from smpo_fast.trajectories import Trajectories

FORMATS = Path(__file__).parent / "fixtures" / "formats"
FACTS = {"seed": 3, "optim": {"lr": 1e-3}}  # of the toy's checkpoints
SAVED, LAST = 2, 5  # steps of a toy run: at the checkpoint, at the end
TOYS: dict[str, dict[str, Any]] = {  # checkpoints of a toy run, and their settings
    "adamw": {},
    "adamw8bit": {"optimizer": "adamw8bit"},
    "lion8bit": {"optimizer": "lion8bit"},
    "adafactor": {"optimizer": "adafactor"},
    "bf16": {"optimizer": "adamw8bit_aligned", "precision": "bf16", "master": "none"},  # without fp32 weights
    "two_ranks": {"optimizer": "adamw8bit_aligned"},  # of two processes with ZeRO stage 2, which cut a matrix in two
}
MEMORY_TABLE = "memory://formats/pairs.parquet"  # what was imported, at an address that every machine has
SCORE = ["score", "embedded", "scores", "--scorer", "embedded", "--max-pairs", "8", "--device", "cpu"]
LOGGED = ("train_loss", "grad_norm", "model_mse", "rewards/margins", "lr", "pairs_seen")


class Scaled(nn.Module):
    """Multiplies by a persistent buffer, which is another in the checkpoints."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((3,), scale))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale.mean()


def toy_network(scale: float = 1.0) -> nn.Module:
    """For toy.batch, as small as a matrix can be whose states bitsandbytes quantises (4096 entries)."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 22), Scaled(scale), nn.SiLU(), nn.Linear(22, 5))


def toy_engine(name: str, scale: float = 1.0) -> tuple[Engine, Config]:
    settings = toy.settings(pairs=4, **TOYS[name])
    return engine.make_engine(toy_network(scale), settings, World(), settings.model.precision, None), settings


def toy_steps(
    trained: Engine, settings: Config, first: int, last: int, rank: int = 0, size: int = 1
) -> list[list[float]]:
    """Loss (of the rank) and gradient norm of some steps, at a rate that lets a lost optimizer state show."""
    steps = range(first, last)
    return [[toy.accumulate(trained, settings, i, rank, size), trained.step(2e-2).grad_norm] for i in steps]


def digest(tensors: Iterable[torch.Tensor | np.ndarray | bytes]) -> str:
    """sha256 of numbers as they lie in memory."""
    found = hashlib.sha256()
    for one in tensors:
        found.update(one if isinstance(one, bytes) else np.ascontiguousarray(one).tobytes())
    return found.hexdigest()


def state_digest(state: dict[str, torch.Tensor]) -> str:
    return digest(part for name in sorted(state) for part in (name.encode(), state[name]))


def cache_facts(cached: CachedPairs) -> dict[str, Any]:
    every = np.arange(len(cached))
    moments, prompts = cached.moments(every, np.zeros((len(every), 2), bool)), cached.prompts(cached.prompt_index)
    return {
        "rows": cached.rows.tolist(),
        "uids": cached.uids.tolist(),
        "rewards": cached.rewards.tolist(),
        "labels": cached.labels.tolist(),
        "texts": cached.texts.tolist(),
        "moments": digest(moments),
        "prompts": digest(part for part in prompts if part is not None),
    }


def table_facts(table: Path) -> list[list[Any]]:
    found = [pair for pair in data.read_pairs(table) if isinstance(pair, data.RawPair)]
    return [[p.row, p.uid, p.prompt, p.label, p.rewards, digest(p.images)] for p in found]


def store_facts(store: Trajectories, steps: int, pairs: int) -> list[str]:
    """A hash of what a store gives for each step."""
    found = []
    for step in range(steps):
        tau, errors = store.tau(step, range(pairs)), store.errors(step, range(pairs))
        assert tau is not None and errors is not None, f"step {step} is not stored"
        found.append(digest([tau, errors]))
    return found


def logged(run_dir: Path) -> list[list[float]]:
    return [[row[name] for name in LOGGED] for row in read_metrics(run_dir)]


def to_memory(table: bytes, created: str = "") -> None:
    """Put a table at MEMORY_TABLE, made at a moment: an import looks at sizes and times."""
    files = fsspec.filesystem("memory")
    path = files._strip_protocol(MEMORY_TABLE)
    files.pipe_file(path, table)
    if created:
        files.store[path].created = datetime.fromisoformat(created)


def nearly(values: list[list[float]], relative: float = 1e-3) -> list[Any]:
    return [pytest.approx(row, rel=relative, abs=1e-4) for row in values]


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


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- settings ---------------------------------------------------------------------------------------------------


def test_the_settings_of_a_run_load(old: Path) -> None:
    written = tomllib.loads((old / "run/config.toml").read_text())
    values = config.load(old / "run/config.toml").model_dump()
    kept = {section: {key: values[section][key] for key in keys} for section, keys in written.items()}
    assert kept == written
    assert written["lora"]["rank"] == 1 and written["optim"]["lr"] == 0.02, "not the defaults"


# --- checkpoints ------------------------------------------------------------------------------------------------


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
    job = train.Job(config.load(old / "run/config.toml"), None)
    policy = reference.load_policy(job.config, job.source, job.precision, job.world.device)
    trained = engine.make_engine(policy, job.config, job.world, job.precision, None)
    progress = checkpoint.restore_latest("run", trained, job.world, job.facts)
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


# --- the cache --------------------------------------------------------------------------------------------------


def test_a_cache_verifies_and_gives_its_numbers(old: Path, expected: dict[str, Any]) -> None:
    """With the settings it is also asked whether it serves them: time and place of the pair table do not count."""
    assert cli.main(["verify", "cache", "--config", "run/config.toml"]) == 0
    assert cache_facts(CachedPairs(old / "cache")) == expected["cache"]


def test_a_cache_is_prepared_already(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(old / "cache")
    assert cli.main(["prepare", "--config", "run/config.toml"]) == 0
    assert "cache: prepared already, 8 pairs" in capsys.readouterr().out
    assert contents(old / "cache") == before


# --- the trajectory store ---------------------------------------------------------------------------------------


def test_a_store_is_complete_and_gives_its_numbers(old: Path, expected: dict[str, Any]) -> None:
    """Asked for by the run's settings: the facts that it was made with are those of today."""
    store = train.open_store(train.Job(config.load(old / "run/config.toml"), None))
    assert store is not None and store.complete(0, 4) and not store.complete(0, 5)
    assert store_facts(store, 4, 4) == expected["store"]


def test_another_run_trains_from_the_store(old: Path, expected: dict[str, Any]) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in (old / "store").iterdir()}
    assert train.main(["--config", "run/config.toml", "run.dir=another"]) == 0
    assert logged(Path("another")) == nearly(expected["run"]["logged"])
    after = {file.name: file.stat().st_mtime_ns for file in (old / "store").iterdir()}
    assert after == before, "nothing was inverted, so nothing was written"


# --- imported pairs and scores ----------------------------------------------------------------------------------


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
    assert "imported holds another import (it differs in source): remove it" in capsys.readouterr().err
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
