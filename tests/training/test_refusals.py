"""Mistakes are named before anything is loaded, and a run is not continued with what would change it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.paths import ROOT
from helpers.small_run import run

from smpo_fast.models import load


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim.lrr=1"], "unknown key 'optim.lrr'"),
        (["model.path=./nowhere"], "neither a folder nor a hub id"),
        (["data.pairs=./none.parquet"], "none.parquet"),
        (["eval.prompts=./none.txt"], "eval.prompts"),
        (["eval.scorer=magic", "eval.prompts=embedded"], "scorer 'magic'"),
        (["--ds_config", "./none.json"], "none.json: cannot be read"),
        (["model.precision=fp16"], "fp16"),
        (["log.wandb=project"], "pip install wandb"),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "load_network", lambda *_: pytest.fail("something heavy was loaded"))
    assert run(tmp_path / "run", *words) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert not (tmp_path / "run").exists()


def test_a_contradicting_deepspeed_file_names_both_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({"train_batch_size": 8, "zero_optimization": {"stage": 2}}))
    assert run(tmp_path / "run", "--ds_config", str(tmp_path / "ds.json")) == 2
    error = capsys.readouterr().err
    assert "ds.json" in error and "train_batch_size" in error and "batch.pairs_per_step = 6" in error


def test_a_cache_of_other_networks_is_refused(
    sd15_pipeline: Callable[[str], Path], cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "run", cache, f"model.path={sd15_pipeline('epsilon')}") == 2
    error = capsys.readouterr().err
    assert "encoders" in error and "kind" in error and cache.partition("=")[2] in error


def test_a_run_is_not_continued_with_other_settings(
    cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "run", cache, "run.steps=1") == 0
    assert run(tmp_path / "run", cache, "objective.beta=1.0") == 2
    error = capsys.readouterr().err
    assert "beta" in error and "2000" in error


def test_a_run_is_not_continued_on_other_pairs_or_from_another_model(
    cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "run", cache, "run.steps=1") == 0
    other = tmp_path / "other"
    assert run(tmp_path / "first", "data.max_pairs=8", "run.steps=1", f"data.cache={other}") == 0
    assert run(tmp_path / "run", "data.max_pairs=8", f"data.cache={other}") == 2
    assert "pairs" in capsys.readouterr().err
    aligned = f"model.unet={tmp_path / 'run' / 'export'}"
    assert run(tmp_path / "run", cache, aligned) == 2
    assert "model" in capsys.readouterr().err
    assert run(tmp_path / "next", cache, aligned, "run.steps=1") == 0, "an export starts a next run"


def test_dry_run_and_print_config_load_nothing(
    cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "load_network", lambda *_: pytest.fail("loaded"))
    assert run(tmp_path / "run", cache, "--dry-run", "--ds_config", str(ROOT / "configs" / "ds_zero2.json")) == 0
    plan = capsys.readouterr().out
    assert "sdxl, epsilon" in plan and "5.99 no-gradient calls per image" in plan and "6 pairs = 1 ranks x 6" in plan
    assert run(tmp_path / "run", "--print-config") == 0
    assert "pairs_per_step = 6" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
