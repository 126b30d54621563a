"""Base against aligned: the arithmetic, and the whole evaluation on the embedded model."""

from __future__ import annotations

import csv
import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.answers import json_answer
from PIL import Image

from smpo_fast import cli
from smpo_fast.common import plots, storage
from smpo_fast.common.errors import ConfigError
from smpo_fast.common.runtime import World
from smpo_fast.config import loading
from smpo_fast.embedded import pipeline_path, shapes
from smpo_fast.evaluation import sampling
from smpo_fast.evaluation.compare import evaluate
from smpo_fast.evaluation.contenders import aligned_pipeline
from smpo_fast.evaluation.image_store import ImageStore
from smpo_fast.evaluation.report import Evaluation, write_report
from smpo_fast.evaluation.sampling import Shot, read_prompts, sample, shots
from smpo_fast.models import lora, lora_files
from smpo_fast.models.export import export_pipeline
from smpo_fast.models.load import load_pipeline, load_unet
from smpo_fast.models.locate import find

SMALL = {"eval": {"prompts": "embedded", "scorer": "embedded", "count": 6, "steps": 3, "guidance": 1.5, "batch": 4}}


def test_embedded_prompts_are_held_out() -> None:
    settings = loading.from_dict({"eval": {"prompts": "embedded", "count": 64}})
    assert len(set(read_prompts(settings))) == 64
    train = set(shapes.prompts("train", 500, 0))
    assert not train & set(read_prompts(settings))


def test_prompts_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat\n\n  a dog \nthree\n")
    settings = loading.from_dict({"eval": {"prompts": str(tmp_path / "p.txt"), "count": 2}})
    assert read_prompts(settings) == ["a cat", "a dog"]
    (tmp_path / "p.txt").write_text("\n\n")
    with pytest.raises(ConfigError, match="the file has no prompt"):
        read_prompts(settings)


def test_an_image_depends_on_its_prompt_and_noise_not_on_the_batch() -> None:
    source = find(loading.from_dict({}).model)
    images = []
    for batch in (4, 2):
        settings = loading.from_dict({"eval": {**SMALL["eval"], "batch": batch}})
        pipe = load_pipeline(source, torch.float32)
        wanted = shots(settings)
        parts = [sample(pipe, wanted[i : i + batch], settings.eval) for i in range(0, len(wanted), batch)]
        images.append([image for part in parts for image in part])
    for a, b in zip(*images, strict=True):
        assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1


def test_guidance_of_the_settings_is_used() -> None:
    """Without guidance, with the sampler's default, and with more of it: three different images."""
    pipe, images = load_pipeline(find(loading.from_dict({}).model), torch.float32), []
    for guidance in (1.0, 5.0, 9.0):
        settings = loading.from_dict({"eval": {**SMALL["eval"], "count": 1, "guidance": guidance}})
        images.append(np.asarray(sample(pipe, shots(settings), settings.eval)[0]).astype(int))
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert np.abs(images[a] - images[b]).max() > 1


def test_the_export_is_loaded_whatever_the_run_took_from_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """model.unet, model.vae and model.variant are those of the base."""
    source = find(loading.from_dict({}).model)
    trained = load_pipeline(source, torch.float32).unet.state_dict()
    export_pipeline(source, {name: t + 0.01 for name, t in trained.items()}, tmp_path / "export", "float32")
    elsewhere = {"unet": str(source.unet_folder), "vae": str(source.vae_folder), "variant": "fp16"}
    pipe = aligned_pipeline(loading.from_dict({"model": elsewhere}).model, tmp_path / "export", source, torch.float32)
    assert all(torch.equal(t, trained[name] + 0.01) for name, t in pipe.unet.state_dict().items())
    assert "warning" not in capsys.readouterr().err


def test_what_is_compared_is_the_base_and_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = loading.from_dict({"eval": {**SMALL["eval"], "count": 2}})
    source, seen = find(settings.model), []
    state = load_pipeline(source, torch.float32).unet.state_dict()
    export_pipeline(source, {name: t + 0.01 for name, t in state.items()}, tmp_path / "export", "float32")

    def sampled(pipe: Any, wanted: list[Shot], *_: Any) -> list[Image.Image]:
        seen.append(pipe.unet.state_dict())
        return pipe_images[len(seen) - 1]

    drawn = shapes.render([shapes.parse(p) for p in read_prompts(settings)], np.random.default_rng(0))
    pipe_images = [[Image.new("RGB", (32, 32), "gray")] * 2, [Image.fromarray(image) for image in drawn]]
    monkeypatch.setattr(sampling, "sample", sampled)
    evaluate(settings, source, tmp_path / "export", tmp_path / "out", World())
    assert all(torch.equal(t, state[name]) for name, t in seen[0].items())
    assert all(torch.equal(t, state[name] + 0.01) for name, t in seen[1].items())
    with (tmp_path / "out" / "scores.csv").open() as stream:
        assert all(float(row["reward_base"]) < float(row["reward_aligned"]) for row in csv.DictReader(stream))


def test_base_against_itself_is_a_draw(tmp_path: Path) -> None:
    settings = loading.from_dict({**SMALL, "run": {"dir": str(tmp_path)}})
    source = find(settings.model)
    text = evaluate(settings, source, pipeline_path(), tmp_path / "evaluation", World()).text(settings)
    facts = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    reward = facts["comparisons"][0]
    assert reward["name"] == "reward" and (reward["gain"], reward["win_rate"], reward["prompts"]) == (0.0, 0.5, 6)
    assert {c["name"] for c in facts["comparisons"]} == {"reward", "foreground", "background", "shape"}
    assert "95 %" in text and "n = 6" in text
    with (tmp_path / "evaluation" / "scores.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 6 and rows[0]["reward_base"] == rows[0]["reward_aligned"] != ""
    assert Image.open(tmp_path / "evaluation" / "grid.png").size[0] > 1000


@pytest.mark.parametrize("name", ["lora-kohya", "lora-diffusers"])
def test_an_extracted_lora_stands_beside_the_full_model(name: str, tmp_path: Path) -> None:
    """One that changes nothing: its images and scores are the base's, in the report, the table and the grid."""
    values = {**SMALL, "run": {"dir": str(tmp_path)}, "export": {"formats": ["diffusers", name]}}
    values["eval"] = {**SMALL["eval"], "count": 2, "steps": 2}
    settings = loading.from_dict(values)
    source = find(settings.model)
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    unet = load_unet(source, settings.model, torch.float32, torch.device("cpu"))
    width = len(unet.get_submodule(layer).weight)
    factors = {f"{layer}.lora_A.weight": torch.ones(1, width), f"{layer}.lora_B.weight": torch.zeros(width, 1)}
    adapters = lora.scale_1_adapters(factors, {layer: 1})
    if name == "lora-kohya":
        lora_files.write_kohya(adapters, source, tmp_path / name, {}, title="x", resolution=32)
    else:
        lora_files.write_diffusers(adapters, source, tmp_path / name)
    found = evaluate(settings, source, pipeline_path(), tmp_path / "evaluation", World())
    assert {("aligned", "reward"), ("lora", "reward")} <= {(c.model, c.name) for c in found.comparisons}
    facts = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert {c["gain"] for c in facts["comparisons"]} == {0.0}
    with (tmp_path / "evaluation" / "scores.csv").open() as stream:
        assert all(row["reward_lora"] == row["reward_base"] != "" for row in csv.DictReader(stream))
    assert Image.open(tmp_path / "evaluation" / "grid.png").size[0] > 1500


def test_without_a_scorer_there_are_images_only(tmp_path: Path) -> None:
    settings = loading.from_dict({"eval": {**SMALL["eval"], "scorer": "", "count": 2}})
    found = evaluate(settings, find(settings.model), pipeline_path(), tmp_path, World())
    assert not found.comparisons and (tmp_path / "grid.png").is_file()


def test_a_report_that_cannot_be_replaced_stays_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = loading.from_dict({"eval": {**SMALL["eval"], "count": 2}})
    prompts, store = ["a", "b"], ImageStore(tmp_path / "images")
    store.add("00", Image.new("RGB", (32, 32), "red"))
    out = tmp_path / "out"
    out.mkdir()

    def write(value: float) -> None:
        scores = {"reward": {"base": np.array([value, 1.0]), "aligned": np.array([0.5, 1.0])}}
        write_report(out, settings, prompts, store, Evaluation([], [], scores, {}, {"base": ["00", "00"]}))

    write(0.25)
    names = {"scores.csv", "evaluation.json", "grid.png"}
    for number, name in enumerate(sorted(names)):
        content = (out / name).read_bytes()

        def full(path: Path, name: str = name) -> None:
            if path.name.startswith(name):
                raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(storage, "sync", full)
            write(0.5 + number)
        assert (out / name).read_bytes() == content
    assert {file.name for file in out.iterdir()} == names


def test_grid_shows_both_and_survives_long_prompts(tmp_path: Path) -> None:
    base, aligned = ([Image.new("RGB", (32, 32), colour)] * 4 for colour in ("red", "blue"))
    words = ["a very long prompt about many things " * 5] * 4
    plots.draw_grid({"base": base, "aligned": aligned}, words, None, tmp_path / "grid.png", rows=12)
    pixels = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB"))
    for colour in ((255, 0, 0), (0, 0, 255)):
        assert ((pixels == colour).all(axis=-1)).sum() > 4 * 180 * 180


def test_curves_of_rows_with_gaps(tmp_path: Path) -> None:
    rows = [{"step": 1, "train_loss": 0.7}, {"step": 2, "train_loss": 0.6, "implicit_acc": 0.5}]
    plots.draw_curves(rows, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size[0] > 500


def test_command_line_evaluates_a_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"run.dir={tmp_path}", "eval.count=2", "eval.steps=2"]
    assert cli.main(["evaluate", *words]) == 2
    assert "has no export/ yet" in capsys.readouterr().err
    (tmp_path / "export").symlink_to(pipeline_path())
    facts, text = json_answer(capsys, "evaluate", *words)
    reward = facts["comparisons"][0]
    assert f"reward       base {reward['base']:.3f}  aligned {reward['aligned']:.3f}" in text
    assert "win-rate 50.0%" in text and reward["win_rate"] == 0.5
    assert cli.main(["evaluate", *words, "eval.prompts="]) == 2


def test_command_line_prepares_and_verifies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "cache"
    assert cli.main(["prepare", f"data.cache={cache}", "data.max_pairs=4"]) == 0
    assert cli.main(["verify", str(cache)]) == 0
    assert "4 pairs, each where the index says, every number finite" in capsys.readouterr().out
    shard = next(cache.glob("latents-*.safetensors"))
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(raw)
    assert cli.main(["verify", str(cache)]) == 1
    assert shard.name in capsys.readouterr().out
    assert cli.main(["verify", str(tmp_path / "none")]) == 2


def test_settings_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["settings"]) == 0
    assert "`pairs_per_step`" in capsys.readouterr().out
