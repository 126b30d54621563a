"""Loading networks and whole pipelines."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers.pipelines import CPU, Maker, settings, unet_inputs
from safetensors.torch import load_file, save_file

from smpo_fast import embedded
from smpo_fast.common.errors import ModelError
from smpo_fast.config import loading
from smpo_fast.models import load
from smpo_fast.models.denoiser import Denoiser
from smpo_fast.models.load import load_unet
from smpo_fast.models.locate import find, schedule_of


def test_gradient_checkpointing_changes_memory_not_gradients(sd15_pipeline: Maker) -> None:
    source = find(settings(sd15_pipeline("epsilon")))
    x, time, cond = unet_inputs(16, sdxl=False)
    gradients = []
    for on in (False, True):
        policy = load_unet(source, settings(source.folder, gradient_checkpointing=on), torch.float32, CPU)
        schedule = schedule_of(source, loading.from_dict({}).inversion)
        Denoiser(policy.train(), source, schedule, "fp32", CPU)(x, time, cond).square().sum().backward()
        assert policy.is_gradient_checkpointing is on
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-6)


def test_a_pipeline_has_the_networks_of_the_run(tmp_path: Path) -> None:
    """What ``model.unet`` and ``model.vae`` put in place of the pipeline's own is sampled with, too."""
    shutil.copytree(embedded.pipeline_path(), tmp_path / "p")
    for part in ("unet", "vae"):
        file = next((tmp_path / "p" / part).glob("*.safetensors"))
        weights = load_file(file)
        save_file({name: value + 1 for name, value in weights.items()}, file)
    own = load.load_pipeline(find(settings("embedded")), torch.float32)
    source = find(settings("embedded", unet=str(tmp_path / "p"), vae=str(tmp_path / "p" / "vae")))
    pipe = load.load_pipeline(source, torch.float32)
    for part in ("unet", "vae"):
        here, there = (dict(getattr(p, part).named_parameters()) for p in (pipe, own))
        assert all(torch.allclose(here[name], there[name] + 1, atol=1e-2) for name in there)


def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    shutil.copytree(embedded.pipeline_path(), tmp_path / "p")
    next((tmp_path / "p" / "unet").glob("*.safetensors")).unlink()
    torch.save({}, tmp_path / "p" / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors only"):
        load_unet(find(settings(tmp_path / "p")), settings(tmp_path / "p"), torch.float32, CPU)
