"""LoRA files for other programs: each reader gets the weights that the run's own adapters make."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from helpers.pipelines import CPU, Maker
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from smpo_fast.common.errors import EnvironmentProblem, ModelError
from smpo_fast.config import loading
from smpo_fast.models import lora, lora_files, pipeline_folder
from smpo_fast.models.load import load_unet
from smpo_fast.models.locate import ModelSource, find
from smpo_fast.models.lora import Adapters
from smpo_fast.models.single_file.modelspec import modelspec, write_described
from smpo_fast.models.verify import verify_export

EVERYWHERE = ["attention", "ff", "conv1", "conv2", "conv_in", "conv_out", "conv_shortcut", "proj_in", "proj_out",
              "time_emb_proj", "time_embedding.linear_1", "time_embedding.linear_2", "downsamplers.0.conv",
              "upsamplers.0.conv"]  # fmt: skip
ADDED = ["add_embedding.linear_1", "add_embedding.linear_2"]
Weights = dict[str, torch.Tensor]


def trained(path: Path | str, **words: Any) -> tuple[ModelSource, Any, Adapters]:
    """Some adapters on a pipeline's UNet, random as if they had been trained."""
    settings = loading.from_dict({"lora": words, "model": {"path": str(path), "export_dtype": "float32"}})
    source = find(settings.model)
    unet = load_unet(source, settings.model, torch.float32, CPU)
    lora.add_adapters(unet, settings.lora, seed=0)
    seeded = torch.Generator().manual_seed(0)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=seeded)
    return source, settings.model, lora.trained_adapters(settings, source, unet.state_dict())


def write(name: str, adapters: Adapters, source: ModelSource, folder: Path) -> None:
    if name == "lora-kohya":
        said = modelspec(source, "mine", 512, lora=True)
        lora_files.write_kohya(adapters, source, folder, said, title="mine", resolution=512)
    elif name == "lora-peft":
        lora_files.write_peft(adapters, folder)
    else:
        lora_files.write_diffusers(adapters, source, folder)


def weight_file(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


def as_diffusers_fuses(folder: Path, source: ModelSource) -> Weights:
    cls = StableDiffusionXLPipeline if source.kind == "sdxl" else StableDiffusionPipeline
    pipe = cls.from_pretrained(source.folder, dtype=torch.float32, safety_checker=None)
    pipe.load_lora_weights(folder, weight_name=weight_file(folder).name)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    return dict(pipe.unet.state_dict())


def as_peft_merges(folder: Path, source: ModelSource) -> Weights:
    unet: Any = load_unet(source, loading.from_dict({}).model, torch.float32, CPU)
    return dict(PeftModel.from_pretrained(unet, folder).merge_and_unload().state_dict())


def as_the_base_of_a_run(folder: Path, source: ModelSource) -> Weights:
    settings = loading.from_dict({"model": {"path": str(source.folder), "lora": [str(weight_file(folder))]}})
    return dict(load_unet(find(settings.model), settings.model, torch.float32, CPU).state_dict())


READERS: dict[str, list[Callable[[Path, ModelSource], Weights]]] = {
    "lora-kohya": [as_diffusers_fuses, as_the_base_of_a_run],
    "lora-peft": [as_peft_merges, as_the_base_of_a_run],
    "lora-diffusers": [as_diffusers_fuses, as_the_base_of_a_run],
}


def check_readers(name: str, trained_: tuple[ModelSource, Any, Adapters], folder: Path) -> None:
    source, model, adapters = trained_
    write(name, adapters, source, folder / name)
    expected = lora.merged_state(source, model, adapters)
    for reader in READERS[name]:
        if adapters.settings["use_dora"] and reader is as_the_base_of_a_run:
            continue  # model.lora takes no DoRA
        found = reader(folder / name, source)
        for layer, value in expected.items():
            torch.testing.assert_close(found[layer], value, rtol=1e-5, atol=1e-6, msg=f"{reader.__name__}: {layer}")
    assert {finding.grade for finding in verify_export(folder / name)} == {"ok"}


@pytest.mark.parametrize("name", ["lora-kohya", pytest.param("lora-peft", marks=pytest.mark.slow),
                                  pytest.param("lora-diffusers", marks=pytest.mark.slow)])  # fmt: skip
def test_every_reader_gets_the_weights_that_the_run_merges(name: str, tmp_path: Path) -> None:
    """Every kind of layer of an SDXL UNet."""
    check_readers(name, trained("embedded", rank=4, alpha=9.0, targets=[*EVERYWHERE, *ADDED]), tmp_path)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    "words",
    [{"rank": 2, "alpha": 3.0, "targets": EVERYWHERE}, {"rank": 3, "use_rslora": True, "alpha": 5.0}],
    ids=["every layer", "rslora"],
)
def test_every_reader_gets_the_weights_of_sd15(
    name: str, words: dict[str, Any], sd15_pipeline: Maker, tmp_path: Path
) -> None:
    check_readers(name, trained(sd15_pipeline("epsilon"), **words), tmp_path)


def test_a_dora_is_written_where_readers_agree_on_it(sd15_pipeline: Maker, tmp_path: Path) -> None:
    found = trained(sd15_pipeline("epsilon"), rank=2, use_dora=True)
    for name in ("lora-peft", "lora-diffusers"):
        check_readers(name, found, tmp_path)
    with pytest.raises(ModelError, match="do not agree on what a DoRA is"):
        write("lora-kohya", found[2], found[0], tmp_path / "lora-kohya")
    assert not (tmp_path / "lora-kohya").exists()


@pytest.mark.parametrize(
    ("kind", "count", "name"),
    [("sdxl", 722, "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k"),
     ("sd15", 192, "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k")],
)  # fmt: skip
def test_a_public_unet_has_as_many_layers_as_kohyas_scripts_adapt(kind: str, count: int, name: str) -> None:
    """The linear layers and convolutions of one pixel inside transformers: the scripts print this number."""
    names = lora_files._kohya_names(find(loading.from_dict({"model": {"path": kind}}).model, weights=False))
    ends = ("attn1_to_q", "attn1_to_k", "attn1_to_v", "to_out_0", "attn2_to_q", "attn2_to_k", "attn2_to_v",
            "ff_net_0_proj", "ff_net_2", "proj_in", "proj_out")  # fmt: skip
    adapted = [known for known in names.values() if known.endswith(ends)]
    assert len(adapted) == len(set(adapted)) == count and name in adapted


def test_kohyas_names_are_the_original_ones_for_sdxl_and_diffusers_for_sd15(sd15_pipeline: Maker) -> None:
    source, _, adapters = trained("embedded", rank=2, targets=["attn1.to_q", "conv_in"])
    stems = {name.partition(".")[0] for name in lora_files.kohya_tensors(adapters, source)}
    assert "lora_unet_input_blocks_0_0" in stems and "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q" in stems
    source, _, adapters = trained(sd15_pipeline("epsilon"), rank=2, targets=["attn1.to_q", "conv_in"])
    stems = {name.partition(".")[0] for name in lora_files.kohya_tensors(adapters, source)}
    assert {"lora_unet_conv_in", "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"} <= stems


def test_alpha_has_the_scale_of_rslora() -> None:
    """Kohya's readers divide by the rank alone."""
    source, _, adapters = trained("embedded", rank=4, alpha=6.0, use_rslora=True)
    alphas = {float(v) for n, v in lora_files.kohya_tensors(adapters, source).items() if n.endswith(".alpha")}
    assert alphas == {12.0}


def test_kohyas_file_describes_itself(tmp_path: Path) -> None:
    source, _, adapters = trained("embedded", rank=4, targets=["attention", "conv1"])
    write("lora-kohya", adapters, source, tmp_path / "one")
    write("lora-kohya", adapters, source, tmp_path / "two")
    one, two = (tmp_path / folder / "mine.safetensors" for folder in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    with safe_open(one, "pt") as file:
        found = file.metadata()
    assert found["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert found["ss_network_dim"] == found["ss_network_alpha"] == "4" and found["ss_resolution"] == "(512, 512)"
    assert json.loads(found["ss_network_args"]) == {"conv_dim": "4", "conv_alpha": "4"}
    assert found["ss_base_model_version"] == "sdxl_base_v1-0"


def test_peft_finds_its_settings(tmp_path: Path) -> None:
    source, _, adapters = trained("embedded", rank=4, alpha=2.0)
    write("lora-peft", adapters, source, tmp_path)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (said["peft_type"], said["r"], said["lora_alpha"]) == ("LORA", 4, 2.0)
    assert all(name.startswith("base_model.model.") for name in load_file(weight_file(tmp_path)))


def test_what_a_disk_changes_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _, adapters = trained("embedded", rank=2)

    def damaged(tensors: Weights, file: Path, facts: dict[str, str]) -> None:
        save_file(tensors, file, facts)
        with file.open("r+b") as stream:
            stream.seek(-1, os.SEEK_END)
            stream.write(b"\x7f")

    monkeypatch.setattr(lora_files, "save_file", damaged)
    with pytest.raises(EnvironmentProblem, match="does not read back as it was written"):
        write("lora-peft", adapters, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_is_missing_or_was_not_written_is_noticed(tmp_path: Path) -> None:
    one, both = {"a": torch.ones(2)}, {"a": torch.ones(2), "b": torch.zeros(1)}
    write_described(tmp_path / "x.safetensors", both, {})
    for expected in (one, both | {"c": torch.ones(1)}, both | {"a": torch.zeros(2)}):
        with pytest.raises(EnvironmentProblem):
            pipeline_folder.check_written(tmp_path / "x.safetensors", expected)
