"""Reading ahead: the same pairs in whatever order they are requested, and errors with the step that caused them."""

from __future__ import annotations

import threading

import pytest
import torch

from smpo_fast.method.batch import Conditioning, Pairs
from smpo_fast.training.prefetch import Prefetcher

CPU = torch.device("cpu")


def pairs_of(step: int) -> list[Pairs]:
    value = torch.full((2, 2, 4, 3, 3), float(step))
    return [Pairs((step, step), value, Conditioning(value[:, 0, 0]), value[:, 0, 0, 0, 0], (0, 1))]


def test_steps_in_order_backwards_and_again() -> None:
    fetched = []
    ahead = Prefetcher(lambda step: fetched.append(step) or pairs_of(step), CPU, steps=6)
    for step in (0, 1, 2, 4, 1, 5):
        (pairs,) = ahead(step)
        assert pairs.ids == (step, step) and (pairs.latents == step).all() and (pairs.cond.prompt == step).all()
    assert max(fetched) == 5, "nothing is fetched beyond the run"


def test_the_next_step_is_fetched_while_this_one_is_used() -> None:
    started = {step: threading.Event() for step in range(3)}

    def read(step: int) -> list[Pairs]:
        started[step].set()
        return pairs_of(step)

    ahead = Prefetcher(read, CPU, steps=3)
    ahead(0)
    assert started[1].wait(timeout=10) and not started[2].is_set()


def test_an_error_is_raised_when_its_step_is_requested() -> None:
    def read(step: int) -> list[Pairs]:
        if step == 1:
            raise ValueError("shard 7 is damaged")
        return pairs_of(step)

    ahead = Prefetcher(read, CPU, steps=3)
    assert ahead(0)[0].ids == (0, 0)
    with pytest.raises(ValueError, match="shard 7"):
        ahead(1)
    assert ahead(2)[0].ids == (2, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_copies_to_the_device_do_not_race_with_its_use() -> None:
    ahead = Prefetcher(pairs_of, torch.device("cuda", 0), steps=50)
    sums = [ahead(step)[0].latents.sum() for step in range(50)]
    assert torch.stack(sums).tolist() == [step * 144.0 for step in range(50)]
