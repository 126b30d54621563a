"""Who is compared: models of every kind of place, what of the base they keep, and their names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_run import run
from safetensors.torch import save_file

from smpo_fast import embedded
from smpo_fast.common import remote
from smpo_fast.common.errors import ConfigError, ModelError
from smpo_fast.common.runtime import World
from smpo_fast.config import loading
from smpo_fast.evaluation import compare
from smpo_fast.evaluation import contenders as module
from smpo_fast.evaluation.compare import evaluate
from smpo_fast.evaluation.contenders import Contender, contenders
from smpo_fast.models.export import export_pipeline
from smpo_fast.models.load import load_unet
from smpo_fast.models.locate import find

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
SOURCE = find(loading.from_dict({}).model)
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    return dict(load_unet(SOURCE, loading.from_dict({}).model, torch.float32, torch.device("cpu")).state_dict())


@pytest.fixture
def aligned(state: State, tmp_path: Path) -> Path:
    """A pipeline whose UNet differs from the base's."""
    export_pipeline(SOURCE, {name: t + 0.01 for name, t in state.items()}, tmp_path / "pipeline", "float32")
    return tmp_path / "pipeline"


@pytest.fixture
def style(state: State, tmp_path: Path) -> Path:
    """A LoRA that adds 1 to each weight of a layer."""
    width = len(state[f"{LAYER}.weight"])
    factors = {f"unet.{LAYER}.lora_A.weight": torch.ones(1, width), f"unet.{LAYER}.lora_B.weight": torch.ones(width, 1)}
    save_file(factors, tmp_path / "style.safetensors")
    return tmp_path / "style.safetensors"


def given(*words: str, **sections: Any) -> list[Contender]:
    """The contenders that the words add to base and export, which are the same here."""
    settings = loading.from_dict({"eval": {"contenders": list(words)}, **sections})
    return contenders(settings, SOURCE, embedded.pipeline_path())[2:]


def weight(contender: Contender) -> torch.Tensor:
    return contender.load(torch.float32).unet.get_submodule(LAYER).weight


def test_a_pipeline_and_a_unet_alone(aligned: Path, state: State) -> None:
    pipeline, unet = given(str(aligned), f"mine={aligned / 'unet'}")
    assert (pipeline.name, unet.name) == ("pipeline", "mine")
    for contender in (pipeline, unet):
        assert torch.equal(weight(contender), state[f"{LAYER}.weight"] + 0.01)
    assert pipeline.identity == unet.identity, "the same images, drawn once"


def test_a_lora_with_a_scale(style: Path, state: State) -> None:
    (found,) = given(f"half={style}:0.5")
    torch.testing.assert_close(weight(found), state[f"{LAYER}.weight"] + 0.5)
    assert found.identity != given(f"half={style}")[0].identity


def test_the_base_of_the_run_keeps_its_own_loras(style: Path, aligned: Path) -> None:
    """A UNet of another place is taken as it is."""
    (unet,) = given(f"mine={aligned / 'unet'}", model={"lora": [str(style)]})
    (lora,) = given(f"twice={style}", model={"lora": [str(style)]})
    torch.testing.assert_close(weight(lora) - weight(unet), torch.full_like(weight(lora), 1.99))


def test_runs_with_and_without_adapters(state: State, tmp_path: Path) -> None:
    assert run(tmp_path / "full", "run.steps=1", "optim.lr=0.1") == 0
    assert run(tmp_path / "small", "run.steps=1", "optim.lr=0.1", "lora.rank=2") == 0
    full, small = given(str(tmp_path / "full"), str(tmp_path / "small"))
    assert (full.name, small.name) == ("full", "small")
    assert not torch.equal(weight(full), state[f"{LAYER}.weight"])
    assert small.load(torch.float32).unet.peft_config, "loaded as diffusers users load it"


def test_published_names_are_hub_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(name: str, **_: Any) -> Path:
        asked.append(name)
        return embedded.pipeline_path() if name.startswith("SPO") else embedded.pipeline_path() / "unet"

    monkeypatch.setattr(remote, "fetch_repository", fetch)
    whole, alone = given("SPO-SDXL", "SmPO-SDXL")
    assert (whole.name, alone.name) == ("SPO-SDXL", "SmPO-SDXL")
    assert set(asked) == {module.PUBLISHED["SPO-SDXL"], module.PUBLISHED["SmPO-SDXL"]}


def test_mistakes(aligned: Path) -> None:
    with pytest.raises(ConfigError, match="two are called 'pipeline'"):
        given(str(aligned), str(aligned))
    with pytest.raises(ConfigError, match="two are called 'base'"):
        given(f"base={aligned}")
    for words in (["./nowhere"], ["x=./nowhere"]):
        with pytest.raises(ModelError, match=r"\./nowhere"):
            given(*words)
        with pytest.raises(ModelError, match=r"\./nowhere"):  # before a run trains
            compare.check(loading.from_dict({"eval": {"prompts": "embedded", "contenders": words}}))
    with pytest.raises(ConfigError, match="'aligned' is a name of its own"):
        compare.check(loading.from_dict({"eval": {"prompts": "embedded", "contenders": [f"aligned={aligned}"]}}))


def test_the_miniatures_are_known_by_name() -> None:
    (found,) = given("embedded-v")
    assert found.name == "embedded-v" and found.identity["scheduler"]["prediction_type"] == "v_prediction"


def test_all_are_compared_with_the_base(aligned: Path, tmp_path: Path) -> None:
    small = {"prompts": "embedded", "scorer": "embedded", "count": 3, "steps": 2, "contenders": [f"other={aligned}"]}
    settings = loading.from_dict({"eval": small})
    done = evaluate(settings, SOURCE, embedded.pipeline_path(), tmp_path / "out", World())
    found = {(c.model, c.name): c for c in done.comparisons}
    assert found["aligned", "reward"].gain == 0.0 != found["other", "reward"].gain
    assert found["other", "reward"].p_corrected >= found["other", "reward"].p_value
    facts = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert set(facts["images"]) == {"base", "aligned", "other"}
    assert (
        "protocol 'ours': 3 prompts (embedded), 1 image(s) each, the pipeline's sampler, 2 steps" in facts["protocol"]
    )
