"""Attention implementations agree, and fall back where they cannot run."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention as DiffusersAttention
from helpers.pipelines import CPU, Maker, settings, unet_inputs
from torch import nn
from torch.nn.attention import SDPBackend

from smpo_fast.config import loading
from smpo_fast.config.schema import Inversion, Model
from smpo_fast.models import attention
from smpo_fast.models.attention import Attention, keys_values
from smpo_fast.models.denoiser import Denoiser
from smpo_fast.models.inference.caller import InferenceCaller
from smpo_fast.models.inference.kv_cache import cacheable_cross_attentions, cached_keys_values
from smpo_fast.models.load import load_unet
from smpo_fast.models.locate import find, schedule_of
from smpo_fast.models.residual_block import skip_unit_scales


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
    object.__setattr__(unet, "attention_kernels", attention.kernel_order(SDPBackend.EFFICIENT_ATTENTION))
    cached = InferenceCaller(denoiser, Model(), Inversion(), chunk=3).predictor(cond)
    for found in (denoiser.eps(x, time, cond), cached(x, time[:, None].expand(-1, 2))):
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
    order = attention.kernel_order(SDPBackend.EFFICIENT_ATTENTION)
    assert order == (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)
    assert attention.kernel_order(SDPBackend.CUDNN_ATTENTION)[0] is SDPBackend.CUDNN_ATTENTION
    assert attention.kernel_order(None) == (), "PyTorch's choice"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_selection_holds_for_whole_calls_and_is_entered_once_for_each(
    sd15_pipeline: Maker, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where gradient checkpointing repeats the layers in the backward pass."""
    source = find(settings(sd15_pipeline("epsilon")))
    unet = load_unet(source, settings(source.folder, gradient_checkpointing=checkpointing), torch.float32, CPU).train()
    object.__setattr__(unet, "attention_kernels", attention.kernel_order(SDPBackend.EFFICIENT_ATTENTION))
    entered: list[Any] = []
    cudnn: list[bool] = []
    enter, attend = attention.sdpa_kernel, F.scaled_dot_product_attention
    monkeypatch.setattr(attention, "sdpa_kernel", lambda *a, **k: (entered.append(a), enter(*a, **k))[1])

    def noted(*args: Any, **kwargs: Any) -> torch.Tensor:
        cudnn.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attend(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    denoiser = Denoiser(unet, source, schedule_of(source, loading.from_dict({}).inversion), "fp32", CPU)
    loss = denoiser(*unet_inputs(16, sdxl=False)).square().sum()
    assert len(entered) == 1
    forward = len(cudnn)
    with attention.preferred(unet):
        loss.backward()
    assert len(cudnn) == forward * (1 + checkpointing) and not any(cudnn)
    assert torch.backends.cuda.cudnn_sdp_enabled(), "afterwards the choice is PyTorch's again"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_without_divisions_by_one_every_number_is_the_same(kind: str, dtype: torch.dtype) -> None:
    """Predictions and gradients of the modules that a run uses, and of those of diffusers."""
    torch.manual_seed(0)
    added: dict[str, Any] = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    stock = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, cross_attention_dim=24,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4, use_linear_projection=kind == "sdxl",
        **(added | {"projection_class_embeddings_input_dim": 72} if kind == "sdxl" else {}),
    ).to(dtype)  # fmt: skip
    ours = copy.deepcopy(stock)
    attention.set_attention([ours], "sdpa", CPU)
    assert skip_unit_scales(ours) == sum(type(m).__name__ == "ResnetBlock2D" for m in stock.modules()) > 0
    x, time, prompt = torch.randn(4, 4, 8, 8), torch.tensor([7, 7, 500, 500]), torch.randn(4, 5, 24)
    cond = {"text_embeds": torch.randn(4, 24).to(dtype), "time_ids": torch.ones(4, 6)} if kind == "sdxl" else None
    found = []
    for unet in (stock, ours):
        out = unet(x.to(dtype), time, prompt.to(dtype), added_cond_kwargs=cond).sample
        with torch.profiler.profile() as profile:
            out.square().sum().backward()
        found.append((out, *(p.grad for p in unet.parameters())))
        divisions = sum(e.count for e in profile.key_averages() if e.key == "DivBackward0")
        assert (divisions == 0) == (unet is ours)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert [type(m).__name__ for m in ours.modules()] == [type(m).__name__ for m in stock.modules()]
    again = pickle.loads(pickle.dumps(ours))
    assert torch.equal(again(x.to(dtype), time, prompt.to(dtype), added_cond_kwargs=cond).sample, found[1][0])
