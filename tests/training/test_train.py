"""The whole road as a user walks it: real processes, real files, stopped, killed and resumed."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from helpers.small_run import SMALL, numbers, run, weights
from PIL import Image

from smpo_fast.common.runtime import World
from smpo_fast.models import load, locate
from smpo_fast.training import finish as training_finish
from smpo_fast.training import loop
from smpo_fast.training import step as training_step
from smpo_fast.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
PAIRS = Path(os.environ.get("SMPO_PAIRS", ROOT / "../shared/pairs"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The embedded pairs, prepared once: `data.cache=...`."""
    folder = tmp_path_factory.mktemp("prepared") / "cache"
    from smpo_fast import cli

    words = [*SMALL, f"data.cache={folder}", f"run.dir={folder.parent}"]
    assert cli.main(["prepare", *words]) == 0
    return f"data.cache={folder}"


def launch(run_dir: Path, *words: str, ranks: int = 1, ds: str | None = "ds_zero2.json") -> subprocess.Popen[str]:
    """The program in processes of its own: under the DeepSpeed launcher when there is a DeepSpeed file."""
    script = [str(ROOT / "smpo_fast" / "train.py")]
    if ds:
        launcher = str(Path(sys.executable).parent / "deepspeed")
        script = [launcher, "--num_gpus", str(ranks), "--master_port", free_port(), *script]
    else:
        script = [sys.executable, *script]
    ds_words = ["--ds_config", str(ROOT / "configs" / ds)] if ds else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.Popen(
        [*script, *ds_words, *SMALL, f"run.dir={run_dir}", *words],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True,
    )  # fmt: skip


def free_port() -> str:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == status, out[-4000:]
    return out


def assert_same_run(a: Path, b: Path, tolerance: float = 0.0) -> None:
    rows_a, rows_b = numbers(a), numbers(b)
    assert [r["step"] for r in rows_a] == [r["step"] for r in rows_b]
    for row_a, row_b in zip(rows_a, rows_b, strict=True):
        assert row_a.keys() == row_b.keys()
        for name, value in row_a.items():
            assert value == pytest.approx(row_b[name], rel=tolerance, abs=tolerance), (row_a["step"], name)
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    assert all((ours[n] - theirs[n]).abs().max() <= tolerance for n in ours)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, cache: str) -> Path:
    """Four steps, uninterrupted, in plain PyTorch: what the others are compared with."""
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    assert run(run_dir, cache) == 0
    return run_dir


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
    base = StableDiffusionXLPipeline.from_pretrained(locate.find(loop.config.load().model).folder).unet.state_dict()
    moved = [name for name, value in weights(plain).items() if not torch.equal(value, base[name].float())]
    assert len(moved) > 0.9 * len(base)


def test_the_folder_tells_the_whole_story(plain: Path) -> None:
    assert loop.config.load(plain / "config.toml").run.dir == str(plain)
    assert torch.__version__ == json.loads((plain / "environment.json").read_text())["versions"]["torch"]
    assert Image.open(plain / "curves.png").size[0] > 500
    assert [p.name for p in sorted((plain / "checkpoints").iterdir())] == ["step-000002", "step-000004"]


def test_starting_a_finished_run_again_changes_nothing(plain: Path) -> None:
    before = numbers(plain), weights(plain)
    assert run(plain, *(f"data.cache={loop.config.load(plain / 'config.toml').data.cache}",)) == 0
    assert numbers(plain) == before[0]
    assert all(torch.equal(v, before[1][n]) for n, v in weights(plain).items())


@pytest.mark.parametrize("words", [["batch.micro_pairs=6", "batch.inversion_pairs=1"], ["batch.micro_pairs=5"]])
def test_results_do_not_depend_on_batch_sizes(words: list[str], plain: Path, cache: str, tmp_path: Path) -> None:
    assert run(tmp_path / "run", cache, *words) == 0
    assert_same_run(plain, tmp_path / "run", tolerance=2e-4)


def test_a_run_continued_from_a_checkpoint_is_bitwise_the_same(plain: Path, cache: str, tmp_path: Path) -> None:
    assert run(tmp_path / "run", cache, "run.steps=2") == 0
    assert run(tmp_path / "run", cache) == 0
    assert_same_run(plain, tmp_path / "run")


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while len(read_metrics(run_dir)) < step:
        assert process.poll() is None and time.monotonic() < deadline, "the run ended early or hangs"
        time.sleep(0.02)


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_stopped_or_killed_and_started_again(kind: signal.Signals, cache: str, plain: Path, tmp_path: Path) -> None:
    process = launch(tmp_path / "run", cache, ds=None)
    wait_for_step(tmp_path / "run", 3, process)
    process.send_signal(kind)
    out = finish(process, status=-kind if kind == signal.SIGKILL else 0)
    if kind != signal.SIGKILL and "complete" not in out:
        assert f"stopped by {kind.name}" in out
        assert (tmp_path / "run" / "checkpoints" / "step-000003").is_dir(), "the last finished step is saved"
    assert run(tmp_path / "run", cache) == 0
    assert_same_run(plain, tmp_path / "run")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, cache: str) -> Path:
    """The same four steps by two ranks under ZeRO 2."""
    run_dir = tmp_path_factory.mktemp("two_ranks") / "run"
    assert "The run is complete" in finish(launch(run_dir, cache, ranks=2))
    return run_dir


def test_two_ranks_under_zero_2_agree_with_plain_pytorch(two_ranks: Path, plain: Path) -> None:
    assert_same_run(plain, two_ranks, tolerance=2e-4)
    assert read_metrics(two_ranks)[0]["logit_max"] == 0.0


@pytest.mark.parametrize("stage", [1, 3])
def test_two_ranks_under_zero_1_and_3_agree_with_plain_pytorch(
    stage: int, cache: str, plain: Path, tmp_path: Path
) -> None:
    finish(launch(tmp_path / "run", cache, ranks=2, ds=f"ds_zero{stage}.json"))
    assert_same_run(plain, tmp_path / "run", tolerance=2e-4)
    assert read_metrics(tmp_path / "run")[0]["logit_max"] == 0.0, "equal networks predict equally under sharding too"


def test_two_ranks_stopped_by_ctrl_c_go_on_exactly(two_ranks: Path, cache: str, tmp_path: Path) -> None:
    """A terminal sends SIGINT to the launcher and the ranks; the launcher then sends SIGTERM to the ranks."""
    process = launch(tmp_path / "run", cache, ranks=2)
    wait_for_step(tmp_path / "run", 1, process)
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert "stopped by SIGINT; the state is saved" in out and list((tmp_path / "run" / "checkpoints").iterdir())
    finish(launch(tmp_path / "run", cache, ranks=2))
    assert_same_run(two_ranks, tmp_path / "run")


def test_eight_bit_adam_trains_under_zero(cache: str, plain: Path, tmp_path: Path) -> None:
    finish(launch(tmp_path / "run", cache, "optim.name=adamw8bit", ds="ds_zero2.json"))
    eight, full = (numbers(d)[-1]["train_loss"] for d in (tmp_path / "run", plain))
    assert abs(eight - full) < 2e-3


@pytest.mark.parametrize("words", [["objective.name=dpo"], ["objective.name=inpo"], ["objective.name=sft"],
                                   ["inversion.fidelity=release"], ["inversion.network=reference"],
                                   ["model.precision=bf16"], ["model.precision=bf16-autocast"],
                                   ["optim.name=adafactor"], ["model.gradient_checkpointing=true"],
                                   ["data.prompt_dropout=1.0"]])  # fmt: skip
def test_every_choice_trains(words: list[str], cache: str, tmp_path: Path) -> None:
    assert run(tmp_path / "run", cache, "run.steps=2", *words) == 0
    rows = read_metrics(tmp_path / "run")
    assert len(rows) == 2 and all(row["applied"] and np.isfinite(row["train_loss"]) for row in rows)
    if "sft" not in words[0]:
        assert rows[0]["logit_max"] == 0.0, "policy and reference start equal, whatever the precision"


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_sd15_trains(prediction: str, sd15_pipeline: Callable[[str], Path], tmp_path: Path) -> None:
    table = pair_table(tmp_path / "pairs.parquet", [{"label_0": 1.0}, {"label_0": 0.0}, {"label_0": 1.0}])
    words = [f"model.path={sd15_pipeline(prediction)}", f"data.pairs={table}", "data.resolution=16", "run.steps=2"]
    assert run(tmp_path / "run", *words) == 0
    assert StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "export", safety_checker=None)
    assert read_metrics(tmp_path / "run")[0]["logit_max"] == 0.0


def pair_table(file: Path, rows: Sequence[dict[str, float | None]], columns: Sequence[str] = ("label_0",)) -> Path:
    """A table in Pick-a-Pic columns with random pictures."""
    seeded = np.random.default_rng(0)

    def picture() -> bytes:
        stream = io.BytesIO()
        Image.fromarray(seeded.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(stream, "PNG")
        return stream.getvalue()

    values = {
        "caption": ["a cat"] * len(rows),
        "jpg_0": [picture() for _ in rows],
        "jpg_1": [picture() for _ in rows],
    } | {name: pa.array([row.get(name) for row in rows], pa.float64()) for name in columns}
    pq.write_table(pa.table(values), file)
    return file


@pytest.mark.parametrize(
    ("columns", "rows", "said"),
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
    columns: tuple[str, ...], rows: list, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pair_table(tmp_path / "pairs.parquet", rows, columns)
    assert run(tmp_path / "run", f"data.pairs={table}", "data.resolution=32", "run.steps=1") == 0
    assert said in capsys.readouterr().out


@pytest.mark.skipif(not PAIRS.is_dir(), reason=f"no sample pairs at {PAIRS} (set SMPO_PAIRS)")
def test_real_pairs_walk_the_road_with_the_embedded_networks(tmp_path: Path) -> None:
    words = [f"data.pairs={PAIRS / 'real_pairs.parquet'}", "data.resolution=64", "data.flip=true", "run.steps=2"]
    assert run(tmp_path / "run", *words) == 0
    assert len(read_metrics(tmp_path / "run")) == 2
    assert StableDiffusionXLPipeline.from_pretrained(tmp_path / "run" / "export")


def poison(cache_dir: Path, index: int) -> None:
    """Write NaN into the latents of one pair of a prepared cache, behind its back."""
    shard = next(cache_dir.glob("latents-*.safetensors"))
    raw = bytearray(shard.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    first, last = header["mean"]["data_offsets"]
    size = (last - first) // header["mean"]["shape"][0]
    place = start + first + index * size
    raw[place : place + size] = np.full(size // 2, np.nan, np.float16).tobytes()
    shard.write_bytes(raw)


def test_a_step_that_is_not_finite_is_skipped_counted_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pair_table(tmp_path / "pairs.parquet", [{"label_0": 1.0}] * 12)
    words = [f"data.pairs={table}", "data.resolution=32", "run.steps=2"]
    assert run(tmp_path / "run", *words, "run.steps=0") == 0
    poison(tmp_path / "run" / "cache", 5)
    assert run(tmp_path / "run", *words) == 0
    rows = read_metrics(tmp_path / "run")
    bad = [row for row in rows if not row["applied"]]
    assert len(bad) == 1 and bad[0]["nonfinite_pairs"] == [5] and rows[-1]["skipped_steps"] == 1
    assert "rows [5] of the pair table" in capsys.readouterr().err
    assert all(v.isfinite().all() for v in weights(tmp_path / "run").values())
    assert run(tmp_path / "again", *words, f"data.cache={tmp_path / 'run' / 'cache'}", "run.max_nonfinite_steps=0") == 3
    assert "nonfinite_pairs" in capsys.readouterr().err


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
    assert "sdxl, epsilon" in plan and "5.99 no-gradient calls a picture" in plan and "6 pairs = 1 ranks x 6" in plan
    assert run(tmp_path / "run", "--print-config") == 0
    assert "pairs_per_step = 6" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_totals_of_a_log() -> None:
    rows = [{"seconds": 2.0, "pairs_seen": 6, "memory_gb": 1.0}, {"seconds": 1.0, "pairs_seen": 12, "memory_gb": 1.5}]
    assert training_finish.totals(rows) == "2 steps in 3 s (4.0 pairs/s), peak memory 1.50 GB (rank 0)"


def test_learning_rate_by_hand() -> None:
    optim = loop.config.from_dict({"optim": {"lr": 1.0, "warmup_steps": 4, "schedule": "linear"}}).optim
    rates = [training_step.learning_rate(optim, step, 8) for step in range(9)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert (
        training_step.learning_rate(optim.model_copy(update={"warmup_steps": 0, "schedule": "constant"}), 0, 8) == 1.0
    )


def test_ranks_make_equally_many_network_calls() -> None:
    """ZeRO-3 gathers weights in every call: a rank that made fewer would hang the others."""
    for how in ("stratified", "independent"):
        settings = loop.config.from_dict({"inversion": {"timesteps": how}, "batch": {"pairs_per_step": 12}})
        per_rank = []
        for rank in range(3):
            trainer = object.__new__(training_step.Trainer)
            trainer.config, trainer.world = settings, World(rank, 3)
            trainer._step_paths = trainer._drawn_paths
            trainer.schedule = locate.schedule_of(locate.find(settings.model), settings.inversion)
            per_rank.append([trainer.paths(step, range(4))[1] for step in range(5)])
        assert per_rank[0] == per_rank[1] == per_rank[2]
