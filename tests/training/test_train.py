"""Whole training runs in this process: what is logged, exported, resumed and skipped."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from helpers.artifacts import reseal
from helpers.paths import SAMPLES, needs_samples
from helpers.small_run import assert_same_run, numbers, pair_table, run, weights
from PIL import Image

from smpo_fast.common.storage import sha256
from smpo_fast.config import loading
from smpo_fast.data.cache.format import CacheError
from smpo_fast.data.cache.reader import CachedPairs
from smpo_fast.engine.local import LocalEngine
from smpo_fast.models import locate
from smpo_fast.training import loop, step
from smpo_fast.training.finish import totals
from smpo_fast.training.learning_rate import learning_rate
from smpo_fast.training.run_log import read_metrics


def test_first_step_has_margin_zero_and_later_ones_learn(plain: Path) -> None:
    rows = read_metrics(plain)
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and all(row["applied"] for row in rows)
    assert rows[0]["logit_max"] == 0.0 and rows[0]["train_loss"] == pytest.approx(float(np.log(2)), abs=1e-7)
    assert rows[1]["logit_max"] > 0 and rows[-1]["grad_norm"] > 0
    phases = {"seconds/inversion", "seconds/policy", "seconds/reference", "seconds/optimizer"}
    names = {"implicit_acc", "model_mse", "avg_win_diff_loss", "avg_lose_diff_loss", "lr", "pairs_per_second"}
    assert phases | names | {"memory_gb"} <= set(rows[0])


def test_the_export_loads_in_diffusers_and_differs_from_the_base(plain: Path) -> None:
    pipe = StableDiffusionXLPipeline.from_pretrained(plain / "export")
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red circle on a blue background", num_inference_steps=2).images[0].size == (32, 32)
    base = StableDiffusionXLPipeline.from_pretrained(locate.find(loading.load().model).folder).unet.state_dict()
    moved = [name for name, value in weights(plain).items() if not torch.equal(value, base[name].float())]
    assert len(moved) > 0.9 * len(base)


def test_the_folder_tells_the_whole_story(plain: Path) -> None:
    assert loading.load(plain / "config.toml").run.dir == str(plain)
    assert torch.__version__ == json.loads((plain / "environment.json").read_text())["versions"]["torch"]
    assert Image.open(plain / "curves.png").size[0] > 500
    assert [p.name for p in sorted((plain / "checkpoints").iterdir())] == ["step-000002", "step-000004"]


def test_starting_a_finished_run_again_changes_nothing(plain: Path) -> None:
    before = numbers(plain), weights(plain)
    assert run(plain, *(f"data.cache={loading.load(plain / 'config.toml').data.cache}",)) == 0
    assert numbers(plain) == before[0]
    assert all(torch.equal(v, before[1][n]) for n, v in weights(plain).items())


@pytest.mark.parametrize(
    "words",
    [["batch.micro_pairs=6", "batch.inversion_pairs=1"], pytest.param(["batch.micro_pairs=5"], marks=pytest.mark.slow)],
)
def test_results_do_not_depend_on_batch_sizes(words: list[str], plain: Path, cache: str, tmp_path: Path) -> None:
    assert run(tmp_path / "run", cache, *words) == 0
    assert_same_run(plain, tmp_path / "run", tolerance=2e-4)


def test_the_learning_rate_goes_on_with_the_run(cache: str, tmp_path: Path) -> None:
    """Warm-up counts the steps of the run, not those since it was resumed."""
    words = [cache, "optim.warmup_steps=4"]
    assert run(tmp_path / "straight", *words) == 0
    assert run(tmp_path / "run", *words, "run.steps=2") == 0
    assert run(tmp_path / "run", *words) == 0
    assert [row["lr"] for row in read_metrics(tmp_path / "run")] == pytest.approx([2.5e-5, 5e-5, 7.5e-5, 1e-4])
    assert_same_run(tmp_path / "straight", tmp_path / "run")


def test_a_run_continued_from_a_checkpoint_is_bitwise_the_same(plain: Path, cache: str, tmp_path: Path) -> None:
    assert run(tmp_path / "run", cache, "run.steps=2") == 0
    assert run(tmp_path / "run", cache) == 0
    assert_same_run(plain, tmp_path / "run")


@pytest.mark.parametrize("words", [["objective.name=dpo", "model.precision=bf16-autocast"],
                                   ["inversion.fidelity=release", "optim.name=adafactor"],
                                   ["model.precision=bf16", "model.gradient_checkpointing=true"],
                                   ["objective.name=inpo", "data.prompt_dropout=1.0"],
                                   *([pytest.param([word], marks=pytest.mark.slow) for word in (
                                       "objective.name=sft", "inversion.network=reference", "inversion.fp8=true",
                                       "optim.name=adafactor", "model.gradient_checkpointing=true",
                                       "data.prompt_dropout=1.0", "model.precision=bf16-autocast")])])  # fmt: skip
def test_every_choice_trains(words: list[str], cache: str, tmp_path: Path) -> None:
    assert run(tmp_path / "run", cache, "run.steps=2", *words) == 0
    rows = read_metrics(tmp_path / "run")
    assert len(rows) == 2 and all(row["applied"] and np.isfinite(row["train_loss"]) for row in rows)
    if "sft" not in words[0]:
        assert rows[0]["logit_max"] == 0.0, "policy and reference start equal, whatever the precision"


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_sd15_trains(prediction: str, sd15_pipeline: Callable[[str], Path], tmp_path: Path) -> None:
    table = pair_table(tmp_path / "pairs.parquet", [{"label_0": 1.0}, {"label_0": 0.0}, {"label_0": 1.0}])
    words = [f"model.path={sd15_pipeline(prediction)}", f"data.pairs={table}", "data.resolution=16", "run.steps=2",
             "batch.pairs_per_step=2"]  # fmt: skip
    assert run(tmp_path / "run", *words) == 0
    assert StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "export", safety_checker=None)
    assert read_metrics(tmp_path / "run")[0]["logit_max"] == 0.0


def test_v_prediction_with_zero_terminal_snr_trains(sd15_pipeline: Callable[[str], Path], tmp_path: Path) -> None:
    """With four timesteps and four pairs a step, each of them is trained, also the one without signal."""
    base = tmp_path / "base"
    shutil.copytree(sd15_pipeline("v_prediction"), base)
    file = base / "scheduler" / "scheduler_config.json"
    changed = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "num_train_timesteps": 4}
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    table = pair_table(tmp_path / "pairs.parquet", [{"label_0": 1.0}, {"label_0": 0.0}] * 2)
    (tmp_path / "prompts.txt").write_text("a cat\n")
    words = [f"model.path={base}", f"data.pairs={table}", "data.resolution=16", "run.steps=2", "batch.pairs_per_step=4",
             "inversion.steps=2", "inversion.solver=pec", "inversion.average=angle", "eval.steps=2",
             f"eval.prompts={tmp_path / 'prompts.txt'}", "eval.scorer="]  # fmt: skip
    assert run(tmp_path / "run", *words) == 0
    rows = read_metrics(tmp_path / "run")
    assert rows[0]["logit_max"] == 0.0
    assert all(row["applied"] and np.isfinite(row["train_loss"]) and row["ref_mse"] < 100 for row in rows)
    exported = StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "export", safety_checker=None)
    assert exported.scheduler.alphas_cumprod[-1] == 0.0


@pytest.mark.parametrize(
    ("columns", "rows", "reported"),
    [
        (("label_0",), [{"label_0": 1.0}, {"label_0": 0.0}], "0 by reward, 2 by human label"),
        (("reward_0", "reward_1"), [{"reward_0": 0.2, "reward_1": 0.9}] * 2, "2 by reward, 0 by human label"),
        (
            ("label_0", "reward_0", "reward_1"),
            [{"label_0": 1.0, "reward_0": 0.2, "reward_1": 0.9}, {"label_0": 0.0}],
            "1 by reward, 1 by human label",
        ),
    ],
    ids=["labels", "rewards", "both"],
)
def test_labels_rewards_or_both_train_and_say_so(
    columns: tuple[str, ...], rows: list, reported: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pair_table(tmp_path / "pairs.parquet", rows, columns)
    words = [f"data.pairs={table}", "data.resolution=32", "run.steps=1", "batch.pairs_per_step=2"]
    assert run(tmp_path / "run", *words) == 0
    assert reported in capsys.readouterr().out


@needs_samples
def test_real_pairs_train_with_the_embedded_networks(tmp_path: Path) -> None:
    words = [f"data.pairs={SAMPLES / 'real_pairs.parquet'}", "data.resolution=64", "data.flip=true", "run.steps=2"]
    assert run(tmp_path / "run", *words) == 0
    assert len(read_metrics(tmp_path / "run")) == 2
    assert StableDiffusionXLPipeline.from_pretrained(tmp_path / "run" / "export")


def poison(cache_dir: Path, index: int) -> None:
    """Write NaN into the latents of one pair of a prepared cache, as if they had been encoded to it."""
    shard = next(cache_dir.glob("latents-*.safetensors"))
    raw = bytearray(shard.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    first, last = header["mean"]["data_offsets"]
    size = (last - first) // header["mean"]["shape"][0]
    place = start + first + index * size
    raw[place : place + size] = np.full(size // 2, np.nan, np.float16).tobytes()
    shard.write_bytes(raw)
    reseal(cache_dir / "cache.json", lambda info: info["files"][shard.name].update(sha256=sha256(shard)))


def test_a_step_that_is_not_finite_is_skipped_counted_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pair_table(tmp_path / "pairs.parquet", [{"label_0": 1.0}] * 12)
    words = [f"data.pairs={table}", "data.resolution=32", "run.steps=2"]
    assert run(tmp_path / "run", *words, "run.steps=0") == 0
    poison(tmp_path / "run" / "cache", 5)
    assert run(tmp_path / "run", *words, "run.max_nonfinite_steps=1") == 0
    rows = read_metrics(tmp_path / "run")
    bad = [row for row in rows if not row["applied"]]
    assert len(bad) == 1 and bad[0]["nonfinite_pairs"] == [5] and rows[-1]["skipped_steps"] == 1
    assert "rows [5] of the pair table" in capsys.readouterr().err
    assert all(v.isfinite().all() for v in weights(tmp_path / "run").values())
    assert run(tmp_path / "again", *words, f"data.cache={tmp_path / 'run' / 'cache'}", "run.max_nonfinite_steps=0") == 3
    assert "nonfinite_pairs" in capsys.readouterr().err


def test_totals_of_a_log() -> None:
    rows = [{"seconds": 2.0, "pairs_seen": 6, "memory_gb": 1.0}, {"seconds": 1.0, "pairs_seen": 12, "memory_gb": 1.5}]
    assert totals(rows) == "2 steps in 3 s (4.0 pairs/s), peak memory 1.50 GB (rank 0)"


def test_learning_rate_by_hand() -> None:
    optim = loading.from_dict({"optim": {"lr": 0.5, "warmup_steps": 4, "schedule": "linear"}}).optim
    rates = [learning_rate(optim, step, 8) for step in range(9)]
    assert [2 * rate for rate in rates] == [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert learning_rate(optim.model_copy(update={"warmup_steps": 0, "schedule": "constant"}), 0, 8) == 0.5


def test_a_finished_run_is_exported_after_its_weights_and_its_cache_were_checked(cache: str, tmp_path: Path) -> None:
    assert run(tmp_path / "run", cache, "run.steps=1") == 0
    shutil.rmtree(tmp_path / "run" / "export")
    with mock.patch.object(LocalEngine, "largest_weight", return_value=math.nan):
        assert run(tmp_path / "run", cache, "run.steps=1") == 3
    with mock.patch.object(CachedPairs, "finish_checks", side_effect=CacheError("a shard is damaged")):
        assert run(tmp_path / "run", cache, "run.steps=1") == 2
    assert not (tmp_path / "run" / "export").exists()


@pytest.mark.parametrize("lr", ["1e30", "1e6"])
def test_diverged_weights_are_neither_saved_nor_exported(
    lr: str, cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tmp_path / "run", cache, "run.steps=1") == 0
    good = tmp_path / "run" / "checkpoints" / "step-000001"
    monkeypatch.setattr(loop, "learning_rate", lambda *_: float(lr))
    monkeypatch.setattr(step, "learning_rate", lambda *_: float(lr))
    words = ["run.save_every=1", "run.keep=1", "optim.clip=0"]
    assert run(tmp_path / "other", cache, "run.steps=1", *words) == 3
    assert "There is no earlier checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "other" / "export").exists()
    assert run(tmp_path / "run", cache, "run.save_every=1", "run.keep=1") == 3
    assert "training has diverged, and nothing of it was saved" in (error := capsys.readouterr().err)
    assert f"The last good checkpoint is {good}" in error
    assert [folder.name for folder in good.parent.iterdir()] == [good.name]
