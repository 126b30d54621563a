"""The inversion against closed forms, plain loops, and its own promises about batching."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from smpo_fast import config
from smpo_fast.config import Inversion
from smpo_fast.inversion import forward_noise, invert, rounds
from smpo_fast.schedule import NoiseSchedule, Path

SDXL = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
SCHEDULE = NoiseSchedule.from_config(SDXL)
SHAPE = (2, 4, 6, 6)
TIMES = (999, 801, 433, 250, 101, 100, 57, 1, 0)


def settings(**values: object) -> Inversion:
    return config.from_dict({"inversion": values}).inversion


def paths(chosen: Inversion, times: tuple[int, ...] = TIMES) -> list[Path]:
    return [SCHEDULE.path(t, chosen) for t in times]


def latents(count: int = len(TIMES), dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def network(x: Tensor, time: Tensor, rows: slice) -> Tensor:
    """A smooth nonlinear function of latent and time; each picture for itself."""
    t = (time.to(x.dtype) / 1000)[:, None, None, None, None]
    return torch.tanh(x * (0.5 + t)) + 0.3 * torch.roll(x, 1, dims=-1) * t


def gaussian_eps(x: Tensor, time: Tensor, rows: slice, variance: float = 0.25) -> Tensor:
    """The exact noise prediction for data N(0, variance): eps = noise * x / (signal^2 variance + noise^2)."""
    alpha = torch.tensor([SCHEDULE.alphas_cumprod[max(int(t), 0)] for t in time], dtype=x.dtype)
    alpha = alpha[:, None, None, None, None]
    return (1 - alpha).sqrt() * x / (alpha * variance + 1 - alpha)


@pytest.mark.parametrize("fidelity", ["paper", "release"])
@pytest.mark.parametrize("renoise_steps", [0, 1, 3])
def test_agrees_with_a_plain_loop_in_float64(fidelity: str, renoise_steps: int) -> None:
    """The textbook way: DDIM steps in x, target from (x_t - signal x_0) / noise, one pair at a time."""
    chosen = settings(fidelity=fidelity, renoise_steps=renoise_steps, steps=10)
    x_t, tau = invert(network, latents(), paths(chosen), chosen, chunk=4)
    for i, path in enumerate(paths(chosen)):
        x_0 = latents(dtype=torch.float64)[i : i + 1]
        x = x_0 * 1.0
        for here, there in zip(path.levels, path.levels[1:], strict=False):
            times = {"source": torch.tensor([here.time]), "destination": torch.tensor([there.time])}

            def ddim(eps: Tensor, x: Tensor = x, here=here, there=there) -> Tensor:
                clean = (x - here.noise * eps) / here.signal
                return there.signal * clean + there.noise * eps

            estimates = [network(x, times[chosen.first_time], slice(0, 1))]
            for _ in range(renoise_steps):
                estimates.append(network(ddim(estimates[-1]), times[chosen.renoise_time], slice(0, 1)))
            averaged = chosen.average == "mean" or (chosen.average == "renoise" and there.time < chosen.average_below)
            x = ddim(sum(estimates) / len(estimates) if averaged else estimates[-1])
        target = (x - path.at.signal * x_0) / path.at.noise
        assert (x_t[i] - x[0]).norm() / x.norm() < 1e-5
        assert (tau[i] - target[0]).norm() / target.norm() < 1e-4


@pytest.mark.parametrize("fidelity", ["paper", "release"])
def test_x_t_and_tau_are_consistent(fidelity: str) -> None:
    chosen = settings(fidelity=fidelity)
    x_0 = latents()
    x_t, tau = invert(network, x_0, paths(chosen), chosen, chunk=3)
    assert torch.allclose(forward_noise(x_0, tau, paths(chosen)), x_t, atol=2e-5)


@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
def test_result_does_not_depend_on_chunks_or_neighbours(chunk: int) -> None:
    chosen = settings()
    whole = invert(network, latents(), paths(chosen), chosen, chunk=len(TIMES))
    parts = invert(network, latents(), paths(chosen), chosen, chunk=chunk)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    alone = invert(network, latents()[2:3], paths(chosen, TIMES[2:3]), chosen, chunk=1)
    assert all(torch.equal(a[2], b[0]) for a, b in zip(whole, alone, strict=True))


def test_extra_calls_for_other_ranks_change_nothing() -> None:
    chosen = settings(steps=10)
    x_0, calls = latents(3), []

    def counted(x: Tensor, time: Tensor, rows: slice) -> Tensor:
        calls.append(len(x))
        return network(x, time, rows)

    mine = paths(chosen, (433, 101, 57))
    plain = invert(network, x_0, mine, chosen, chunk=2)
    active = [3, 3, 3, 2, 2, 1, 1]
    padded = invert(counted, x_0, mine, chosen, chunk=2, active=active)
    assert all(torch.equal(a, b) for a, b in zip(plain, padded, strict=True))
    assert len(calls) == 2 * sum(-(-n // 2) for n in active)


def test_network_calls_per_pair() -> None:
    """What the paper's fidelity costs: two calls per step, ceil(t / D) steps."""
    chosen, pictures = settings(steps=10), 0

    def counted(x: Tensor, time: Tensor, rows: slice) -> Tensor:
        nonlocal pictures
        pictures += x.shape[0]
        return torch.zeros_like(x)

    times = tuple(range(999, -1, -1))
    x_0 = torch.zeros(len(times), 2, 1, 1, 1)
    invert(counted, x_0, paths(chosen, times), chosen, chunk=64)
    assert pictures / len(times) == 2 * (sum(-(-t // 100) for t in range(1000)) + 1) / 1000


@pytest.mark.parametrize(("renoise_steps", "order"), [(0, 1), (1, 2)])
def test_converges_to_the_flow_at_the_solvers_order(renoise_steps: int, order: int) -> None:
    """Data N(0, v): the flow is x_t = x_0 sqrt(signal^2 + noise^2 / v), known exactly.

    The network is told time 0 at the clean latent, whose true level lies below: a fixed error of about 0.5 % here,
    so the order is measured against the same solver at the finest grid.
    """
    variance, time = 0.25, 900
    x_0 = latents(1)

    def solve(steps: int) -> Tensor:
        chosen = settings(steps=steps, renoise_steps=renoise_steps, average="mean")
        return invert(gaussian_eps, x_0, paths(chosen, (time,)), chosen, chunk=1)[0]

    finest, at = solve(1000), SCHEDULE.level(time)
    exact = x_0 * (at.signal**2 + at.noise**2 / variance) ** 0.5
    assert (finest - exact).norm() / exact.norm() < 0.01
    coarse, fine = (((solve(steps) - finest).norm() / finest.norm()).item() for steps in (10, 40))
    assert coarse / fine > 0.7 * 4**order, (coarse, fine)


def test_a_round_trip_returns_to_the_clean_latent_as_steps_grow() -> None:
    """Up by the inversion, down by the DDIM sampler on the same levels: first order, as DDIM is."""
    x_0, time, errors = latents(1), 900, []
    for steps in (50, 200):
        chosen = settings(steps=steps, renoise_steps=0)
        path = SCHEDULE.path(time, chosen)
        x = invert(gaussian_eps, x_0, [path], chosen, chunk=1)[0]
        for here, there in zip(path.levels[:0:-1], path.levels[-2::-1], strict=True):
            eps = gaussian_eps(x, torch.tensor([here.time]), slice(0, 1))
            x = there.signal * (x - here.noise * eps) / here.signal + there.noise * eps
        errors.append(((x - x_0).norm() / x_0.norm()).item())
    assert errors[1] < 0.05 and errors[0] / errors[1] > 0.8 * 4, errors


def test_inpo_noise_has_the_ddim_deviation() -> None:
    chosen = settings(renoise_steps=0, noise=0.1, steps=10)
    path = paths(chosen, (433,))
    noise = torch.randn(path[0].depth, 1, *SHAPE, generator=torch.Generator().manual_seed(1))
    x_0 = latents(1)

    def silent(x: Tensor, time: Tensor, rows: slice) -> Tensor:
        return torch.zeros_like(x)

    x_t, _ = invert(silent, x_0, path, chosen, chunk=1, noise=noise)
    expected = x_0.double()
    for k, (here, there) in enumerate(zip(path[0].levels, path[0].levels[1:], strict=False)):
        variance = here.noise**2 / there.noise**2 * (1 - there.signal**2 / here.signal**2)
        expected = expected * there.signal / here.signal + 0.1 * variance**0.5 * noise[k]
    assert torch.allclose(x_t.double(), expected, atol=1e-5)


def test_noise_source_is_diffusion_dpo() -> None:
    chosen = config.from_dict({"objective": {"name": "dpo"}}).inversion
    assert chosen.source == "noise"
    x_0, tau = latents(), latents() + 1
    x_t = forward_noise(x_0, tau, paths(chosen))
    for i, t in enumerate(TIMES):
        level = SCHEDULE.level(t)
        assert torch.allclose(x_t[i], level.signal * x_0[i] + level.noise * tau[i], atol=1e-5)


def test_unsorted_paths_are_our_bug_and_said_so() -> None:
    with pytest.raises(ValueError, match="deepest first"):
        rounds(paths(settings(), (57, 999)))
