"""The exported pipeline."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from helpers.pipelines import CPU, Maker, settings

from smpo_fast import embedded
from smpo_fast.models.export import export_pipeline
from smpo_fast.models.identity import encoders_identity
from smpo_fast.models.load import load_unet
from smpo_fast.models.locate import find


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_export_is_a_pipeline_with_the_new_weights(kind: str, sd15_pipeline: Maker, tmp_path: Path) -> None:
    source = find(settings("embedded" if kind == "sdxl" else sd15_pipeline("epsilon")))
    policy = load_unet(source, settings(source.folder), torch.float32, CPU)
    state = {name: value + 0.01 for name, value in policy.state_dict().items()}
    export_pipeline(source, state, tmp_path / "export", "float32")
    cls = StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline
    pipe = cls.from_pretrained(tmp_path / "export")
    assert all(torch.equal(value, state[name]) for name, value in pipe.unet.state_dict().items())
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red circle", num_inference_steps=2, height=side, width=side).images[0].size == (side, side)
    assert encoders_identity(find(settings(tmp_path / "export"))) != "", "an export is a start for the next run"


def test_export_copies_what_was_not_trained(tmp_path: Path) -> None:
    """A chosen variant gets the plain name, other variants stay behind, and no path of this machine is written."""
    shutil.copytree(embedded.pipeline_path(), tmp_path / "p")
    encoder = tmp_path / "p" / "text_encoder"
    (encoder / "model.safetensors").rename(encoder / "model.fp16.safetensors")
    (tmp_path / "p" / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"another variant")
    source = find(settings(tmp_path / "p"))
    state = load_unet(source, settings(tmp_path / "p"), torch.float32, CPU).state_dict()
    for variant, weights in (("fp16", {"model.safetensors"}), (None, set())):
        export_pipeline(replace(source, variant=variant), state, tmp_path / "export", "float16")
        exported = tmp_path / "export" / "text_encoder"
        assert {f.name for f in exported.glob("*.safetensors")} == weights
    here, there = (f / "vae" / "diffusion_pytorch_model.safetensors" for f in (tmp_path / "p", tmp_path / "export"))
    assert here.read_bytes() == there.read_bytes()
    for file in (tmp_path / "export").rglob("*.json"):
        assert str(tmp_path) not in file.read_text(), file


def test_export_refuses_foreign_weights(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="Missing key"):
        export_pipeline(find(settings("embedded")), {}, tmp_path / "export", "float32")
