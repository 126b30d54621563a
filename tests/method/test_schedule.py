"""Levels, paths and timesteps: host arithmetic that everything else relies on."""

from __future__ import annotations

import math

import numpy as np
import pytest
from diffusers import DDIMScheduler

from smpo_fast.common.errors import ModelError, UserError
from smpo_fast.config import loading
from smpo_fast.config.schema import Inversion
from smpo_fast.method.schedule import NoiseSchedule

SDXL = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}


def settings(**values: object) -> Inversion:
    return loading.from_dict({"inversion": values}).inversion


@pytest.fixture(scope="module")
def schedule() -> NoiseSchedule:
    return NoiseSchedule.from_config(SDXL)


def test_alphas_agree_with_diffusers(schedule: NoiseSchedule) -> None:
    theirs = DDIMScheduler(**SDXL).alphas_cumprod.double().numpy()
    assert np.abs(schedule.alphas_cumprod / theirs - 1).max() < 1e-5


def test_levels_preserve_variance(schedule: NoiseSchedule) -> None:
    for time in (0, 1, 500, 999):
        level = schedule.level(time)
        assert math.isclose(level.signal**2 + level.noise**2, 1.0, rel_tol=1e-12)
    assert schedule.level(-99)[1:] == schedule.level(0)[1:]


@pytest.mark.parametrize("time", [0, 1, 2, 99, 100, 101, 433, 999])
@pytest.mark.parametrize("steps", [1, 5, 10, 7])
def test_anchored_path_lands_on_t_in_ceil_steps(schedule: NoiseSchedule, time: int, steps: int) -> None:
    path = schedule.path(time, settings(steps=steps))
    times = [level.timestep for level in path.levels]
    assert times[-1] == time == path.final_level.timestep
    assert path.depth == max(1, math.ceil(time * steps / 1000))
    assert path.levels[0].sigma == 0.0
    assert all(a.sigma < b.sigma for a, b in zip(path.levels, path.levels[1:], strict=False))
    inner = np.diff(times[1:])
    assert ((inner >= 1000 // steps - 1) & (inner <= 1000 // steps + 1)).all(), "only the first step may be short"


@pytest.mark.parametrize("time", [0, 1, 2, 99, 100, 101, 433, 999])
@pytest.mark.parametrize("steps", [1, 5, 10, 7, 1000])
def test_an_even_path_has_as_many_steps_of_equal_length(schedule: NoiseSchedule, time: int, steps: int) -> None:
    path = schedule.path(time, settings(steps=steps, grid="even"))
    times = [level.timestep for level in path.levels]
    assert times[-1] == time == path.final_level.timestep
    assert path.depth == schedule.path(time, settings(steps=steps)).depth
    lengths = np.diff([0, *times[1:]])
    assert lengths.max() - lengths.min() <= 1
    assert all(a.sigma < b.sigma for a, b in zip(path.levels, path.levels[1:], strict=False))


def test_even_paths_reach_every_landing(schedule: NoiseSchedule) -> None:
    path = schedule.path((50, 433, 999), settings(steps=10, grid="even"))
    times = [level.timestep for level in path.levels]
    assert [times[landing.step] for landing in path.landings] == [50, 433, 999]
    assert times[2:6] == [146, 242, 337, 433]  # from 50 to 433 in four steps


def test_released_path_by_hand(schedule: NoiseSchedule) -> None:
    release = settings(fidelity="release", steps=10)

    def times(t: int) -> list[int]:
        return [level.timestep for level in schedule.path(t, release).levels]

    assert times(0) == [-99, 1]
    assert times(1) == [-99, 1]
    assert times(2) == [-99, 1, 101]
    assert times(101) == [-99, 1, 101]
    assert times(102) == [-99, 1, 101, 201]
    assert times(999) == [-99, 1, 101, 201, 301, 401, 501, 601, 701, 801, 901]
    assert schedule.path(433, release).final_level.timestep == 433 and times(433)[-1] == 501, (
        "the mismatch is the point"
    )


def test_mean_depth_of_the_release(schedule: NoiseSchedule) -> None:
    """Counted once by executing the pinned scheduler class: 6.382 of 10 steps, 3.79 of 5."""
    for steps, mean in ((10, 6.382), (5, 3.79)):
        release = settings(fidelity="release", steps=steps)
        depths = [schedule.path(t, release).depth for t in range(1000)]
        assert abs(np.mean(depths) - mean) < 0.01


def test_rows_of_the_method_are_options_of_their_own(schedule: NoiseSchedule) -> None:
    exact = schedule.path(433, settings(fidelity="release", landing="exact"))
    assert [x.timestep for x in exact.levels] == [-99, 1, 101, 201, 301, 401, 433]
    skipped = schedule.path(433, settings(fidelity="release", first_step="skip"))
    assert [x.timestep for x in skipped.levels] == [1, 101, 201, 301, 401, 501]
    assert skipped.levels[0].sigma == 0.0


def test_float16_schedule_has_the_known_error_at_zero() -> None:
    exact, rounded = (NoiseSchedule.from_config(SDXL, dtype).level(0).noise ** 2 for dtype in ("float64", "float16"))
    assert abs(rounded / exact - 1) == pytest.approx(0.149, abs=0.002)


@pytest.mark.parametrize("how", ["stratified", "independent"])
def test_timesteps_are_uniform_descending_and_a_function_of_step(schedule: NoiseSchedule, how: str) -> None:
    chosen = settings(timesteps=how)
    draws = [schedule.timesteps(64, chosen, 3, step) for step in range(200)]
    assert all(list(d) == sorted(d, reverse=True) for d in draws)
    assert draws[5] == schedule.timesteps(64, chosen, 3, 5)
    assert draws[5] != draws[6] and draws[5] != schedule.timesteps(64, chosen, 4, 5)
    pooled = np.concatenate(draws)
    assert pooled.min() == 0 and pooled.max() == 999
    histogram = np.histogram(pooled, bins=10, range=(0, 1000))[0] / len(pooled)
    assert np.abs(histogram - 0.1).max() < 0.01


def test_stratified_timesteps_give_each_stratum_its_share(schedule: NoiseSchedule) -> None:
    for step in range(20):
        times = np.array(schedule.timesteps(100, settings(), 0, step))
        assert (np.histogram(times, bins=10, range=(0, 1000))[0] == 10).all()


def test_on_grid_timesteps_have_no_mismatch(schedule: NoiseSchedule) -> None:
    chosen = settings(fidelity="release", landing="on-grid")
    for t in set(schedule.timesteps(500, chosen, 0, 0)):
        path = schedule.path(t, chosen)
        assert path.levels[-1] == path.final_level and (t - 1) % 100 == 0


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"beta_schedule": "sigmoid"}, "sigmoid.*supported: linear, scaled_linear, squaredcos_cap_v2"),
        ({**SDXL, "rescale_betas_zero_snr": True}, "rescale_betas_zero_snr.*should predict v"),
        ({"trained_betas": [0.1, 0.2]}, "should list 1000 numbers"),
        ({"trained_betas": [0.1, "x"], "num_train_timesteps": 2}, r"trained_betas\[1\] = 'x'"),
        ({"trained_betas": 0.1}, "should list 1000 numbers"),
    ],
)
def test_unknown_schedules_are_refused_by_name(given: dict, word: str) -> None:
    with pytest.raises(ModelError, match=word):
        NoiseSchedule.from_config(given)


@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
@pytest.mark.parametrize("steps", [5, 10, 1000])
def test_sigma_spacing_is_even_in_a_root_of_sigma(schedule: NoiseSchedule, rho: float, steps: int) -> None:
    chosen, uniform = settings(spacing="sigma", rho=rho, steps=steps), settings(steps=steps)
    for time in (999, 433, 57, 1, 0):
        path = schedule.path(time, chosen)
        assert path.depth == schedule.path(time, uniform).depth, "as many steps as the uniform grid"
        times = [level.timestep for level in path.levels]
        assert times[-1] == time and all(a < b for a, b in zip(times[1:], times[2:], strict=False))
    if steps == 5:
        roots = [level.sigma ** (1 / rho) for level in schedule.path(999, chosen).levels]
        even = np.linspace(roots[0], roots[-1], len(roots))
        inner = even > schedule.level(2).sigma ** (1 / rho)  # below, each step still has a timestep of its own
        assert inner.sum() >= 3 and np.abs(roots - even)[inner].max() < 0.03 * roots[-1]


def test_a_pairs_landings_spread_and_the_steps_stay_uniform(schedule: NoiseSchedule) -> None:
    chosen = settings(per_trajectory=4, steps=10)
    paths = schedule.paths(64, chosen, 0, 3)
    assert len(paths) == 16 and all(len(p.landings) == 4 for p in paths)
    assert sorted(x.level.timestep for p in paths for x in p.landings) == sorted(schedule.timesteps(64, chosen, 0, 3))
    assert [p.depth for p in paths] == sorted((p.depth for p in paths), reverse=True)
    for path in paths:
        times = [x.level.timestep for x in path.landings]
        assert np.diff(times).min() > 200 and path.landings[-1].step == path.depth
        assert [path.levels[x.step].timestep for x in path.landings] == times
    alone = sum(p.depth for p in schedule.paths(64, settings(steps=10), 0, 3))
    assert sum(p.depth for p in paths) < 0.5 * alone, "that is what it is for"


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"solver": "pec", "average": "last"}, "pec.*average"),
        ({"solver": "ab2", "noise": 0.1}, "ab2.*stale"),
        ({"fidelity": "release", "spacing": "sigma"}, "anchored"),
        ({"fidelity": "release", "per_trajectory": 2}, "anchored"),
        ({"source": "noise", "per_trajectory": 2}, "per_trajectory"),
        ({"grid": "even", "spacing": "sigma"}, "equal in t"),
        ({"grid": "even", "landing": "mismatch"}, "always land on t"),
        ({"grid": "even", "first_step": "keep"}, "below 0"),
        ({"store": "x"}, "store"),
    ],
)
def test_impossible_combinations_are_refused(given: dict, word: str) -> None:
    with pytest.raises(UserError, match=word):
        settings(**given)


def test_a_solvers_name_overrides_the_fidelity_but_not_the_user() -> None:
    assert settings(fidelity="release", solver="heun").renoise_time == "destination"
    assert settings(solver="ddim").renoise_steps == 0
    with pytest.raises(UserError, match="renoise_steps"):
        settings(solver="ddim", renoise_steps=2)
