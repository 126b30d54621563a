"""Images and prompts are encoded as the diffusers pipelines do it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from architectures import SDXL, make_vae
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from helpers.pipelines import CPU, Maker, settings
from transformers import CLIPTextConfig

from smpo_fast.data.cache import stages
from smpo_fast.embedded import shapes
from smpo_fast.models.encoders import Encoders
from smpo_fast.models.load import TEXT_ENCODERS
from smpo_fast.models.locate import find
from smpo_fast.models.tracing import META, LiveBytes, fused_attention
from smpo_fast.planning.memory import ALLOCATOR_SHARE, CONTEXT_BYTES


def test_prompts_are_encoded_as_the_sdxl_pipeline_does() -> None:
    source = find(settings("embedded"))
    pipe = StableDiffusionXLPipeline.from_pretrained(source.folder, dtype=torch.float32)
    prompts = ["a red circle on a blue background", ""]
    theirs, _, pooled, _ = pipe.encode_prompt(prompts, device=CPU, do_classifier_free_guidance=False)
    ours, our_pooled = Encoders(source, CPU).encode_prompts(prompts)
    assert torch.allclose(ours, theirs, atol=1e-6) and our_pooled is not None
    assert torch.allclose(our_pooled, pooled, atol=1e-6)


def test_prompts_are_encoded_as_the_sd15_pipeline_does(sd15_pipeline: Maker) -> None:
    folder = sd15_pipeline("epsilon")
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    theirs, _ = pipe.encode_prompt(["a cat", ""], CPU, 1, False)
    encoders = Encoders(find(settings(folder)), CPU)
    ours, pooled = encoders.encode_prompts(["a cat", ""])
    assert pooled is None and torch.allclose(ours, theirs, atol=1e-6)
    assert encoders.truncated(["a cat", "a very long caption about a cat on a mat"]) == 1
    # every letter is a token, and two of the 16 are the beginning and the end
    assert [encoders.truncated(["a" * length]) for length in (14, 15)] == [0, 1]


def test_latents_decode_back_to_the_picture() -> None:
    source = find(settings("embedded"))
    encoders, caption = Encoders(source, CPU), shapes.prompts("train", 1, 0)[0]
    drawn = shapes.render([shapes.parse(caption)], np.random.default_rng(0))
    picture = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1
    mean, std = encoders.encode_images(picture)
    assert mean.shape == std.shape == (1, 4, 8, 8) and (std > 0).all()
    decoded = encoders.vae.decode(mean / encoders.vae.config.scaling_factor).sample
    assert (decoded - picture).square().mean() < 0.02, "the scaling factor is applied once"


def test_images_that_overflow_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    encoders = Encoders(find(settings("embedded")), CPU)
    with pytest.raises(FloatingPointError):
        encoders.encode_images(torch.full((1, 3, 32, 32), float("nan")))
    posterior = SimpleNamespace(mean=torch.zeros(1, 4, 8, 8), std=torch.full((1, 4, 8, 8), float("nan")))
    monkeypatch.setattr(encoders.vae, "encode", lambda pixels: SimpleNamespace(latent_dist=posterior))
    with pytest.raises(FloatingPointError):
        encoders.encode_images(torch.zeros(1, 3, 32, 32))


def test_preparing_sdxl_fits_a_card_of_12_gb() -> None:
    """The VAE's largest call, followed tensor by tensor at true size, next to the text encoders."""
    vae: Any = make_vae(SDXL, META, torch.float32)
    with torch.device(META):
        text = [cls(CLIPTextConfig(**config)) for cls, config in zip(TEXT_ENCODERS, SDXL.text, strict=True)]
    images = stages.CALL_PIXELS // SDXL.resolution**2
    with torch.no_grad(), fused_attention(), LiveBytes(p for m in (vae, *text) for p in m.parameters()) as live:
        vae.encode(torch.empty(images, 3, SDXL.resolution, SDXL.resolution, device=META))
    assert images >= 1 and live.peak * (1 + ALLOCATOR_SHARE) + CONTEXT_BYTES < 12e9
