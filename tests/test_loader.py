"""The order of pairs and their draws: functions of (seed, position), the same for any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from smpo_fast import config
from smpo_fast.config import Config, SettingsError
from smpo_fast.loader import Loader
from smpo_fast.runtime import World, rng, uniform

PAIRS, SHAPE = 37, (4, 3, 3)


class FakeCache:
    """Thirty-seven pairs whose latents carry their row number."""

    def __init__(self, *, std: float = 0.0) -> None:
        self.rows = np.arange(PAIRS) + 1000
        self.rewards = np.stack([np.arange(PAIRS) % 5, np.full(PAIRS, 2)], 1).astype(np.float64)
        self.labels = np.full(PAIRS, np.nan)
        self.prompt_index = np.arange(PAIRS) + 1
        self.std = std

    def moments(self, index: np.ndarray, flips: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        value = torch.from_numpy(np.stack([index * 2.0, index * 2.0 + 1], 1) + 10_000 * flips).float()
        mean = value[:, :, None, None, None].expand(len(index), 2, *SHAPE).clone()
        return mean, torch.full_like(mean, self.std)

    def prompts(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        numbers = torch.tensor(indices).float()
        return numbers[:, None, None].expand(-1, 5, 6), numbers[:, None].expand(-1, 7)


def settings(**data: object) -> Config:
    given = {"prompt_dropout": 0.0, "flip": False, "resolution": 64, **data}
    return config.from_dict({"data": given, "batch": {"pairs_per_step": 12}, "run": {"seed": 5}})


def loader(rank: int = 0, size: int = 1, std: float = 0.0, **data: object) -> Loader:
    return Loader(FakeCache(std=std), settings(**data), World(rank, size))  # type: ignore[arg-type]


def test_an_epoch_visits_every_pair_once_in_an_order_of_its_own() -> None:
    whole = loader()
    ids = [i for step in range(40) for i in whole.window(step)[0].ids]
    first, second = ids[:PAIRS], ids[PAIRS : 2 * PAIRS]
    assert sorted(first) == sorted(second) == list(range(1000, 1000 + PAIRS))
    assert first != second and first != sorted(first)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_together_see_what_one_rank_sees(size: int) -> None:
    options = {"std": 1.0, "flip": True, "prompt_dropout": 0.5}
    alone = loader(**options).window(7)[0]
    for rank in range(size):
        mine, rows = loader(rank, size, **options).window(7)[0], slice(rank, None, size)
        assert mine.ids == alone.ids[rows]
        assert torch.equal(mine.latents, alone.latents[rows]) and torch.equal(mine.weight, alone.weight[rows])
        assert torch.equal(mine.cond.prompt, alone.cond.prompt[rows])


def test_a_step_does_not_depend_on_the_steps_before_it() -> None:
    visited = loader(std=1.0)
    for step in range(9):
        visited.window(step)
    assert torch.equal(visited.window(9)[0].latents, loader(std=1.0).window(9)[0].latents)


def test_winner_stands_first_with_its_weight() -> None:
    window = loader().window(0)[0]
    for row, latents, weight in zip(window.ids, window.latents, window.weight, strict=True):
        index = row - 1000
        reward = index % 5
        first_is_winner = latents[0, 0, 0, 0] == index * 2
        assert first_is_winner or reward <= 2
        assert (weight == 0) == (reward == 2)
        if reward > 2:
            assert first_is_winner


def test_flips_are_drawn_apart_for_winner_and_loser() -> None:
    flipped = torch.cat([loader(flip=True).window(step)[0].latents[:, :, 0, 0, 0] >= 10_000 for step in range(50)])
    assert abs(flipped.float().mean() - 0.5) < 0.05
    both = (flipped[:, 0] == flipped[:, 1]).float().mean()
    assert abs(both - 0.5) < 0.07
    assert not (loader().window(0)[0].latents >= 10_000).any()


def test_prompt_dropout_takes_the_empty_prompt_at_its_rate() -> None:
    rate = np.mean(
        [(loader(prompt_dropout=0.2).window(s)[0].cond.prompt[:, 0, 0] == 0).float().mean() for s in range(100)]
    )
    assert abs(rate - 0.2) < 0.03
    assert (loader().window(0)[0].cond.prompt > 0).all()


def test_vae_sample_has_the_posteriors_moments() -> None:
    noise = torch.cat([loader(std=2.0).window(s)[0].latents - loader().window(s)[0].latents for s in range(20)])
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 2.0) < 0.05


def test_sdxl_time_ids() -> None:
    assert loader().window(0)[0].cond.time_ids.tolist()[0] == [64, 64, 0, 0, 64, 64]


def test_normals_are_functions_of_position() -> None:
    whole = loader().normals(3, "noise", (2, 2), range(12))
    assert torch.equal(loader(1, 2).normals(3, "noise", (2, 2), range(6)), whole[1::2])
    assert torch.equal(loader().normals(3, "noise", (2, 2), [4, 7]), whole[[4, 7]])
    assert not torch.equal(whole, loader().normals(3, "inversion", (2, 2), range(12)))


def test_no_usable_pair_is_said() -> None:
    empty = FakeCache()
    empty.rewards[:] = np.nan
    with pytest.raises(SettingsError):
        Loader(empty, settings(), World())  # type: ignore[arg-type]


def test_random_numbers_are_pinned() -> None:
    """A change here changes every run: it needs a note in the changelog."""
    assert uniform(0, "timestep", 0) == 0.38804459386749546
    assert rng(7, "vae", 3).standard_normal(2).tolist() == [0.7855567804307356, 0.3469037674265875]
    draws = {rng(*key).random() for key in ((0, "a", 1), (0, "a", 2), (0, "b", 1), (1, "a", 1), (0, "a", 1, 0))}
    assert len(draws) == 5
