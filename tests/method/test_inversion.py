"""The inversion against closed forms, plain loops, and its own promises about batching."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from smpo_fast.config import loading
from smpo_fast.config.schema import Inversion
from smpo_fast.method.inversion import NoisePredictor, active_counts, forward_noise, invert, network_calls
from smpo_fast.method.schedule import LandingPoint, Level, NoisePath, NoiseSchedule

SDXL = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
SCHEDULE = NoiseSchedule.from_config(SDXL)
SHAPE = (2, 4, 6, 6)
TIMES = (999, 801, 433, 250, 101, 100, 57, 1, 0)


def settings(**values: object) -> Inversion:
    return loading.from_dict({"inversion": values}).inversion


def paths(chosen: Inversion, times: tuple[int, ...] = TIMES) -> list[NoisePath]:
    return [SCHEDULE.path(t, chosen) for t in times]


def latents(count: int = len(TIMES), dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def network(x: Tensor, time: Tensor, *, refinement: bool = False) -> Tensor:
    """A smooth nonlinear function of latent and time; each picture for itself."""
    t = (time.to(x.dtype) / 1000)[..., None, None, None]
    return torch.tanh(x * (0.5 + t)) + 0.3 * torch.roll(x, 1, dims=-1) * t


def lift(
    eps: NoisePredictor, x_0: Tensor, mine: list[NoisePath], chosen: Inversion, **options: Any
) -> tuple[Tensor, Tensor]:
    """x_t and tau of the only landing, by one network for all chunks."""
    x_t, tau = invert(lambda rows: eps, x_0, mine, chosen, **options)
    return x_t[-1], tau[-1]


def gaussian_eps(x: Tensor, time: Tensor, *, refinement: bool = False, variance: float = 0.25) -> Tensor:
    """The exact noise prediction for data N(0, variance): eps = noise * x / (signal^2 variance + noise^2)."""
    alpha = torch.tensor([SCHEDULE.alphas_cumprod[max(int(t), 0)] for t in time[:, 0]], dtype=x.dtype)
    alpha = alpha[:, None, None, None, None]
    return (1 - alpha).sqrt() * x / (alpha * variance + 1 - alpha)


@pytest.mark.parametrize("fidelity", ["paper", "release"])
@pytest.mark.parametrize("renoise_steps", [0, 1, 3])
def test_agrees_with_a_plain_loop_in_float64(fidelity: str, renoise_steps: int) -> None:
    """The textbook way: DDIM steps in x, target from (x_t - signal x_0) / noise, one pair at a time."""
    chosen = settings(fidelity=fidelity, renoise_steps=renoise_steps, steps=10)
    x_t, tau = lift(network, latents(), paths(chosen), chosen, chunk=4)
    for i, path in enumerate(paths(chosen)):
        x_0 = latents(dtype=torch.float64)[i : i + 1]
        x = x_0 * 1.0
        for here, there in zip(path.levels, path.levels[1:], strict=False):
            times = {
                name: torch.tensor([[level.timestep] * 2]) for name, level in (("source", here), ("destination", there))
            }

            def ddim(eps: Tensor, x: Tensor = x, here=here, there=there) -> Tensor:
                clean = (x - here.noise * eps) / here.signal
                return there.signal * clean + there.noise * eps

            estimates = [network(x, times[chosen.first_time])]
            for _ in range(renoise_steps):
                estimates.append(network(ddim(estimates[-1]), times[chosen.renoise_time]))
            averaged = chosen.average == "mean" or (
                chosen.average == "renoise" and there.timestep < chosen.average_below
            )
            x = ddim(sum(estimates) / len(estimates) if averaged else estimates[-1])
        target = (x - path.final_level.signal * x_0) / path.final_level.noise
        assert (x_t[i] - x[0]).norm() / x.norm() < 1e-5
        assert (tau[i] - target[0]).norm() / target.norm() < 1e-4


@pytest.mark.parametrize("fidelity", ["paper", "release"])
def test_x_t_and_tau_are_consistent(fidelity: str) -> None:
    chosen = settings(fidelity=fidelity)
    x_0 = latents()
    x_t, tau = lift(network, x_0, paths(chosen), chosen, chunk=3)
    assert torch.allclose(forward_noise(x_0, tau[None], paths(chosen))[0], x_t, atol=2e-5)


@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
def test_result_does_not_depend_on_chunks_or_neighbours(chunk: int) -> None:
    chosen = settings()
    whole = lift(network, latents(), paths(chosen), chosen, chunk=len(TIMES))
    parts = lift(network, latents(), paths(chosen), chosen, chunk=chunk)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    alone = lift(network, latents()[2:3], paths(chosen, TIMES[2:3]), chosen, chunk=1)
    assert all(torch.equal(a[2], b[0]) for a, b in zip(whole, alone, strict=True))


def test_extra_calls_for_other_ranks_change_nothing() -> None:
    chosen = settings(steps=10)
    x_0, calls = latents(3), []

    def counted(x: Tensor, time: Tensor, *, refinement: bool = False) -> Tensor:
        calls.append(len(x))
        return network(x, time)

    mine = paths(chosen, (433, 101, 57))
    plain = lift(network, x_0, mine, chosen, chunk=2)
    active = [3, 3, 3, 2, 2, 1, 1]
    padded = lift(counted, x_0, mine, chosen, chunk=2, active=active)
    assert all(torch.equal(a, b) for a, b in zip(plain, padded, strict=True))
    assert len(calls) == 2 * sum(-(-n // 2) for n in active)


def test_network_calls_per_pair() -> None:
    """What the paper's fidelity costs: two calls per step, ceil(t / D) steps."""
    chosen, pictures = settings(steps=10), 0

    def counted(x: Tensor, time: Tensor, *, refinement: bool = False) -> Tensor:
        nonlocal pictures
        pictures += x.shape[0]
        return torch.zeros_like(x)

    times = tuple(range(999, -1, -1))
    x_0 = torch.zeros(len(times), 2, 1, 1, 1)
    lift(counted, x_0, paths(chosen, times), chosen, chunk=64)
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
        return lift(gaussian_eps, x_0, paths(chosen, (time,)), chosen, chunk=1)[0]

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
        x = lift(gaussian_eps, x_0, [path], chosen, chunk=1)[0]
        for here, there in zip(path.levels[:0:-1], path.levels[-2::-1], strict=True):
            eps = gaussian_eps(x, torch.tensor([[here.timestep] * 2]))
            x = there.signal * (x - here.noise * eps) / here.signal + there.noise * eps
        errors.append(((x - x_0).norm() / x_0.norm()).item())
    assert errors[1] < 0.05 and errors[0] / errors[1] > 0.8 * 4, errors


def test_inpo_noise_has_the_ddim_deviation() -> None:
    chosen = settings(renoise_steps=0, noise=0.1, steps=10)
    path = paths(chosen, (433,))
    noise = torch.randn(path[0].depth, 1, *SHAPE, generator=torch.Generator().manual_seed(1))
    x_0 = latents(1)

    def silent(x: Tensor, time: Tensor, *, refinement: bool = False) -> Tensor:
        return torch.zeros_like(x)

    x_t, _ = lift(silent, x_0, path, chosen, chunk=1, noise=lambda rows: noise)
    expected = x_0.double()
    for k, (here, there) in enumerate(zip(path[0].levels, path[0].levels[1:], strict=False)):
        variance = here.noise**2 / there.noise**2 * (1 - there.signal**2 / here.signal**2)
        expected = expected * there.signal / here.signal + 0.1 * variance**0.5 * noise[k]
    assert torch.allclose(x_t.double(), expected, atol=1e-5)


def test_noise_source_is_diffusion_dpo() -> None:
    chosen = loading.from_dict({"objective": {"name": "dpo"}}).inversion
    assert chosen.source == "noise"
    x_0, tau = latents(), latents() + 1
    (x_t,) = forward_noise(x_0, tau[None], paths(chosen))
    for i, t in enumerate(TIMES):
        level = SCHEDULE.level(t)
        assert torch.allclose(x_t[i], level.signal * x_0[i] + level.noise * tau[i], atol=1e-5)


def test_unsorted_paths_are_our_bug_and_said_so() -> None:
    with pytest.raises(ValueError, match="deepest first"):
        active_counts(paths(settings(), (57, 999)))


# --- solvers --------------------------------------------------------------------------------------------------


def angle_weight(here: Level, there: Level, other: Level) -> float:
    """The mean over sigma, by quadrature, of what is linear in atan(sigma), 0 at ``here`` and 1 at ``other``."""
    nodes, weights = np.polynomial.legendre.leggauss(200)
    sigmas = here.sigma + (there.sigma - here.sigma) * (nodes + 1) / 2
    start = np.arctan(here.sigma)
    return float((weights * (np.arctan(sigmas) - start)).sum() / 2 / (np.arctan(other.sigma) - start))


def by_hand(solver: str, path: NoisePath, x_0: Tensor, angle: bool) -> Tensor:
    """A solver in y = x / signal and float64, written as its textbook has it; returns x at the last level."""
    y, before, level_before = x_0.double() / path.levels[0].signal, None, path.levels[0]
    for here, there in zip(path.levels, path.levels[1:], strict=False):
        h = there.sigma - here.sigma
        share = angle_weight(here, there, there) if angle or solver == "ab2" else 0.5

        def slope(y: Tensor, level=here) -> Tensor:
            return network(y * level.signal, torch.tensor([level.timestep]))

        first = before if solver == "pec" and before is not None else slope(y)
        if solver == "ab2" and before is not None:
            share = angle_weight(here, there, level_before)
            estimate, before = (1 - share) * first + share * before, first
        else:
            last = slope(y + h * first, there)
            estimate, before = (1 - share) * first + share * last, first if solver == "ab2" else last
        y, level_before = y + h * estimate, here
    return y * path.levels[-1].signal


@pytest.mark.parametrize("solver", ["heun", "ab2", "pec"])
@pytest.mark.parametrize("spacing", ["uniform", "sigma"])
@pytest.mark.parametrize("angle", [False, True])
def test_solvers_agree_with_their_textbooks(solver: str, spacing: str, angle: bool) -> None:
    if solver == "ab2" and angle:
        pytest.skip("ab2 has one estimate a step, weighted in the angle anyway")
    chosen = settings(solver=solver, spacing=spacing, **({"average": "angle"} if angle else {}))
    x_0 = latents()
    x_t, tau = lift(network, x_0, paths(chosen), chosen, chunk=4)
    for i, path in enumerate(paths(chosen)):
        x = by_hand(solver, path, x_0[i : i + 1], angle)
        target = (x - path.final_level.signal * x_0[i].double()) / path.final_level.noise
        assert (x_t[i] - x[0]).norm() / x.norm() < 1e-5
        assert (tau[i] - target[0]).norm() / target.norm() < 2e-4


@pytest.mark.parametrize("solver", ["ddim", "renoise", "heun", "ab2", "pec"])
def test_solvers_make_the_calls_they_promise_in_any_chunks(solver: str) -> None:
    chosen, counted = settings(solver=solver), []

    def eps(x: Tensor, time: Tensor, *, refinement: bool = False) -> Tensor:
        counted.append((len(x), refinement))
        return network(x, time)

    whole = lift(eps, latents(), paths(chosen), chosen, chunk=len(TIMES))
    assert sum(n for n, _ in counted) == sum(network_calls(p.depth, chosen) for p in paths(chosen))
    twice = sum(n for n, refinement in counted if refinement)
    moves = sum(p.depth for p in paths(chosen))
    # calls that follow one at nearly the same x: none, one a step, or the first step's
    assert twice == {"ddim": 0, "ab2": len(TIMES), "renoise": moves, "heun": moves, "pec": len(TIMES)}[solver]
    parts = lift(network, latents(), paths(chosen), chosen, chunk=2, active=[len(TIMES)] * 12)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_second_order_solvers_beat_ddim_at_equal_calls() -> None:
    """Data N(0, v), told the true times: pec and heun against ddim with as many calls."""
    exact_of = SCHEDULE.level(900)
    x_0 = latents(1)
    exact = x_0 * (exact_of.signal**2 + exact_of.noise**2 / 0.25) ** 0.5

    def error(**values: object) -> float:
        chosen = settings(**values)
        return float((lift(gaussian_eps, x_0, paths(chosen, (900,)), chosen, chunk=1)[0] - exact).norm() / exact.norm())

    assert error(solver="heun", steps=10) < 0.5 * error(solver="ddim", steps=20)
    assert error(solver="pec", steps=20) < 0.5 * error(solver="ddim", steps=20)


@pytest.mark.parametrize("time", [130, 433, 999])
def test_an_even_grid_comes_as_near_to_the_exact_flow_with_the_same_calls(time: int) -> None:
    """Data N(0, v), the paper's ReNoise in 10 steps."""
    level, x_0 = SCHEDULE.level(time), latents(1)
    exact = x_0 * (level.signal**2 + level.noise**2 / 0.25) ** 0.5
    errors, depths = [], []
    for grid in ("even", "anchored"):
        chosen = settings(steps=10, grid=grid)
        (path,) = paths(chosen, (time,))
        x_t = lift(gaussian_eps, x_0, [path], chosen, chunk=1)[0]
        errors.append(float((x_t - exact).norm() / exact.norm()))
        depths.append(path.depth)
    assert depths[0] == depths[1]
    assert errors[0] < 0.01 and errors[0] < 1.5 * errors[1]


def path_of(steps: int) -> NoisePath:
    """A uniform grid in t of SDXL's schedule, continued to t = 0, where a latent is clean; timesteps number levels."""
    logs = np.log(np.concatenate([[1.0], SCHEDULE.alphas_cumprod]))
    alphas = np.exp(np.interp(np.linspace(0, 900, steps + 1), np.arange(1001), logs))
    levels = [Level(k * 1000 // steps, a**0.5, (1 - a) ** 0.5) for k, a in enumerate(alphas)]
    return NoisePath(tuple(levels), (LandingPoint(steps, levels[-1]),))


@pytest.mark.parametrize(
    ("values", "order"),
    [
        ({"solver": "ddim"}, 1),
        ({"solver": "renoise"}, 1),
        ({"solver": "renoise", "average": "last"}, 1),
        ({"solver": "renoise", "average": "mean"}, 2),
        ({"solver": "renoise", "average": "mean", "renoise_steps": 2}, 1),
        ({"solver": "heun"}, 2),
        ({"solver": "ab2"}, 2),
        ({"solver": "pec"}, 2),
        ({"solver": "renoise", "average": "angle"}, 2),
        ({"solver": "pec", "average": "angle"}, 2),
    ],
    ids=[
        "ddim",
        "renoise",
        "renoise-last",
        "renoise-mean",
        "renoise-mean-twice",
        "heun",
        "ab2",
        "pec",
        "renoise-angle",
        "pec-angle",
    ],
)
def test_each_solver_has_its_documented_order(values: dict[str, Any], order: int) -> None:
    """Data N(0, v), whose exact noise prediction and exact flow x_0 sqrt(signal^2 + noise^2 / v) are known."""
    variance, x_0, chosen = 0.25, latents(1), settings(**values)

    def error(steps: int) -> float:
        path = path_of(steps)
        of = {level.timestep: level for level in path.levels}

        def exact_eps(x: Tensor, timesteps: Tensor, *, refinement: bool = False) -> Tensor:
            level = of[int(timesteps[0, 0])]
            return level.noise * x / (level.signal**2 * variance + level.noise**2)

        end = path.final_level
        wanted = x_0 * (end.signal**2 + end.noise**2 / variance) ** 0.5
        return float((lift(exact_eps, x_0, [path], chosen, chunk=1)[0] - wanted).norm() / wanted.norm())

    # ab2 approaches its order slowly, by the singular start of sigma: 1.48 at 50 steps, 1.69 at 200
    steps, within = (200, 0.35) if values["solver"] == "ab2" else (300 if order == 1 else 50, 0.2)
    assert math.log2(error(steps) / error(2 * steps)) == pytest.approx(order, abs=within)


# --- several landings -----------------------------------------------------------------------------------------


def test_landings_of_a_trajectory_are_its_states_on_the_way() -> None:
    """Each landing equals the end of a path with the same levels up to there."""
    chosen = loading.from_dict({"batch": {"pairs_per_step": 9}, "inversion": {"per_trajectory": 3}}).inversion
    times = [(50, 433, 999), (101, 250, 801), (0, 0, 57)]
    mine = sorted((SCHEDULE.path(t, chosen) for t in times), key=lambda p: -p.depth)
    x_0 = latents(3)
    x_t, tau = invert(lambda rows: network, x_0, mine, chosen, chunk=2)
    assert x_t.shape == (3, *x_0.shape)
    assert torch.allclose(forward_noise(x_0, tau, mine), x_t, atol=2e-5)
    for i, path in enumerate(mine):
        for m, landing in enumerate(path.landings):
            short = NoisePath(path.levels[: landing.step + 1], (landing,))
            alone = invert(lambda rows: network, x_0[i : i + 1], [short], settings(steps=10), chunk=1)
            assert torch.equal(x_t[m, i], alone[0][0, 0]) and torch.equal(tau[m, i], alone[1][0, 0])
            consistent = landing.level.signal * x_0[i] + landing.level.noise * tau[m, i]
            assert torch.allclose(x_t[m, i], consistent, atol=2e-5)


def test_a_batchs_coefficients_reach_the_device_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    from smpo_fast.method import coefficients

    copies = []
    monkeypatch.setattr(coefficients, "to_device", lambda t, device: copies.append(t.shape) or t.to(device))
    chosen = settings()
    invert(lambda rows: network, latents(), paths(chosen), chosen, chunk=2)
    assert len(copies) == 1
