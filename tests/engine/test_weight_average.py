"""The moving average of the weights: its formula, what it follows, and that cuts of the weights change nothing."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import toy
from torch import Tensor

from smpo_fast.common.runtime import World
from smpo_fast.config.schema import Config
from smpo_fast.engine import checkpoint, create
from smpo_fast.engine.checkpoint import Progress
from smpo_fast.engine.ema import WeightAverage, effective_decay
from smpo_fast.engine.optimizers import LocalSlice, whole_parameters
from smpo_fast.engine.shards import ParameterSlice

ALIGNED = "adamw8bit_aligned"


def followed(settings: Config, steps: int) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """The weights before the first step and after each one, and the average."""
    trained = toy.make(settings)
    weights = [trained.full_state()]
    for step in range(steps):
        toy.train(trained, settings, [step])
        weights.append(trained.full_state())
    return weights, trained.full_average()


def test_with_a_constant_decay_it_is_the_closed_form() -> None:
    """d^k w_0 + sum of (1 - d) d^(k - i) w_i."""
    decay, steps = 0.8, 6
    weights, average = followed(toy.settings(ema=decay, ema_warmup=False), steps)
    for name, found in average.items():
        wanted = decay**steps * weights[0][name].double()
        wanted += sum((1 - decay) * decay ** (steps - i) * weights[i][name].double() for i in range(1, steps + 1))
        assert torch.allclose(found.double(), wanted, rtol=1e-6, atol=1e-8)
        assert not torch.equal(found, weights[-1][name])
    assert average.keys() == weights[0].keys()


@pytest.mark.parametrize(
    "optimizer, precision, optim",
    [
        ("adamw", "fp32", {}),
        ("adamw", "bf16", {}),
        ("lion8bit", "bf16-autocast", {}),
        ("adafactor", "bf16", {}),
        (ALIGNED, "bf16", {"master": "none", "offload": "states"}),
    ],
)
def test_it_follows_what_the_optimizer_updates(optimizer: str, precision: str, optim: dict[str, Any]) -> None:
    """In fp64, with the warm-up; the masters of half-precision weights, which move by less than these can show."""
    weights, average = followed(toy.settings(optimizer, precision, ema=0.3, **optim), 5)
    for name, found in average.items():
        wanted = weights[0][name].double()
        for updates, after in enumerate(weights[1:]):
            decay = effective_decay(0.3, updates, warmup=True)
            wanted = decay * wanted + (1 - decay) * after[name].double()
        assert torch.allclose(found.double(), wanted, rtol=1e-6, atol=1e-8)


def test_the_warm_up() -> None:
    """n / (9 + n) in the n-th step, so that the weights after step i count by i (i + 1) ... (i + 7), about i^8."""
    assert [effective_decay(0.999, n, warmup=True) for n in range(2)] == [0.1, 2 / 11]
    assert effective_decay(0.999, 10**5, warmup=True) == effective_decay(0.999, 0, warmup=False) == 0.999
    share, shares = 1.0, []
    for n in range(2000):
        decay = effective_decay(1.0, n, warmup=True)
        share, shares = share * decay, [s * decay for s in shares] + [1 - decay]
        if n == 9:
            assert share < 1.1e-5, "of the first weights"
    steps = torch.arange(1.0, 2001.0).double()
    profile = torch.tensor(shares).double()
    assert profile.sum() + share == pytest.approx(1.0)
    mean = (profile * steps).sum()
    assert math.sqrt((profile * (steps - mean).square()).sum()) / 2000 == pytest.approx(0.09, abs=0.001)
    assert (profile[1999] / profile[999]).item() == pytest.approx(2**8, rel=0.03)


def test_without_a_decay_there_is_none() -> None:
    weights, average = followed(toy.settings(), 1)
    assert weights and average == {}


def test_the_average_changes_nothing_of_the_training() -> None:
    assert toy.same(followed(toy.settings(ema=0.9), 3)[0][-1], followed(toy.settings(), 3)[0][-1])


def test_weights_that_are_not_trained_have_none() -> None:
    """As of a base with adapters."""
    unet = toy.network()
    unet[0].requires_grad_(False)
    settings = toy.settings(ema=0.9)
    trained = create.make_engine(unet, settings, World(), "fp32", None)
    assert trained.full_average().keys() == trained.full_state().keys() - {"0.weight", "0.bias"}


def test_bf16_averages_are_near_fp32_ones() -> None:
    """Within a few bf16 spacings, 2^-8 of a weight, and right on the mean."""
    weights, exact = followed(toy.settings(ema=0.9), 8)
    _, rounded = followed(toy.settings(ema=0.9, ema_dtype="bf16-sr"), 8)
    errors = [(rounded[name] - exact[name]) / exact[name].abs().clamp(min=1e-3) for name in exact]
    everything = torch.cat([e.flatten() for e in errors])
    assert 0 < everything.abs().max() < 4 * 2**-8
    assert everything.mean().abs() < 4.5 * everything.std() / math.sqrt(everything.numel())
    assert all(torch.equal(t, t.bfloat16().float()) for t in rounded.values())


# --- slices ---------------------------------------------------------------------------------------------------


def averaged(held: list[LocalSlice], drift: Tensor, dtype: str) -> WeightAverage:
    """After three steps, each of which adds the drift of the parameter "w" to the weights."""
    made = WeightAverage(held, toy.settings(ema=0.9, ema_dtype=dtype))
    for _ in range(3):
        for local in held:
            values, where = local.values(), local.param_slice
            values += drift[where.offset : where.end].view(values.shape)
        made.update()
    return made


@pytest.mark.parametrize("dtype", ["fp32", "bf16-sr"])
def test_cuts_and_neighbours_change_no_bit(dtype: str) -> None:
    """Slices of a parameter in flat tensors with something else before them, as under ZeRO."""
    total, edges = 5000, [0, 3, 700, 701, 4096, 5000]
    g = torch.Generator().manual_seed(0)
    weights, drift = torch.randn(total, generator=g), torch.randn(total, generator=g) * 1e-3
    whole = averaged(whole_parameters({"w": weights.clone()}), drift, dtype)
    held = [
        LocalSlice(ParameterSlice("w", a, b - a), total, torch.cat([torch.ones(5), weights[a:b]]), 5)
        for a, b in pairwise(edges)
    ]
    parts = averaged(held, drift, dtype)
    shapes = {"w": torch.Size([50, 100])}
    assert torch.equal(*(made.gathered(shapes, World(), cut=False)["w"] for made in (whole, parts)))


@pytest.mark.parametrize("dtype", ["fp32", "bf16-sr"])
def test_the_memory_format_changes_no_bit(dtype: str) -> None:
    g = torch.Generator().manual_seed(0)
    weights, drift = torch.randn(6, 5, 3, 3, generator=g), torch.randn(270, generator=g) * 1e-3
    found = []
    for form in (torch.contiguous_format, torch.channels_last):
        held = whole_parameters({"w": weights.clone().to(memory_format=form)})
        made = averaged(held, drift, dtype)
        found.append(made.gathered({"w": weights.shape}, World(), cut=False)["w"])
    assert torch.equal(*found)


def test_every_parameter_is_rounded_with_random_numbers_of_its_own() -> None:
    weights, drift = torch.ones(500), torch.full((500,), 1e-3)
    found = []
    for name in ("a", "b"):
        made = averaged(whole_parameters({name: weights.clone()}), drift, "bf16-sr")
        found.append(made.gathered({name: weights.shape}, World(), cut=False)[name])
    assert not torch.equal(*found)


# --- checkpoints ----------------------------------------------------------------------------------------------


def test_a_checkpoint_without_averages_begins_them(tmp_path: Path) -> None:
    """As if the run had begun there: the weights of its first steps are not known."""
    before, after = toy.settings(), toy.settings(ema=0.9)
    trained = toy.make(before)
    toy.train(trained, before, range(2))
    checkpoint.save(tmp_path, trained, Progress(2), World(), {}, keep=1)
    resumed = toy.make(after)
    assert checkpoint.restore_latest(tmp_path, resumed, World(), {}) == Progress(2)
    assert toy.same(resumed.full_average(), trained.full_state())
    toy.train(resumed, after, [2])
    start, end = trained.full_state(), resumed.full_state()
    wanted = {name: 0.1 * start[name] + 0.9 * end[name] for name in start}
    assert toy.distance(resumed.full_average(), wanted) < 1e-6
