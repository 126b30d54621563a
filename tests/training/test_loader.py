"""The order of pairs and their draws: functions of (seed, position), the same for any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from smpo_fast.common.errors import UserError
from smpo_fast.common.runtime import World, rng, uniform
from smpo_fast.config import loading
from smpo_fast.config.schema import Config
from smpo_fast.training.loader import Loader, coarse_normals, normal_quantiles

PAIRS, SHAPE = 37, (4, 3, 3)


class FakeCache:
    """Pairs whose latents carry their row number, in buckets of the given sizes (default: one)."""

    def __init__(self, *, std: float = 0.0, buckets: tuple[int, ...] = (PAIRS,)) -> None:
        pairs = sum(buckets)
        self.rows = np.arange(pairs) + 1000
        self.rewards = np.stack([np.arange(pairs) % 5, np.full(pairs, 2)], 1).astype(np.float64)
        self.labels = np.full(pairs, np.nan)
        self.prompt_index = np.arange(pairs) + 1
        self.std = std
        self.pixels = np.array([(64, 64 + 8 * kind) for kind in range(len(buckets))])
        self.shapes = np.random.default_rng(0).permutation(np.repeat(np.arange(len(buckets)), buckets))
        cut = np.arange(pairs)[:, None] * 10 + np.arange(2)
        self.frames = np.stack([cut + 100, cut + 200, cut % 7, cut % 5, cut % 3], 2)

    def moments(self, index: np.ndarray, flips: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        kinds = set(self.shapes[index].tolist())
        assert len(kinds) == 1, "pairs of several shapes at a time"
        value = torch.from_numpy(np.stack([index * 2.0, index * 2.0 + 1], 1) + 10_000 * flips).float()
        shape = (*SHAPE[:2], SHAPE[2] + kinds.pop())
        mean = value[:, :, None, None, None].expand(len(index), 2, *shape).clone()
        return mean, torch.full_like(mean, self.std)

    def prompts(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        numbers = torch.tensor(indices).float()
        return numbers[:, None, None].expand(-1, 5, 6), numbers[:, None].expand(-1, 7)


def settings(pairs_per_step: int = 12, **data: object) -> Config:
    given = {"prompt_dropout": 0.0, "flip": False, "resolution": 64, **data}
    return loading.from_dict({"data": given, "batch": {"pairs_per_step": pairs_per_step}, "run": {"seed": 5}})


def loader(rank: int = 0, size: int = 1, std: float = 0.0, **data: object) -> Loader:
    return Loader(FakeCache(std=std), settings(**data), World(rank, size))  # type: ignore[arg-type]


BUCKETS = (3, 50, 21)


def bucketed(rank: int = 0, size: int = 1, pairs_per_step: int = 24, **data: object) -> Loader:
    """Three shapes; 24 pairs a step are drawn in runs of 8."""
    cache = FakeCache(std=1.0, buckets=BUCKETS)
    given = {"flip": True, "prompt_dropout": 0.5, **data}
    return Loader(cache, settings(pairs_per_step, **given), World(rank, size))  # type: ignore[arg-type]


def test_an_epoch_visits_every_pair_once_in_an_order_of_its_own() -> None:
    whole = loader()
    ids = [i for step in range(40) for i in whole.step_batch(step)[0].ids]
    first, second = ids[:PAIRS], ids[PAIRS : 2 * PAIRS]
    assert sorted(first) == sorted(second) == list(range(1000, 1000 + PAIRS))
    assert first != second and first != sorted(first)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_together_see_what_one_rank_sees(size: int) -> None:
    options = {"std": 1.0, "flip": True, "prompt_dropout": 0.5}
    alone = loader(**options).step_batch(7)[0]
    for rank in range(size):
        mine, rows = loader(rank, size, **options).step_batch(7)[0], slice(rank, None, size)
        assert mine.ids == alone.ids[rows]
        assert torch.equal(mine.latents, alone.latents[rows]) and torch.equal(mine.weight, alone.weight[rows])
        assert torch.equal(mine.cond.prompt, alone.cond.prompt[rows])


def test_a_step_does_not_depend_on_the_steps_before_it() -> None:
    visited = loader(std=1.0)
    for step in range(9):
        visited.step_batch(step)
    assert torch.equal(visited.step_batch(9)[0].latents, loader(std=1.0).step_batch(9)[0].latents)


def test_the_winner_is_first_with_its_weight() -> None:
    window = loader().step_batch(0)[0]
    for row, latents, weight in zip(window.ids, window.latents, window.weight, strict=True):
        index = row - 1000
        reward = index % 5
        first_is_winner = latents[0, 0, 0, 0] == index * 2
        assert first_is_winner or reward <= 2
        assert (weight == 0) == (reward == 2)
        if reward > 2:
            assert first_is_winner


def test_flips_are_drawn_apart_for_winner_and_loser() -> None:
    flipped = torch.cat([loader(flip=True).step_batch(step)[0].latents[:, :, 0, 0, 0] >= 10_000 for step in range(50)])
    assert abs(flipped.float().mean() - 0.5) < 0.05
    both = (flipped[:, 0] == flipped[:, 1]).float().mean()
    assert abs(both - 0.5) < 0.07
    assert not (loader().step_batch(0)[0].latents >= 10_000).any()


def test_prompt_dropout_takes_the_empty_prompt_at_its_rate() -> None:
    rate = np.mean(
        [(loader(prompt_dropout=0.2).step_batch(s)[0].cond.prompt[:, 0, 0] == 0).float().mean() for s in range(100)]
    )
    assert abs(rate - 0.2) < 0.03
    assert (loader().step_batch(0)[0].cond.prompt > 0).all()


def test_prompt_dropout_drops_the_pooled_embedding_too() -> None:
    dropping = loader(prompt_dropout=0.5)
    for step in range(5):
        cond = dropping.step_batch(step)[0].cond
        assert cond.pooled is not None
        dropped = cond.prompt[:, 0, 0] == 0
        assert dropped.any() and not dropped.all()
        assert torch.equal(cond.pooled[:, 0], cond.prompt[:, 0, 0])


def test_vae_sample_has_the_posteriors_moments() -> None:
    noise = torch.cat([loader(std=2.0).step_batch(s)[0].latents - loader().step_batch(s)[0].latents for s in range(20)])
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 2.0) < 0.05


def test_time_ids_say_what_the_recipe_says() -> None:
    assert loader().step_batch(0)[0].cond.time_ids.tolist()[0] == [64, 64, 0, 0, 64, 64]
    shapes = [pairs.cond.time_ids.tolist()[0] for step in range(9) for pairs in bucketed().step_batch(step)]
    assert {tuple(ids) for ids in shapes} == {(64, 64 + 8 * k, 0, 0, 64, 64 + 8 * k) for k in range(3)}


def test_original_sizes_belong_to_their_images() -> None:
    """Winner first as the latents are, and the mirrored image has on its left what was cut on the right."""
    loaded = bucketed(conditioning="original")
    frames, seen = loaded.cache.frames, set()
    for step in range(6):
        for pairs in loaded.step_batch(step):
            assert pairs.cond.time_ids.shape == (len(pairs), 2, 6)
            for row, ids in zip(pairs.ids, pairs.cond.time_ids, strict=True):
                index = row - 1000
                first = int(loaded.labels.winner[index])
                for place, image in enumerate((first, 1 - first)):
                    height, width, top, left, right = frames[index, image]
                    kind = loaded.cache.shapes[index]
                    sides = [[height, width, top, side, 64, 64 + 8 * kind] for side in (left, right)]
                    assert ids[place].tolist() in sides
                    seen.add(sides.index(ids[place].tolist()) if left != right else None)
    assert {0, 1} <= seen


def test_mirrored_images_have_mirrored_crops() -> None:
    cache = FakeCache()
    cache.frames[:] = [1, 1, 0, 7, 8]
    loaded = Loader(cache, settings(flip=True, conditioning="original"), World())  # type: ignore[arg-type]
    for step in range(5):
        pairs = loaded.step_batch(step)[0]
        assert torch.equal(pairs.latents[:, :, 0, 0, 0] >= 10_000, pairs.cond.time_ids[:, :, 3] == 8)


# --- buckets --------------------------------------------------------------------------------------------------------


def test_a_step_has_an_entry_for_each_shape_with_places_ascending() -> None:
    whole = bucketed()
    for step in range(10):
        window = whole.step_batch(step)
        shapes = [pairs.latents.shape[2:] for pairs in window]
        assert shapes == sorted(set(shapes))
        assert all(pairs.places == tuple(sorted(pairs.places)) for pairs in window)
        assert sorted(place for pairs in window for place in pairs.places) == list(range(24))
        assert all(len(pairs) % 8 == 0 for pairs in window)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_ranks_have_equal_shapes_at_equal_places_and_together_what_one_has(size: int) -> None:
    for step in (0, 5):
        alone = bucketed().step_batch(step)
        for rank in range(size):
            mine = bucketed(rank, size).step_batch(step)
            assert len(mine) == len(alone)
            for a, b in zip(alone, mine, strict=True):
                here = [i for i, place in enumerate(a.places) if place % size == rank]
                assert b.places == tuple(a.places[i] // size for i in here)
                assert b.ids == tuple(a.ids[i] for i in here)
                assert torch.equal(b.latents, a.latents[here]) and torch.equal(b.weight, a.weight[here])
                assert torch.equal(b.cond.prompt, a.cond.prompt[here])


def test_an_epoch_visits_every_pair_and_few_of_them_again(capsys: pytest.CaptureFixture[str]) -> None:
    whole = bucketed()
    assert "11 runs of 8 pairs of one shape; 14 of its 88 visits fill up runs" in capsys.readouterr().out
    assert (len(whole), whole.order.repeats) == (8 + 56 + 24, 5 + 6 + 3)
    positions = np.arange(3 * len(whole))
    visits = whole.order.at(positions).reshape(3, -1)
    for epoch in visits:
        times = np.bincount(epoch, minlength=74)
        assert times.min() == 1 and times.max() == 3  # 8 visits for the 3 pairs of the smallest bucket
        assert times.sum() - 74 == whole.order.repeats
    assert (visits[0] != visits[1]).any()
    assert whole.order.visited(40).tolist() == sorted(set(visits[0, :40].tolist()))
    assert len(whole.order.visited(88)) == 74


def test_ranks_that_do_not_divide_the_runs_are_refused() -> None:
    with pytest.raises(UserError, match="24 pairs a step are drawn in runs of 8 pairs .* among 3 ranks"):
        bucketed(0, 3)
    loader(0, 3)  # without buckets any number of ranks that divides the step will do


def test_the_vaes_normals_are_normal_to_four_digits() -> None:
    drawn = coarse_normals(rng(0, "vae", 0), (2, 4, 128, 127)).double()
    assert drawn.shape == (2, 4, 128, 127)
    assert abs(drawn.mean()) < 0.01 and abs(drawn.std() - 1) < 0.01
    quantiles = normal_quantiles().double()
    assert len(quantiles) == 1 << 16 and (quantiles.diff() > 0).all()
    assert torch.allclose(quantiles, -quantiles.flip(0), atol=1e-6)
    for power, moment in ((2, 1), (4, 3), (6, 15)):
        assert abs(quantiles.pow(power).mean() / moment - 1) < 1e-2
    assert (quantiles.pow(2).mean() - 1).abs() < 1e-4
    below = (
        (drawn[None] < torch.tensor([-2.0, -1.0, 0.5]).double()[:, None, None, None, None]).double().mean((1, 2, 3, 4))
    )
    assert torch.allclose(below, torch.special.ndtr(torch.tensor([-2.0, -1.0, 0.5]).double()), atol=4e-3)


def test_normals_are_functions_of_position() -> None:
    whole = loader().normals(3, "noise", (2, 2), range(12))
    assert torch.equal(loader(1, 2).normals(3, "noise", (2, 2), range(6)), whole[1::2])
    assert torch.equal(loader().normals(3, "noise", (2, 2), [4, 7]), whole[[4, 7]])
    assert not torch.equal(whole, loader().normals(3, "inversion", (2, 2), range(12)))


def test_labels_without_a_usable_pair_are_refused() -> None:
    empty = FakeCache()
    empty.rewards[:] = np.nan
    with pytest.raises(UserError):
        Loader(empty, settings(), World())  # type: ignore[arg-type]


def test_random_numbers_are_pinned() -> None:
    """A change here changes every run: it needs a note in the changelog."""
    assert uniform(0, "timestep", 0) == 0.38804459386749546
    assert coarse_normals(rng(0, "vae", 3), (2, 3)).tolist() == [
        [0.13741686940193176, -1.3159624338150024, -0.1845373660326004],
        [0.5715724229812622, 0.3777555823326111, 0.2294003814458847],
    ]
    assert rng(7, "vae", 3).standard_normal(2).tolist() == [0.7855567804307356, 0.3469037674265875]
    draws = {rng(*key).random() for key in ((0, "a", 1), (0, "a", 2), (0, "b", 1), (1, "a", 1), (0, "a", 1, 0))}
    assert len(draws) == 5
