"""The model card: what it says of bases, licenses and settings, and what it does not give away."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.pipelines import settings
from huggingface_hub import ModelCard

from smpo_fast import embedded
from smpo_fast.config import loading
from smpo_fast.models import base_facts as facts_module
from smpo_fast.models.base_facts import base_facts
from smpo_fast.models.locate import find
from smpo_fast.publishing import model_card
from smpo_fast.publishing.facts import RunFacts

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
VERSIONS = {"torch": "2.13.0", "smpo-fast": "0.1.0"}


def facts(tmp_path: Path, base: dict[str, Any], **sections: Any) -> RunFacts:
    """Of a run with one weight file; base: what environment.json says of it."""
    weights = tmp_path / "owl" / "export" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.touch()
    environment = {"base": base, "versions": VERSIONS, "ranks": 8, "device": "NVIDIA H100"}
    return RunFacts(tmp_path / "owl", loading.from_dict(sections), environment, {}, [{"seconds": 1800.0}] * 2)


def base(**values: Any) -> dict[str, Any]:
    plain = {"kind": "sdxl", "prediction": "epsilon", "zero_terminal_snr": False, "names": [SDXL], "license": {}}
    return plain | values


def test_the_header_names_base_license_and_data(tmp_path: Path) -> None:
    licensed = base(names=["someone/aligned", SDXL], license={"license": "openrail++"})
    of = facts(tmp_path, licensed, data={"pairs": "yuvalkirstain/pickapic_v2"})
    header = ModelCard(model_card.compose(of, "me/owl")).data
    assert header.base_model == ["someone/aligned", SDXL] and header.base_model_relation == "finetune"
    assert header.license == "openrail++" and header.datasets == ["yuvalkirstain/pickapic_v2"]
    assert header.pipeline_tag == "text-to-image" and header.library_name == "diffusers"
    assert {"sdxl", "smpo"} <= set(header.tags)


def test_adapters_are_loaded_into_their_base(tmp_path: Path) -> None:
    text = model_card.compose(facts(tmp_path, base(), lora={"rank": 16}), "me/owl")
    assert ModelCard(text).data.base_model_relation == "adapter"
    assert f'.from_pretrained("{SDXL}"' in text and 'pipe.load_lora_weights("me/owl")' in text


def test_a_local_base_is_no_base_model_of_the_hub(tmp_path: Path) -> None:
    text = model_card.compose(facts(tmp_path, base(names=["noob.safetensors"], prediction="v_prediction")), "me/owl")
    assert ModelCard(text).data.base_model is None and "`noob.safetensors`" in text
    assert "The network predicts v" in text
    assert "whose name is not recorded" in text


def test_paths_of_the_machine_are_not_published(tmp_path: Path) -> None:
    of = facts(
        tmp_path, base(), data={"pairs": "/mnt/secret/pairs.parquet", "cache": "s3://bucket/team/cache"},
        model={"lora": ["/home/me/style.safetensors"]}, run={"dir": "/home/me/runs/owl"},
    )  # fmt: skip
    text = model_card.compose(of, "me/owl")
    assert "pairs.parquet" in text and "style.safetensors" in text
    assert not any(secret in text for secret in ("secret", "bucket", "/home"))
    assert "2 steps" in text and "8 x NVIDIA H100, 1 hours" in text


# --- the base -------------------------------------------------------------------------------------------------


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    return Path(shutil.copytree(embedded.pipeline_path(), tmp_path / "base"))


def test_the_license_of_a_folder_is_that_of_its_card(pipeline: Path) -> None:
    (pipeline / "README.md").write_text("---\nlicense: other\nlicense_name: owls-only\nlicense_link: LICENSE\n---\nHi")
    model = settings(pipeline)
    found = base_facts(model, find(model))
    assert found["license"] == {"license": "other", "license_name": "owls-only", "license_link": "LICENSE"}
    assert found["names"] == ["base"]


@pytest.mark.parametrize("card", ["no header", "---\nlicense: [\n---\n", "---\ntags:\n- x\n---\n", None])
def test_a_base_without_a_license(pipeline: Path, card: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    if card is not None:
        (pipeline / "README.md").write_text(card)
    model = settings(pipeline)
    assert base_facts(model, find(model))["license"] == {}
    assert ("cannot be read" in capsys.readouterr().err) == (card is not None and "[" in card)


def test_the_license_of_a_known_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    model = settings(SDXL)
    found = base_facts(model, find(settings("embedded")))
    assert found["license"] == {"license": "openrail++"} and found["names"] == [SDXL]
    assert facts_module.shared_name("/mnt/models/owl") == "owl"
