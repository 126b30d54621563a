"""Loading networks and whole pipelines."""

from __future__ import annotations

import shutil
from collections.abc import Callable
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
from smpo_fast.models.encoders import Encoders
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


WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
Weights = dict[str, torch.Tensor]


def edit_weights(pipeline: Path, part: str, change: Callable[[Weights], Weights]) -> None:
    file = pipeline / part / f"{WEIGHTS[part]}.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def load_all(folder: Path) -> None:
    source = find(settings(folder))
    load_unet(source, settings(folder), torch.float32, CPU)
    Encoders(source, CPU)


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("left", ["none", "all but one"])
def test_a_network_that_lacks_tensors_is_refused(part: str, left: str, tmp_path: Path) -> None:
    """Not encoded with random weights, and not a traceback about the meta device."""
    shutil.copytree(embedded.pipeline_path(), tmp_path / "p")
    load_all(tmp_path / "p")
    removed: list[str] = []

    def change(weights: Weights) -> Weights:
        removed.append(sorted(weights)[-1])
        return {n: t for n, t in weights.items() if n != removed[0]} if left != "none" else {}

    edit_weights(tmp_path / "p", part, change)
    what = rf"{part}: .*missing" if left == "none" else rf"{part}: .*{removed[0].removeprefix('text_model.')} missing"
    with pytest.raises(ModelError, match=what):
        load_all(tmp_path / "p")
    with pytest.raises(ModelError, match=what):
        load.load_pipeline(find(settings(tmp_path / "p")), torch.float32)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_encoders_saved_by_any_version_of_transformers_are_complete(prefix: str, tmp_path: Path) -> None:
    """transformers 4 saved the constants position_ids at times, and each name below 'text_model.'; 5.6 does not."""
    shutil.copytree(embedded.pipeline_path(), tmp_path / "p")
    source = find(settings(tmp_path / "p"))
    expected = Encoders(source, CPU).encode_prompts(["a red circle"])

    def change(weights: Weights) -> Weights:
        bare = {name.removeprefix("text_model."): t for name, t in weights.items()}
        renamed = {n if n.startswith("text_projection") else prefix + n: t for n, t in bare.items()}
        return renamed | {f"{prefix}embeddings.position_ids": torch.arange(16)[None]}

    for part in ("text_encoder", "text_encoder_2"):
        edit_weights(tmp_path / "p", part, change)
    found = Encoders(source, CPU).encode_prompts(["a red circle"])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_truncated_file_is_named_with_the_reason(tmp_path: Path) -> None:
    shutil.copytree(embedded.pipeline_path(), tmp_path / "p")
    file = tmp_path / "p" / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match="vae: cannot be loaded as AutoencoderKL"):
        load_all(tmp_path / "p")


@pytest.mark.parametrize("inside", [True, False], ids=["unet/", "root"])
@pytest.mark.parametrize("variant", ["", "fp16"])
@pytest.mark.parametrize("shards", ["1MB", "1GB"], ids=["shards", "one file"])
def test_a_unet_alone_is_read_in_every_layout_of_repositories(
    inside: bool, variant: str, shards: str, tmp_path: Path
) -> None:
    """SmPO-SDXL and DPO-SDXL have unet/, mapo-beta its weights at the root; variants, and weights in shards."""
    own = load_unet(find(settings("embedded")), settings("embedded"), torch.float32, CPU)
    own.conv_in.bias.data += 1
    place = tmp_path / "unet" if inside else tmp_path
    own.save_pretrained(place, variant=variant or None, max_shard_size=shards)
    assert (len(list(place.glob("*.safetensors"))) > 1) == (shards == "1MB")
    model = settings("embedded", unet=str(tmp_path), variant=variant)
    found = load_unet(find(model), model, torch.float32, CPU).state_dict()
    assert all(torch.equal(found[name], value) for name, value in own.state_dict().items())
