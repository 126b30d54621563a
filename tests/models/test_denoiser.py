"""Predictions of a UNet for pairs."""

from __future__ import annotations

import pytest
import torch
from helpers.pipelines import CPU, Maker, settings, unet_inputs

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
