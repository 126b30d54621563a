"""Attention implementations agree, and fall back where they cannot run."""

from __future__ import annotations

import pytest
import torch
from helpers.pipelines import CPU, Maker, settings, unet_inputs
from torch.nn.attention import SDPBackend

from smpo_fast.config import loading
from smpo_fast.config.schema import Inversion, Model
from smpo_fast.models import attention
from smpo_fast.models.attention import Attention
from smpo_fast.models.denoiser import Denoiser
from smpo_fast.models.inference.caller import InferenceCaller
from smpo_fast.models.load import load_unet
from smpo_fast.models.locate import find, schedule_of


def test_attention_choices_agree(sd15_pipeline: Maker) -> None:
    source = find(settings(sd15_pipeline("epsilon")))
    x, time, cond = unet_inputs(16, sdxl=False)
    schedule = schedule_of(source, loading.from_dict({}).inversion)
    found = {}
    for name in ("sdpa", "eager"):
        policy = load_unet(source, settings(source.folder, attention=name), torch.float32, CPU)
        with torch.no_grad():
            found[name] = Denoiser(policy, source, schedule, "fp32", CPU)(x, time, cond)
    assert torch.allclose(found["sdpa"], found["eager"], atol=1e-5)


def test_xformers_falls_back_and_says_so(sd15_pipeline: Maker, capsys: pytest.CaptureFixture[str]) -> None:
    attention.warn_once.cache_clear()
    source = find(settings(sd15_pipeline("epsilon")))
    policy, _ = (load_unet(source, settings(source.folder, attention="xformers"), torch.float32, CPU) for _ in range(2))
    assert {type(p).__name__ for p in policy.attn_processors.values()} == {"Attention"}
    assert capsys.readouterr().err.count("SDPA is used instead") == 1, "once for policy and reference"


def test_attention_that_cannot_run_here_falls_back_with_a_notice(
    sd15_pipeline: Maker, capsys: pytest.CaptureFixture[str]
) -> None:
    attention.warn_once.cache_clear()
    unet = load_unet(find(settings(sd15_pipeline("epsilon"))), settings(""), torch.float32, CPU)
    assert attention.set_attention([unet], "cudnn", CPU) == "sdpa"
    assert "model.attention = 'cudnn' cannot be used here" in capsys.readouterr().err


@torch.no_grad()
def test_an_input_that_the_selected_kernel_does_not_support_falls_back_to_another(sd15_pipeline: Maker) -> None:
    """As flash attention in float32 on a GPU; here, a kernel that no CPU has."""
    source = find(settings(sd15_pipeline("epsilon")))
    unet = load_unet(source, settings(source.folder), torch.float32, CPU)
    denoiser = Denoiser(unet, source, schedule_of(source, loading.from_dict({}).inversion), "fp32", CPU)
    x, time, cond = unet_inputs(16, sdxl=False)
    expected = denoiser.eps(x, time, cond)
    unet.set_attn_processor(Attention(SDPBackend.EFFICIENT_ATTENTION))
    cached = InferenceCaller(denoiser, Model(), Inversion(), chunk=3).predictor(cond)
    for found in (denoiser.eps(x, time, cond), cached(x, time)):
        assert (found - expected).norm() < 1e-5 * expected.norm()
