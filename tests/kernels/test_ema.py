"""ema: kernel and eager code agree to the bit; the closed form; slices; stochastic rounding."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers.numerics import draw
from torch import Tensor

from smpo_fast.kernels import ema
from smpo_fast.kernels.ema import ema_update, ema_update_reference

DTYPES = (torch.float32, torch.bfloat16)
SEED = 2**62 + 2**31 + 3
# slices of parameters as elements and the first one's index: aligned ones, odd ones, many programs, none
SLICES = [(64, 0), (37, 0), (3, 5), (4096, 8), (4097, 2**40 + 2), (8192 + 48, 16), (0, 0), (1, 3)]
BOTH = pytest.mark.parametrize("update", [ema_update, ema_update_reference], ids=["op", "eager"])


def follow(
    update: Callable[..., None], dtype: torch.dtype, weight_dtype: torch.dtype, device: Any, slices: Any = SLICES
) -> list[Tensor]:
    """The averages of some slices after three updates towards changing weights."""
    averages = [draw(n, seed=n, dtype=dtype, device=device) for n, _ in slices]
    for step in range(3):
        weights = [draw(n, seed=n + step + 1, dtype=weight_dtype, device=device) for n, _ in slices]
        seeds = [SEED + i for i in range(len(slices))]
        update(averages, weights, decay=0.9 + 0.03 * step, step=step, seeds=seeds, offsets=[o for _, o in slices])
    return averages


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_and_eager_code_agree_in_every_bit(
    dtype: torch.dtype, weight_dtype: torch.dtype, device: torch.device
) -> None:
    found, wanted = (follow(f, dtype, weight_dtype, device) for f in (ema_update, ema_update_reference))
    for (n, _), a, b in zip(SLICES, found, wanted, strict=True):
        assert torch.equal(a, b), n
        assert not n or not torch.equal(a, draw(n, seed=n, dtype=dtype, device=device))


def test_one_launch_for_aligned_slices_and_one_for_the_others(device: torch.device, launches: list[str]) -> None:
    follow(ema_update, torch.bfloat16, torch.float32, device, [(64, 0), (8192, 16), (4096, 0)])
    assert launches == ["_update_kernel"] * 3, "one for each update"
    launches.clear()
    follow(ema_update, torch.bfloat16, torch.float32, device)
    assert launches == ["_update_kernel"] * 6


@BOTH
def test_it_is_the_closed_form(update: Callable[..., None], device: torch.device) -> None:
    """With a constant decay d, after the weights w_1 ... w_k, from w_0: d^k w_0 + sum of (1 - d) d^(k - i) w_i."""
    decay, weights = 0.9, [draw(1000, seed=s, device=device) for s in range(20)]
    average = weights[0].clone()
    for step, weight in enumerate(weights[1:]):
        update([average], [weight], decay=decay, step=step, seeds=[0], offsets=[0])
    last = len(weights) - 1
    wanted = decay**last * weights[0].double()
    wanted += sum((1 - decay) * decay ** (last - i) * w.double() for i, w in enumerate(weights) if i)
    assert (average - wanted).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@BOTH
def test_cutting_changes_no_bit(update: Callable[..., None], dtype: torch.dtype, device: torch.device) -> None:
    n = 9000
    whole, weight = draw(n, seed=1, dtype=dtype, device=device), draw(n, seed=2, device=device)
    edges = [0, 1, 6, 4096, 4100, 8195, n]
    parts, weights = ([x[a:b].clone() for a, b in pairwise(edges)] for x in (whole, weight))
    for step in range(2):
        update([whole], [weight], decay=0.9, step=step, seeds=[7], offsets=[0])
        update(parts, weights, decay=0.9, step=step, seeds=[7] * len(parts), offsets=edges[:-1])
    assert torch.equal(torch.cat(parts), whole)


@BOTH
def test_bf16_keeps_the_mean_where_rounding_to_nearest_does_not_move(
    update: Callable[..., None], device: torch.device
) -> None:
    """Each update is a thousandth of 10 spacings; all elements and steps are rounded with words of their own."""
    n, steps, decay, spacing = 40_000, 30, 0.999, 2**-7
    average = torch.ones(n, dtype=torch.bfloat16, device=device)
    weight = torch.full((n,), 1 + 10 * spacing, device=device)
    nearest = (weight - 1) * (1 - decay) + 1
    assert nearest.bfloat16().eq(1).all()
    for step in range(steps):
        update([average], [weight], decay=decay, step=step, seeds=[3], offsets=[0])
    moved = (average.double() - 1) / spacing
    expected = 10 * (1 - decay**steps)
    assert moved.mean().item() == pytest.approx(expected, abs=4.5 * moved.std().item() / n**0.5)
    assert moved.var().item() == pytest.approx(steps * 0.01 * 0.99, rel=0.1), "the steps are independent of each other"


def test_rounding_errors_do_not_add_up() -> None:
    """An average at rest is one of the two neighbours of its weight, as after one stochastic rounding."""
    weight, decay, spacing = 1 + draw(2000, seed=1).abs().clamp(max=0.99), 0.9, 2**-7
    average = weight.bfloat16()
    for step in range(150):
        ema_update_reference([average], [weight], decay=decay, step=step, seeds=[1], offsets=[0])
    errors = (average.float() - weight) / spacing
    assert errors.abs().max() < 1 and errors.std().item() == pytest.approx(6**-0.5, rel=0.05)


@BOTH
def test_the_seed_and_the_step_decide_the_rounding(update: Callable[..., None], device: torch.device) -> None:
    weight, found = draw(2000, seed=2, device=device), []
    for step, seed in ((0, 7), (0, 7), (1, 7), (0, 8)):
        average = draw(2000, seed=1, dtype=torch.bfloat16, device=device)
        update([average], [weight], decay=0.99, step=step, seeds=[seed], offsets=[0])
        found.append(average)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2]) and not torch.equal(found[0], found[3])


def test_wrong_arguments_are_named(device: torch.device) -> None:
    x, more = torch.zeros(8, device=device), {"decay": 0.9, "step": 0, "seeds": [0], "offsets": [0]}
    ema_update([], [], decay=0.9, step=0, seeds=[], offsets=[])
    for averages, weights, words in (
        ([x], [x[:4]], "found \\(8,\\) and \\(4,\\)"),
        ([x[::2]], [x[::2]], "contiguous"),
        ([x.half()], [x], "averages are fp32 or bf16"),
        ([x, x], [x, x.bfloat16()], "all weights have one dtype"),
        ([x], [x.to("meta")], "on one device"),
    ):
        with pytest.raises(ValueError, match=words):
            ema_update(averages, weights, **more)


def test_the_tile_changes_no_bit(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = follow(ema_update, torch.bfloat16, torch.float32, device)
    monkeypatch.setattr(ema, "TILE", 1024)
    monkeypatch.setattr(ema, "CPU_CHUNK", 1000)
    for update in (ema_update, ema_update_reference):
        found = follow(update, torch.bfloat16, torch.float32, device)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
