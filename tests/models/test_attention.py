"""Attention implementations agree, and fall back where they cannot run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention as DiffusersAttention
from helpers.pipelines import CPU, Maker, settings, unet_inputs
from torch import nn
from torch.nn.attention import SDPBackend

from smpo_fast.config import loading
from smpo_fast.config.schema import Inversion, Model
from smpo_fast.models import attention
from smpo_fast.models.attention import Attention
from smpo_fast.models.denoiser import Denoiser
from smpo_fast.models.inference.caller import InferenceCaller
from smpo_fast.models.inference.kv_cache import cacheable_cross_attentions, cached_keys_values, keys_values
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


def cross_attention(**values: Any) -> DiffusersAttention:
    torch.manual_seed(0)
    attn = DiffusersAttention(query_dim=16, cross_attention_dim=24, heads=2, dim_head=8, **values)
    attn.set_processor(Attention())
    return attn.eval()


@torch.no_grad()
def test_cached_keys_and_values_are_used_for_the_prompt_only() -> None:
    """A call without a prompt is self-attention: it projects its own keys and values whatever is cached."""
    attn = cross_attention()
    x, prompt = torch.randn(4, 5, 16), torch.randn(2, 3, 24)
    cached = keys_values(attn, prompt)
    itself = DiffusersAttention(query_dim=16, heads=2, dim_head=8).eval()
    itself.set_processor(Attention())
    expected = attn(x, prompt.repeat_interleave(2, dim=0)), itself(x)
    with cached_keys_values([attn, itself], [cached, cached]):
        found = attn(x, torch.full_like(prompt, torch.nan).repeat_interleave(2, dim=0))
        assert torch.allclose(found, expected[0], atol=1e-6), "the prompt itself is not read again"
        assert torch.equal(itself(x), expected[1])
    assert torch.allclose(attn(x, prompt.repeat_interleave(2, dim=0)), expected[0])


@pytest.mark.parametrize(
    "values",
    [
        {"residual_connection": True},
        {"rescale_output_factor": 2.0},
        {"qk_norm": "layer_norm"},
        {"cross_attention_norm": "layer_norm"},
        {"norm_num_groups": 4},
    ],
    ids=lambda v: next(iter(v)),
)
@torch.no_grad()
def test_an_attention_that_does_more_than_project_keeps_its_own_code(values: dict[str, Any]) -> None:
    """The short form with cached keys and values would leave out its norms, residual or scale."""
    assert list(cacheable_cross_attentions(nn.ModuleDict({"attn2": cross_attention()})))
    assert not list(cacheable_cross_attentions(nn.ModuleDict({"attn2": cross_attention(**values)})))


def test_the_selected_kernel_comes_first_and_the_fallbacks_follow() -> None:
    order = Attention(SDPBackend.EFFICIENT_ATTENTION).kernels
    assert order == [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    assert Attention(SDPBackend.CUDNN_ATTENTION).kernels[0] is SDPBackend.CUDNN_ATTENTION
    assert Attention().kernels == [], "PyTorch's choice"
