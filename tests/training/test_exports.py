"""``smpo export``: the end of a run once more, from any of its checkpoints, in any format."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers.small_run import run, weights
from safetensors import safe_open
from safetensors.torch import load_file

from smpo_fast import cli, embedded
from smpo_fast.models.pipeline_folder import LORA_FILE

ALL = ["diffusers", "single-file", "lora-kohya", "lora-peft", "lora-diffusers"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def export(folder: Path, formats: list[str], *words: str) -> int:
    return cli.main(["export", str(folder), "--to", ",".join(formats), *words])


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, cache: str) -> Path:
    """Four steps with adapters, their average exported at the end in every format."""
    run_dir = tmp_path_factory.mktemp("adapted") / "run"
    formats = f"export.formats={ALL}".replace("'", '"')
    assert run(run_dir, cache, "lora.rank=2", "lora.merge=true", "optim.lr=1e-2", "optim.ema=0.5", formats) == 0
    return run_dir


def test_a_finished_run_is_exported_to_the_same_bytes(
    adapted: Path, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(adapted, ALL, "--out", str(tmp_path / "adapted")) == 0
    said = capsys.readouterr().out
    for name in (*ALL[1:], "export", "merged"):
        assert contents(tmp_path / "adapted" / name) == contents(adapted / name), name
        assert f"{tmp_path / 'adapted' / name}/  " in said
    assert export(plain, ["diffusers"], "--out", str(tmp_path / "plain")) == 0
    assert contents(tmp_path / "plain" / "export") == contents(plain / "export")
    assert {p.name for p in (tmp_path / "plain").iterdir()} == {"export"}, "only what was asked for"


def test_an_earlier_checkpoint_has_the_weights_of_its_step(plain: Path, cache: str, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "run")
    assert run(tmp_path / "short", cache, "run.steps=2") == 0
    assert export(tmp_path / "run", ["diffusers", "single-file"], "--checkpoint", "2") == 0
    found, expected = tmp_path / "run" / "exports-000002", tmp_path / "short" / "export"
    assert contents(found / "export") == contents(expected)
    with safe_open(found / "single-file" / "run-step2.safetensors", "pt") as file:
        said = file.metadata()
    assert said["smpo.step"] == "2" and said["modelspec.title"] == "run-step2"
    assert all(len(said[f"smpo.trained_{word}"]) == 64 for word in ("from", "on", "as"))
    assert cli.main(["verify", str(tmp_path / "run")]) == 0
    damaged = found / "export" / "unet" / "diffusion_pytorch_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x01")
    assert cli.main(["verify", str(tmp_path / "run")]) == 1 and cli.main(["verify", str(found)]) == 1


def test_a_lora_of_a_full_fine_tune(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its rank and dtype are those of the command line, its errors are printed."""
    words = ["--rank", "3", "--dtype", "bfloat16", "--out", str(tmp_path)]
    assert export(plain, ["lora-kohya", "lora-diffusers"], *words) == 0
    assert "rank 3\n  relative error of the weights' change" in capsys.readouterr().out
    found = load_file(tmp_path / "lora-diffusers" / LORA_FILE)
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    assert {len(value) for name, value in found.items() if "lora_A" in name} == {3}
    kohya = load_file(tmp_path / "lora-kohya" / "run-lora.safetensors")
    assert len(kohya) == 3 * len(found) // 2


def test_without_checkpoints_the_finished_export_is_converted(adapted: Path, plain: Path, tmp_path: Path) -> None:
    for name, folder in (("adapted", adapted), ("plain", plain)):
        here = tmp_path / name
        shutil.copytree(folder, here / "run")
        shutil.rmtree(here / "run" / "checkpoints")
        assert export(here / "run", ["diffusers", "single-file"], "--out", str(here / "out")) == 0
        assert contents(here / "out" / "export") == contents(folder / "export")
    one, other = (
        load_file(folder / "single-file" / "run.safetensors") for folder in (tmp_path / "adapted/out", adapted)
    )
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "gguf"], "--to"),
        (["--to", ""], "--to"),
        (["--to", "diffusers", "--checkpoint", "3"], "no checkpoint step-000003; it has step-000002, step-000004"),
        (["--to", "diffusers", "--energy", "2"], "--energy"),
    ],
)
def test_mistakes_are_named(words: list[str], message: str, plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", str(plain), *words]) == 2
    assert message in capsys.readouterr().err


def test_what_is_no_run_or_has_changed_is_refused(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(tmp_path, ["diffusers"]) == 2
    assert f"{tmp_path}/config.toml" in capsys.readouterr().err
    shutil.copytree(plain, tmp_path / "run")
    assert cli.main(["export", str(plain), "--to", "diffusers", "--out", str(tmp_path / "other")]) == 0
    settings = tmp_path / "run" / "config.toml"
    settings.write_text(settings.read_text().replace('path = "embedded"', f'path = "{tmp_path}/other/export"', 1))
    assert export(tmp_path / "run", ["lora-kohya"]) == 2
    assert "its weights are not those that the run started from" in capsys.readouterr().err
    (file, *_) = (tmp_path / "run" / "checkpoints" / "step-000004" / "engine").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    assert export(tmp_path / "run", ["diffusers"]) == 2
    assert "damaged" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.rmtree(tmp_path / "run" / "export")
    assert export(tmp_path / "run", ["diffusers"]) == 2
    assert "has neither checkpoints nor an export" in capsys.readouterr().err


# --- the average of the weights -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory, cache: str) -> Path:
    """Four steps whose weights were averaged; the average and the weights themselves are exported."""
    run_dir = tmp_path_factory.mktemp("averaged") / "run"
    formats = 'export.formats=["diffusers", "single-file"]'
    assert run(run_dir, cache, "optim.ema=0.9", "optim.lr=1e-3", "export.weights=both", formats) == 0
    return run_dir


def test_both_kinds_of_weights_are_exported_by_a_run_and_later(
    averaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The average is what ``export`` has, and what is written later is the same, byte for byte."""
    average, raw = weights(averaged), weights(averaged / "raw")
    assert average.keys() == raw.keys() and not any(torch.equal(average[name], raw[name]) for name in average)
    assert export(averaged, ["diffusers", "single-file"], "--out", str(tmp_path / "out")) == 0
    said = capsys.readouterr().out
    for place in ("export", "raw/export", "single-file", "raw/single-file"):
        assert contents(tmp_path / "out" / place) == contents(averaged / place) != {}
        assert f"{tmp_path / 'out' / place}/  " in said
    for place, kind, title in (("", "ema", "run"), ("raw", "raw", "run-raw")):
        with safe_open(averaged / place / "single-file" / f"{title}.safetensors", "pt") as file:
            assert file.metadata()["smpo.weights"] == kind and file.metadata()["modelspec.title"] == title
    assert cli.main(["verify", str(averaged)]) == 0


def test_the_exported_average_is_that_of_the_steps(averaged: Path, cache: str, tmp_path: Path) -> None:
    """From the weights after each step; the run is not changed by being averaged."""
    assert run(tmp_path / "run", cache, "optim.lr=1e-3", "run.save_every=1", "run.keep=9") == 0
    after = []
    for step in range(1, 5):
        out = tmp_path / f"after-{step}"
        assert export(tmp_path / "run", ["diffusers"], "--checkpoint", str(step), "--out", str(out)) == 0
        after.append(weights(out))
    base = load_file(next((embedded.pipeline_path() / "unet").glob("*.safetensors")))
    raw = weights(averaged / "raw")
    for name, value in weights(averaged).items():
        wanted = base[name].double()
        for n, step in enumerate(after, 1):
            decay = min(0.9, n / (9 + n))
            wanted = decay * wanted + (1 - decay) * step[name].double()
        assert torch.allclose(value.double(), wanted, rtol=1e-5, atol=1e-7), name
        assert torch.equal(raw[name], after[-1][name])


def test_the_other_weights_never_replace_an_export(averaged: Path, plain: Path, tmp_path: Path) -> None:
    shutil.copytree(averaged, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "raw")
    before = contents(tmp_path / "run" / "export")
    assert export(tmp_path / "run", ["diffusers"], "--weights", "raw", "--dtype", "float16") == 0
    assert contents(tmp_path / "run" / "export") == before
    assert {value.dtype for value in weights(tmp_path / "run" / "raw").values()} == {torch.float16}
    assert export(tmp_path / "run", ["diffusers"], "--checkpoint", "2", "--weights", "both") == 0
    assert {f.name for f in (tmp_path / "run" / "exports-000002").iterdir()} == {"export", "raw"}
    assert cli.main(["verify", str(tmp_path / "run")]) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert export(tmp_path / "run", ["single-file"], "--weights", "both", "--out", str(tmp_path / "out")) == 0


def test_adapters_are_averaged(adapted: Path, tmp_path: Path) -> None:
    assert export(adapted, ["diffusers"], "--weights", "raw", "--out", str(tmp_path)) == 0
    average, raw = (load_file(folder / "export" / LORA_FILE) for folder in (adapted, tmp_path / "raw"))
    assert average.keys() == raw.keys() and not any(torch.equal(average[name], raw[name]) for name in average)


def test_an_average_that_a_run_does_not_have_is_refused(
    averaged: Path, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(plain, ["diffusers"], "--weights", "ema", "--out", str(tmp_path)) == 2
    assert "export.weights = 'ema' needs optim.ema" in capsys.readouterr().err
    shutil.copytree(plain, tmp_path / "run")
    shutil.copyfile(averaged / "config.toml", tmp_path / "run" / "config.toml")
    assert export(tmp_path / "run", ["diffusers"], "--out", str(tmp_path)) == 2
    assert "has no average of the weights: it was written without optim.ema" in capsys.readouterr().err
