"""Schedules whose last timestep has no signal (zero terminal SNR), for networks that predict v.

Data N(0, variance), where the exact v, noise and flow are known: the flow keeps x relative to its standard deviation.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from smpo_fast.config import loading
from smpo_fast.config.schema import Inversion
from smpo_fast.method.inversion import forward_noise, invert
from smpo_fast.method.schedule import TERMINAL_ALPHA, NoiseSchedule

SDXL = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
ZERO = {**SDXL, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
SCHEDULE = NoiseSchedule.from_config(ZERO)
LAST = 999
VARIANCES = (0.25, 1.0, 4.0)
WAYS: dict[str, dict[str, Any]] = {
    "renoise": {}, "ddim": {"solver": "ddim"}, "heun": {"solver": "heun"}, "ab2": {"solver": "ab2"},
    "pec": {"solver": "pec"}, "even": {"grid": "even"}, "release": {"fidelity": "release"},
    "heun, angle": {"solver": "heun", "average": "angle"}, "pec, angle": {"solver": "pec", "average": "angle"},
}  # fmt: skip


def settings(**values: Any) -> Inversion:
    return loading.from_dict({"inversion": values}).inversion


def latents() -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).standard_normal((1, 2, 4, 4, 4), dtype=np.float32))


def scale(time: int, variance: float) -> float:
    """The standard deviation of x at a timestep."""
    level = SCHEDULE.level(time)
    return math.sqrt(level.signal**2 * variance + level.noise**2)


def noise_of(variance: float) -> Any:
    """The exact prediction of v, as the noise that it implies: ``eps = signal v + noise x``."""

    def eps(x: Tensor, timesteps: Tensor, *, refinement: bool = False) -> Tensor:
        level, deviation = SCHEDULE.level(int(timesteps[0, 0])), scale(int(timesteps[0, 0]), variance)
        v = level.signal * level.noise * (1 - variance) / deviation**2 * x
        return level.signal * v + level.noise * x

    return lambda rows: eps


def error(time: int, variance: float, **values: Any) -> float:
    """Of x_t, relative."""
    x_0 = latents() * math.sqrt(variance)
    x_t, tau = invert(noise_of(variance), x_0, [SCHEDULE.path(time, settings(**values))], settings(**values), chunk=1)
    exact = x_0 / math.sqrt(variance) * scale(time, variance)
    assert torch.allclose(x_t, forward_noise(x_0, tau, [SCHEDULE.path(time, settings(**values))]), atol=1e-5)
    return float((x_t[0] - exact).norm() / exact.norm())


def angle_error(time: int, variance: float, steps: int) -> float:
    """Of Heun's method in the angle atan(sigma), where dx = v: the alternative to a finite last sigma."""
    count = math.ceil(time * steps / 1000)
    times = [0, *(round(time - k * 1000 / steps) for k in reversed(range(count)))]
    alphas = np.where(np.arange(1000) == LAST, 0.0, SCHEDULE.alphas_cumprod)
    angles = [0.0, *(math.acos(math.sqrt(alphas[t])) for t in times[1:])]

    def v(x: float, k: int) -> float:
        signal, noise = math.sqrt(alphas[times[k]]), math.sqrt(1 - alphas[times[k]])
        return signal * noise * (1 - variance) * x / (signal**2 * variance + noise**2)

    x = math.sqrt(variance)
    for k in range(count):
        h, here = angles[k + 1] - angles[k], v(x, k)
        x += h * (here + v(x + h * here, k + 1)) / 2
    return abs(x / scale(time, variance) - 1)


def test_levels_are_those_of_diffusers() -> None:
    theirs = DDIMScheduler(**ZERO).alphas_cumprod.double().numpy()
    assert np.abs(SCHEDULE.alphas_cumprod[:-1] - theirs[:-1]).max() < 1e-6
    assert theirs[-1] == 0.0
    assert SCHEDULE.alphas_cumprod[-1] == TERMINAL_ALPHA
    assert SCHEDULE.alphas_cumprod[0] == pytest.approx(1 - SDXL["beta_start"])  # type: ignore[operator]


@pytest.mark.parametrize("kind", ["squaredcos_cap_v2", "linear", "trained"])
def test_other_beta_schedules_are_those_of_diffusers(kind: str) -> None:
    config: dict[str, Any] = {"beta_schedule": kind, "num_train_timesteps": 1000}
    if kind == "trained":
        config = {"trained_betas": np.linspace(1e-4, 0.03, 50).tolist(), "num_train_timesteps": 50}
    theirs = DDIMScheduler(**config).alphas_cumprod.double().numpy()
    assert np.allclose(NoiseSchedule.from_config(config).alphas_cumprod, theirs, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_sigma_stays_finite(dtype: str) -> None:
    assert NoiseSchedule.from_config(ZERO, dtype).level(LAST).sigma == pytest.approx(4096, rel=1e-3)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("way", WAYS)
def test_the_last_timestep_is_reached_as_accurately_as_others(way: str, variance: float) -> None:
    before = max(error(time, variance, steps=20, **WAYS[way]) for time in (949, 998))
    assert error(LAST, variance, steps=20, **WAYS[way]) < 1.1 * before + 1e-3


@pytest.mark.parametrize("variance", VARIANCES)
def test_at_the_last_timestep_more_steps_are_more_accurate(variance: float) -> None:
    for way in ("heun", "ab2", "pec"):
        assert error(LAST, variance, steps=40, **WAYS[way]) < 0.5 * error(LAST, variance, steps=10, **WAYS[way])


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("time", [700, LAST])
def test_weights_in_the_angle_are_more_accurate(variance: float, time: int) -> None:
    """At all timesteps alike, with heun and pec; and Heun's method in the angle itself gains about as much."""
    plain, angle = (error(time, variance, steps=10, solver="heun", average=a) for a in ("mean", "angle"))
    assert angle < 0.95 * plain
    assert angle_error(time, variance, 10) < 1.3 * angle
    plain, angle = (error(time, variance, steps=10, solver="pec", average=a) for a in ("mean", "angle"))
    assert angle < 0.97 * plain


def test_targets_are_exact_at_the_last_timestep() -> None:
    """There x_t is the noise itself, and what v should be is the clean latent, negative."""
    x_0, level = latents(), SCHEDULE.level(LAST)
    path = SCHEDULE.path(LAST, settings())
    x_t, tau = invert(noise_of(1.0), x_0, [path], settings(), chunk=1)
    assert torch.allclose(x_t, tau, atol=1e-3)
    v = level.signal * tau - level.noise * x_0
    assert torch.allclose(v[0], -x_0, atol=1e-3)
    assert torch.allclose(level.signal * x_t - level.noise * v, x_0, atol=1e-5)  # v gives back the clean latent
