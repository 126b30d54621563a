"""Predictions of a UNet for pairs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.pipelines import CPU, Maker, settings, unet_inputs
from torch import Tensor

from smpo_fast.common import runtime
from smpo_fast.config import loading
from smpo_fast.method.batch import Conditioning
from smpo_fast.models.denoiser import Denoiser
from smpo_fast.models.load import load_unet
from smpo_fast.models.locate import find, schedule_of


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-autocast"])
def test_policy_and_reference_predict_bitwise_the_same_at_the_start(precision: str) -> None:
    source = find(settings("embedded"))
    dtype = runtime.COMPUTE_DTYPES[precision]
    policy = load_unet(source, settings("embedded"), torch.float32, CPU).to(dtype)
    reference = load_unet(source, settings("embedded"), dtype, CPU)
    schedule = schedule_of(source, loading.from_dict({}).inversion)
    x, time, cond = unet_inputs(policy.config.cross_attention_dim, sdxl=True)
    a = Denoiser(policy.train(), source, schedule, precision, CPU)(x, time, cond)
    with torch.no_grad():
        b = Denoiser(reference, source, schedule, precision, CPU)(x, time, cond)
    assert a.dtype == torch.float32 and a.shape == x.shape
    assert a.requires_grad and torch.equal(a.detach(), b)


@pytest.mark.parametrize("precision", ["bf16", "bf16-autocast"])
def test_the_last_convolution_is_not_rounded_to_half_precision(precision: str) -> None:
    source = find(settings("embedded"))
    unet = load_unet(source, settings("embedded"), runtime.COMPUTE_DTYPES[precision], CPU)
    names, seen = list(unet.state_dict()), []
    denoise = Denoiser(unet, source, schedule_of(source, loading.from_dict({}).inversion), precision, CPU)
    unet.conv_out.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    x, time, cond = unet_inputs(unet.config.cross_attention_dim, sdxl=True)
    with torch.no_grad():
        found = denoise(x, time, cond).flatten(0, 1)
        last = unet.conv_out
        exact = F.conv2d(seen[0].float(), last.weight.float(), last.bias.float(), padding=1)
    assert torch.equal(found, exact) and not torch.equal(found, found.bfloat16().float())
    assert list(unet.state_dict()) == names and last.weight.dtype == runtime.COMPUTE_DTYPES[precision]


def test_noise_of_the_logit_in_half_precision() -> None:
    """Against fp32 with the same rounded weights; prints the figures of docs/engine.md: run with -s."""
    source = find(settings("embedded"))
    schedule = schedule_of(source, loading.from_dict({}).inversion)
    pairs, draw = 32, torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(pairs, *shape, generator=draw)

    reference = load_unet(source, settings("embedded"), torch.bfloat16, CPU)
    channels, side, config = 4, reference.config.sample_size, reference.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    cond = Conditioning(normal(16, config.cross_attention_dim), normal(pooled), torch.full((pairs, 6), 32.0))
    x, tau = normal(2, channels, side, side), normal(1, channels, side, side)
    time = torch.randint(0, 1000, (pairs,), generator=draw)
    policy = copy.deepcopy(reference)
    for parameter in policy.parameters():
        parameter.data.mul_(1 + 0.01 * torch.randn(parameter.shape, generator=draw))

    def errors(unet: Any, precision: str, exact_output: bool) -> Tensor:
        unet = copy.deepcopy(unet).to(runtime.COMPUTE_DTYPES[precision])
        denoise = Denoiser(unet, source, schedule, precision, CPU)
        if not exact_output:
            unet.conv_out.__class__ = torch.nn.Conv2d
        return (denoise(x, time, cond).double() - tau).square().mean((2, 3, 4))

    def logit(precision: str, exact_output: bool = True) -> Tensor:
        ours, theirs = (errors(unet, precision, exact_output) for unet in (policy, reference))
        return -2500 * ((ours[:, 0] - ours[:, 1]) - (theirs[:, 0] - theirs[:, 1]))  # beta = 5000

    with torch.no_grad():
        truth = logit("fp32")
        rounded, exact = ((logit("bf16", how) - truth).square().mean().sqrt().item() for how in (False, True))
    print(f"noise of the logit in bf16: {rounded:.2f} with a rounded prediction, {exact:.2f} without")
    assert exact < 0.85 * rounded


def test_every_pair_has_its_own_time_and_prompt() -> None:
    """A pair's prediction does not depend on its neighbours: bit for bit when computed alone in eager fp32."""
    source = find(settings("embedded"))
    policy = load_unet(source, settings("embedded"), torch.float32, CPU)
    denoise = Denoiser(policy.eval(), source, schedule_of(source, loading.from_dict({}).inversion), "fp32", CPU)
    x, time, cond = unet_inputs(policy.config.cross_attention_dim, sdxl=True)
    with torch.no_grad():
        whole = denoise(x, time, cond)
        for i in range(3):
            rows = slice(i, i + 1)
            assert torch.allclose(whole[rows], denoise(x[rows], time[rows], cond.take(rows)), atol=2e-5)
        assert not torch.allclose(whole[:1], denoise(x[:1], time[1:2], cond.take(slice(0, 1))), atol=1e-3)


def test_v_prediction_is_converted(sd15_pipeline: Maker) -> None:
    """eps = signal v + noise x, and the target of v is signal tau - noise x_0, so that errors are in v."""
    source = find(settings(sd15_pipeline("v_prediction")))
    schedule = schedule_of(source, loading.from_dict({}).inversion)
    policy = load_unet(source, settings(source.folder), torch.float32, CPU)
    denoise = Denoiser(policy.eval(), source, schedule, "fp32", CPU)
    x, time, cond = unet_inputs(16, sdxl=False)
    paths = [schedule.path(int(t), loading.from_dict({}).inversion) for t in time]
    with torch.no_grad():
        v, eps = denoise(x, time, cond), denoise.eps(x, time, cond)
    x_0 = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    for i, path in enumerate(paths):
        assert torch.allclose(eps[i], path.final_level.signal * v[i] + path.final_level.noise * x[i], atol=1e-5)
        tau = (x[i] - path.final_level.signal * x_0[i]) / path.final_level.noise
        target = denoise.target(x_0[i : i + 1], tau[None], torch.tensor([path.final_level.timestep]))[0]
        recovered = path.final_level.signal * target + path.final_level.noise * x[i]
        assert torch.allclose(recovered, tau, atol=1e-3 * max(1.0, tau.abs().max().item()))
    below, first = (denoise.as_eps(v, x, torch.full((len(x),), time)) for time in (-99, 0))
    assert torch.equal(below, first), "released paths start below 0, at the noise level of timestep 0"


def test_sizes_of_images_are_not_rounded() -> None:
    """bf16 has no numbers between 1016 and 1024."""
    source = find(settings("embedded"))
    policy = load_unet(source, settings("embedded"), torch.bfloat16, CPU)
    denoise = Denoiser(policy, source, schedule_of(source, loading.from_dict({}).inversion), "bf16", CPU)
    x, time, cond = unet_inputs(policy.config.cross_attention_dim, sdxl=True)
    sizes = torch.tensor([[1019.0, 1021, 3, 5, 1017, 1023]] * 3)
    given = denoise.unet_inputs(Conditioning(cond.prompt, cond.pooled, sizes))["added_cond_kwargs"]
    assert given["text_embeds"].dtype is torch.bfloat16
    assert torch.equal(given["time_ids"], sizes.repeat_interleave(2, 0))
