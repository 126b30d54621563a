"""smpo push: what is uploaded to a hub, the model card, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.small_run import run
from huggingface_hub import ModelCard, constants
from publishing.hub import Hub

from smpo_fast import cli

EVALUATED = ["eval.prompts=embedded", "eval.count=2", "eval.steps=2", "eval.scorer=embedded", "run.steps=1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of all weights, evaluated, with a single file."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    assert run(folder, *EVALUATED, 'export.formats=["diffusers", "single-file"]') == 0
    return folder


@pytest.fixture
def a_run(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "first", ignore=shutil.ignore_patterns("cache", "checkpoints")))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub("hf_secret") as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", hub.token)
        yield hub


def files_of(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_a_run_is_uploaded_with_its_card(a_run: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["push", str(a_run), "me/owl", "--private", "--message", "first"]) == 0
    uploaded = hub.repositories["me/owl"]
    pipeline = files_of(a_run / "export")
    pipeline.pop("export.json")
    assert {name: uploaded[name] for name in pipeline} == pipeline
    assert uploaded["first.safetensors"] == (a_run / "single-file" / "first.safetensors").read_bytes()
    assert uploaded["images/grid.png"] == (a_run / "evaluation" / "grid.png").read_bytes()
    others = {"README.md", "first.safetensors", "images/grid.png", "images/curves.png"}
    assert set(uploaded) == {*pipeline, *others}, "no logs, settings or checkpoints"
    assert hub.private == {"me/owl"} and hub.messages == ["first"]
    assert f"{hub.address}/me/owl" in capsys.readouterr().out
    assert '.from_pretrained("me/owl"' in uploaded["README.md"].decode()


def test_a_dry_run_uploads_nothing(a_run: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["push", str(a_run), "me/owl", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    unet = a_run / "export" / "unet" / "diffusion_pytorch_model.safetensors"
    assert f"{unet.stat().st_size / 1e6:.3f} MB  unet/{unet.name}" in shown
    assert "nothing was uploaded" in shown and not hub.repositories


def test_an_edited_card_is_kept(a_run: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    card = a_run / "README.md"
    assert "first/export" in card.read_text(), "the card at the end of the run"
    assert cli.main(["push", str(a_run), "me/owl", "--license", "mit"]) == 0
    assert ModelCard(card.read_text()).data.license == "mit"
    card.write_text(card.read_text().replace("# first", "# The owl"))
    assert cli.main(["push", str(a_run), "you/owl"]) == 0
    assert hub.repositories["you/owl"]["README.md"] == card.read_bytes() and "# The owl" in card.read_text()
    assert "was edited, and is kept" in capsys.readouterr().out


def test_what_cannot_be_uploaded(a_run: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*words: str) -> str:
        assert cli.main(["push", *words]) == 2
        assert hub.repositories.get("me/owl", {}) == {}
        return capsys.readouterr().err

    assert "'owl' is no hub id: give owner/name" in error(str(a_run), "owl")
    assert "no run wrote it" in error(str(a_run / "export"), "me/owl")
    hub.refuses_large = True
    assert "no storage left" in error(str(a_run), "me/owl")
    hub.token = "another"
    assert "hf auth login" in error(str(a_run), "me/owl")
    hub.server_close()
    assert "could not be written to the hub" in error(str(a_run), "me/owl")
    weights = a_run / "export" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert f"damaged:\n  {weights}" in error(str(a_run), "me/owl")
    (a_run / "finished.json").unlink()
    assert "it has not finished: start it again" in error(str(a_run), "me/owl")


def test_the_card_of_adapters(tmp_path: Path, hub: Hub) -> None:
    folder = tmp_path / "style"
    assert run(folder, "run.steps=1", "lora.rank=2") == 0
    assert cli.main(["push", str(folder), "me/style"]) == 0
    uploaded = hub.repositories["me/style"]
    assert set(uploaded) == {"README.md", "images/curves.png", "pytorch_lora_weights.safetensors"}
    text = uploaded["README.md"].decode()
    assert 'pipe.load_lora_weights("me/style")' in text and "LoRA of rank 2" in text
    assert "lora" in ModelCard(text).data.tags and "## Evaluation" not in text
