"""adamw8bit: kernel and eager code agree to the bit; closeness to fp32; stochastic rounding; slicing; bf16 weights."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers.numerics import draw, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smpo_fast.kernels import adamw8bit
from smpo_fast.kernels._launch import INTERPRET
from smpo_fast.kernels._rounding import random_words
from smpo_fast.kernels.adamw8bit import (
    BLOCK,
    State,
    adamw8bit_block_max,
    adamw8bit_block_max_reference,
    adamw8bit_state,
    adamw8bit_step,
    adamw8bit_step_reference,
    blocks_touched,
)

HYPER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
BETAS = {"beta1": 0.9, "beta2": 0.999}
WEIGHTS = (torch.float32, torch.bfloat16)
BOTH = pytest.mark.parametrize("step", [adamw8bit_step, adamw8bit_step_reference], ids=["op", "eager"])


def gradients(n: int, steps: int, spread: float = 1.0, *, device: Any = "cpu") -> Iterator[Tensor]:
    """Noise around a mean, with a different magnitude for each element."""
    size = (draw(n, seed=0) * spread).exp() * 1e-3
    mean = draw(n, seed=1) * 0.2
    return ((size * (mean + draw(n, seed=10 + t))).to(device) for t in range(steps))


def follow(step: Callable[..., None], weight: Tensor, grads: Iterator[Tensor], **options: Any) -> tuple[Tensor, ...]:
    """Weight, codes and scales after all gradients."""
    weight, state = weight.clone(), adamw8bit_state(len(weight), weight.device, options.get("offset", 0))
    for t, grad in enumerate(grads, 1):
        step(weight, grad, *state, step=t, **{**HYPER, "seed": 7, **options})
    return weight, *state


# --- bits ------------------------------------------------------------------------------------------------------


def test_random_words_are_philox() -> None:
    """The published output for a counter and key of zeros; and every part of counter and key changes the output."""

    def words(element: int, step: int, seed: int) -> tuple[int, ...]:
        return tuple(random_words(4, element, step, seed, torch.device("cpu")).tolist())

    assert words(0, 0, 0) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    near = [(20, 7, 9), (24, 7, 9), (20 + 2**34, 7, 9), (20, 8, 9), (20, 7, 10), (20, 7, 9 + 2**40)]
    assert len({words(*c) for c in near}) == len(near)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", WEIGHTS, ids=str)
@pytest.mark.parametrize(("n", "offset"), [(3000, 0), (1, 0), (255, 256), (1500, 77), (300, 2**40 * BLOCK + 5)])
def test_kernel_and_eager_code_agree_in_every_bit(
    n: int, offset: int, dtype: torch.dtype, grad_dtype: torch.dtype, device: torch.device
) -> None:
    weight = draw(n, seed=2, dtype=dtype, device=device)
    grads = [g.to(grad_dtype) for g in gradients(n, 4, device=device)]
    scale = torch.tensor(0.37, device=device)
    options = {"offset": offset, "seed": 2**62 + 2**31 + 3, "grad_scale": scale}
    found = follow(adamw8bit_step, weight, iter(grads), **options)
    wanted = follow(adamw8bit_step_reference, weight, iter(grads), **options)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert n == 1 or not torch.equal(found[0], weight)
    state = State(*wanted[1:])
    maxima = [f(grads[0], *state, **BETAS, grad_scale=scale, offset=offset)
              for f in (adamw8bit_block_max, adamw8bit_block_max_reference)]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(*maxima, strict=True))


@pytest.mark.parametrize("rows", [1, 4])
def test_the_tile_changes_no_bit(rows: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program handles four blocks on a GPU, and more in the interpreter, for speed."""
    weight = draw(2100, seed=2, dtype=torch.bfloat16, device=device)
    wanted = follow(adamw8bit_step, weight, gradients(2100, 2, device=device), offset=100)
    monkeypatch.setattr(adamw8bit, "ROWS", rows)
    found = follow(adamw8bit_step, weight, gradients(2100, 2, device=device), offset=100)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_scale_on_the_device_is_a_number_and_is_the_gradient_scaled(device: torch.device) -> None:
    weight = draw(600, seed=2, device=device)
    grads = list(gradients(600, 3, device=device))
    runs = [
        follow(adamw8bit_step, weight, iter(grads), grad_scale=0.25),
        follow(adamw8bit_step, weight, iter(grads), grad_scale=torch.tensor(0.25, device=device)),
        follow(adamw8bit_step, weight, (g * 0.25 for g in grads)),
    ]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


# --- cuts ------------------------------------------------------------------------------------------------------


def cut_steps(weight: Tensor, grads: list[Tensor], cuts: list[int], step: Callable[..., None]) -> list[Tensor]:
    """Steps as on ranks that hold one slice each: combine the maxima of divided blocks, then step each slice."""
    edges = [0, *cuts, len(weight)]
    slices = [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]
    weights = [weight[s].clone() for s in slices]
    states = [adamw8bit_state(s.stop - s.start, weight.device, s.start) for s in slices]
    blocks = [slice(s.start // BLOCK, s.start // BLOCK + blocks_touched(s.stop - s.start, s.start)) for s in slices]
    for t, grad in enumerate(grads, 1):
        joint = torch.full((2, blocks_touched(len(weight))), -1.0, device=weight.device)
        for s, state, b in zip(slices, states, blocks, strict=True):
            mine = adamw8bit_block_max(grad[s].clone(), *state, **BETAS, offset=s.start)
            joint[:, b] = torch.maximum(joint[:, b], torch.stack(mine))
        for w, s, state, b in zip(weights, slices, states, blocks, strict=True):
            maxima = [x[b].clone() for x in joint]
            # only the first and last block can be shared with another slice
            for x in maxima:
                x[1:-1] = -1.0
            step(w, grad[s].clone(), *state, step=t, **HYPER, seed=7, offset=s.start, m_max=maxima[0], v_max=maxima[1])
    codes = [torch.cat([state[i] for state in states]) for i in (0, 1)]
    return [torch.cat(weights), *codes]


@pytest.mark.parametrize("dtype", WEIGHTS, ids=str)
@BOTH
def test_cutting_changes_no_bit(step: Callable[..., None], dtype: torch.dtype, device: torch.device) -> None:
    n, steps = 1900, 3
    weight, grads = draw(n, seed=3, dtype=dtype, device=device), list(gradients(n, steps, device=device))
    whole = follow(step, weight, iter(grads))[:3]
    for cuts in ([512], [100, 101, 200, 1000], [1, 255, 257, 1899]):
        assert all(torch.equal(a, b) for a, b in zip(cut_steps(weight, grads, cuts, step), whole, strict=True)), cuts


def test_a_cut_between_blocks_needs_no_maxima(device: torch.device) -> None:
    weight, grads = draw(1500, seed=3, dtype=torch.bfloat16, device=device), list(gradients(1500, 3, device=device))
    whole = follow(adamw8bit_step, weight, iter(grads))
    low = follow(adamw8bit_step, weight[:512], (g[:512] for g in grads))
    high = follow(adamw8bit_step, weight[512:], (g[512:] for g in grads), offset=512)
    assert all(torch.equal(torch.cat(halves), w) for *halves, w in zip(low, high, whole, strict=True))


@settings(max_examples=25)
@given(
    n=st.integers(2, 900),
    where=st.lists(st.floats(0, 1), max_size=4),
    dtype=st.sampled_from(WEIGHTS),
    spread=st.floats(0, 5),
)
def test_any_cut_changes_no_bit(n: int, where: list[float], dtype: torch.dtype, spread: float) -> None:
    cuts = sorted({min(n - 1, max(1, int(x * n))) for x in where})
    weight, grads = draw(n, seed=3, dtype=dtype), list(gradients(n, 2, spread))
    whole = follow(adamw8bit_step_reference, weight, iter(grads))[:3]
    found = cut_steps(weight, grads, cuts, adamw8bit_step_reference)
    assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))


# --- numbers ---------------------------------------------------------------------------------------------------


def adamw(weight: Tensor, grads: Iterator[Tensor], dtype: torch.dtype, make: Any = torch.optim.AdamW) -> Tensor:
    """The weight after another optimizer's steps."""
    parameter = torch.nn.Parameter(weight.to(dtype, copy=True))
    optimizer = make([parameter], lr=HYPER["lr"], betas=(0.9, 0.999), eps=HYPER["eps"], weight_decay=0.01)
    for grad in grads:
        parameter.grad = grad.to(dtype)
        optimizer.step()
    return parameter.detach()


def test_the_first_step_is_adamws(device: torch.device) -> None:
    """Nothing is quantised yet, so bias correction and decay are exact to fp32 rounding."""
    weight, grad = draw(1000, seed=4, device=device), next(gradients(1000, 1, device=device))
    found = follow(adamw8bit_step, weight, iter([grad]))[0]
    truth = adamw(weight, iter([grad]), torch.float64)
    assert (found - truth).abs().max() <= 2 * (adamw(weight, iter([grad]), torch.float32) - truth).abs().max()
    step = HYPER["lr"] * grad / (grad.abs() + HYPER["eps"])
    assert torch.allclose(weight * (1 - 1e-5) - found, step, atol=1e-6)


def displaced(found: Tensor, truth: Tensor, start: Tensor) -> float:
    """Distance between the end points of two runs, relative to the distance that the true one covered."""
    return ((found.double() - truth).norm() / (truth - start).norm()).item()


@pytest.mark.parametrize(("spread", "shrunk", "most"), [(0.0, 1.0, 0.03), (1.0, 1.0, 0.1), (1.5, 1.0, 0.2),
                                                        (0.5, 0.1, 0.1)])  # fmt: skip
def test_follows_fp32_and_not_worse_than_bitsandbytes(spread: float, shrunk: float, most: float) -> None:
    """400 steps on gradients of equal magnitude, of different magnitudes, and where half of them shrink.

    If all elements of a block have the same magnitude (spread 0), linear codes are better: both are close to fp32
    there, and only the absolute limit is checked.
    """
    bitsandbytes = pytest.importorskip("bitsandbytes")
    n, steps = 4096, 400
    start, half = torch.zeros(n), (torch.arange(n) % 2).bool()

    def grads() -> Iterator[Tensor]:
        for t, grad in enumerate(gradients(n, steps, spread)):
            yield torch.where(half, grad, shrunk * grad) if t > 100 else grad

    truth = adamw(start, grads(), torch.float64)
    ours = displaced(follow(adamw8bit_step_reference, start, grads())[0], truth, start)
    theirs = displaced(adamw(start, grads(), torch.float32, bitsandbytes.optim.AdamW8bit), truth, start)
    assert ours < most
    assert spread == 0 or ours < theirs, f"ours {ours:.4f}, bitsandbytes {theirs:.4f}"


def test_v_follows_gradients_that_shrink() -> None:
    """Rounded to the nearest code v would not change: its decay of a thousandth is less than half a code."""
    n, steps = 512, 1500
    tenth = torch.where(torch.arange(n) % 2 == 0, 1.0, 0.1)
    shrinking = (g * (tenth if t > 50 else 1.0) for t, g in enumerate(gradients(n, steps, 0.0)))
    _, _, v8, _, v_scale = follow(adamw8bit_step_reference, torch.zeros(n), shrinking)
    v = (v8.float() / 255) ** 4 * v_scale.repeat_interleave(BLOCK)
    wanted = 1e-6 * (0.01 + 0.99 * 0.999 ** (steps - 51) * (1 - 0.999**51)) * 1.04
    assert v[1::2].mean() == pytest.approx(wanted, rel=0.25)


def test_small_v_is_kept_above_zero_and_steps_stay_bounded() -> None:
    """Gradients over 8 decades in one block: steps may be up to 3 times as large, but never unbounded."""
    size = torch.logspace(-8, 0, BLOCK)
    start = torch.zeros(BLOCK)
    grads = [size * (1 + 0.3 * draw(BLOCK, seed=20 + t)) for t in range(60)]
    weight, _, v8, _, _ = follow(adamw8bit_step_reference, start, iter(grads), eps=1e-20, weight_decay=0.0)
    assert (v8 > 0).all()
    assert (weight < 0).all() and weight.abs().max() < 3.2 * 60 * HYPER["lr"]


# --- stochastic rounding ------------------------------------------------------------------------------------------


def test_rounding_to_bf16_leaves_the_mean(device: torch.device) -> None:
    """A weight between two neighbours in bf16 is rounded to each with a probability that preserves the mean."""
    n, spacing = 40_000, 2**-7
    for part in (0.0, 0.1, 0.5, 0.93):
        weight = torch.full((n,), 1.0, dtype=torch.bfloat16, device=device)
        # the first step of a constant gradient is exactly lr
        grad = torch.full((n,), -1.0, device=device)
        options = {**HYPER, "lr": part * spacing, "weight_decay": 0.0, "eps": 1e-20}
        adamw8bit_step(weight, grad, *adamw8bit_state(n, device), step=1, seed=3, **options)
        assert set(weight.unique().tolist()) <= {1.0, 1.0 + spacing}
        share = (weight.double() - 1).mean().item() / spacing
        assert share == pytest.approx(part, abs=4.5 * (part * (1 - part) / n) ** 0.5 + 1e-5)


def test_rounding_of_v_leaves_the_mean() -> None:
    n = 60_000
    scale = torch.ones(n // BLOCK + 1)
    for value in (0.9, 0.1234, 3e-3, 2e-6):
        words = random_words(len(scale) * BLOCK, 0, 1, 5, torch.device("cpu")).view(-1, BLOCK)
        code = adamw8bit._encode_v(torch.full_like(words, value, dtype=torch.float32), scale, words)
        decoded = adamw8bit._fourth_power(code.double(), 255)
        assert len(code.unique()) == 2
        assert decoded.mean().item() == pytest.approx(value, abs=4.5 * decoded.std().item() / n**0.5)


def test_is_repeatable_and_depends_on_the_seed(device: torch.device) -> None:
    weight = draw(2000, seed=5, dtype=torch.bfloat16, device=device)
    first, again, other = (follow(adamw8bit_step, weight, gradients(2000, 3, device=device), seed=s) for s in (7, 7, 8))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[2], other[2])


def test_bf16_weights_learn_where_rounding_to_nearest_does_not_move_them() -> None:
    """lr 1e-5 on weights near 1, whose neighbours in bf16 are 400 to 800 steps away."""
    n, steps, options = 4096, 300, {"lr": 1e-5, "weight_decay": 0.0}
    start = (1 + 0.5 * draw(n, seed=6).abs()).bfloat16()
    goal = start.float() + 0.1 * draw(n, seed=7).sign()  # many bf16 spacings away

    def descend(weight: Tensor, step: Callable[[Tensor, Tensor, int], None]) -> Tensor:
        weight = weight.clone()
        for t in range(1, steps + 1):
            step(weight, weight.float() - goal + 0.03 * draw(n, seed=100 + t), t)
        return weight.float() - start.float()

    def ours(dtype: torch.dtype) -> Tensor:
        state = adamw8bit_state(n)
        return descend(start.to(dtype), lambda w, g, t: adamw8bit_step_reference(
            w, g, *state, step=t, seed=1, **{**HYPER, **options}))  # fmt: skip

    def nearest(weight: Tensor, grad: Tensor, t: int) -> None:
        """As a plain bf16 optimizer does: round each step to nearest."""
        weight.copy_((weight.float() - 1e-5 * grad.sign()).bfloat16())

    way = goal - start.float()
    master, chance, still = ours(torch.float32), ours(torch.bfloat16), descend(start, nearest)
    assert (still == 0).all(), "rounding to nearest moved: the comparison is empty"
    gained = [(d * way.sign()).mean().item() for d in (master, chance)]
    assert gained[0] > 0.85 * steps * 1e-5
    assert gained[1] == pytest.approx(gained[0], rel=0.05)


# --- edges -----------------------------------------------------------------------------------------------------


ALL_ONES = float(np.int32(0x7FFFFFFF).view(np.float32))  # a NaN to which rounding could carry a bit too many


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", WEIGHTS, ids=str)
@BOTH
def test_a_nonfinite_weight_stays_one_and_changes_no_other(
    step: Callable[..., None], dtype: torch.dtype, value: float, device: torch.device
) -> None:
    weight, grad = draw(700, seed=8, dtype=dtype, device=device), next(gradients(700, 1, device=device))
    clean = follow(step, weight, iter([grad]))
    weight[300] = value
    found = follow(step, weight, iter([grad]))
    assert found[0][300].isnan() if weight[300].isnan() else found[0][300] == value
    found[0][300] = clean[0][300]
    assert all(same_bits(a, b) for a, b in zip(found, clean, strict=True))


@BOTH
def test_a_damaged_scale_makes_bf16_weights_nan(step: Callable[..., None], device: torch.device) -> None:
    """Rounding to bf16 must not carry a bit out of a NaN, which would make it a number."""
    weight, state = draw(700, seed=8, dtype=torch.bfloat16, device=device), adamw8bit_state(700, device)
    for t, grad in enumerate(gradients(700, 2, device=device), 1):
        step(weight, grad, *state, step=t, **HYPER)
        state.m_scale[1] = ALL_ONES
    assert weight[256:512].isnan().all() and weight[:256].isfinite().all() and weight[512:].isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e20], ids=["nan", "inf", "-inf", "big"])
@pytest.mark.parametrize("dtype", WEIGHTS, ids=str)
@BOTH
def test_a_block_with_a_nonfinite_gradient_stays_as_it_was(
    step: Callable[..., None], dtype: torch.dtype, value: float, device: torch.device
) -> None:
    """Or with one whose square overflows. The blocks beside it, and its own next step, are those of a clean run."""
    weight, offset, bad = draw(700, seed=8, dtype=dtype, device=device), 100, slice(156, 412)
    first, second = gradients(700, 2, device=device)
    before = follow(step, weight, iter([first]), offset=offset)
    clean = follow(step, weight, iter([first, second]), offset=offset)
    second = second.clone()
    second[300] = value
    found = follow(step, weight, iter([first, second]), offset=offset)
    for now, old, good in zip(found[:3], before[:3], clean[:3], strict=True):
        assert same_bits(now[bad], old[bad]) and not same_bits(good[bad], old[bad])
        assert same_bits(now[: bad.start], good[: bad.start]) and same_bits(now[bad.stop :], good[bad.stop :])
    for now, old, good in zip(found[3:], before[3:], clean[3:], strict=True):
        assert now[1] == old[1] != good[1] and (now[[0, 2, 3]] == good[[0, 2, 3]]).all()


@BOTH
def test_slices_of_a_block_with_a_nonfinite_gradient_all_skip_the_step(
    step: Callable[..., None], device: torch.device
) -> None:
    weight, (grad,) = draw(700, seed=8, device=device), gradients(700, 1, device=device)
    grad[300] = float("nan")
    whole = follow(step, weight, iter([grad]))[0]
    assert same_bits(cut_steps(weight, [grad], [290, 400], step)[0], whole)
    assert same_bits(whole[256:512], weight[256:512])


@BOTH
def test_gradients_of_zero(step: Callable[..., None], device: torch.device) -> None:
    """Only weight decay happens, also in a block whose other elements have gradients, and also in later steps."""
    weight = draw(600, seed=9, device=device)
    grad = next(gradients(600, 1, device=device))
    grad[:300] = 0
    found, m8, v8, m_scale, v_scale = follow(step, weight, iter([torch.zeros_like(grad), grad]))
    assert torch.allclose(found[:300], weight[:300] * (1 - 1e-5) ** 2, rtol=1e-6)
    assert (m8[:300] == 0).all() and (v8[:300] == 0).all() and m_scale[0] == 0 == v_scale[0]
    assert found.isfinite().all() and (found[300:] != weight[300:]).all()


def test_no_elements(device: torch.device) -> None:
    nothing = torch.zeros(0, device=device)
    adamw8bit_step(nothing, nothing, *adamw8bit_state(0, device), step=1, **HYPER)
    assert adamw8bit_block_max(nothing, *adamw8bit_state(0, device), **BETAS)[0].shape == (0,)


def test_mistakes_are_named(device: torch.device) -> None:
    weight, state = torch.zeros(600, device=device), adamw8bit_state(600, device)
    with pytest.raises(ValueError, match=r"grad is \[600\]"):
        adamw8bit_step(weight, weight[:1], *state, step=1, **HYPER)
    with pytest.raises(ValueError, match=r"m_scale is \[4\]"):
        adamw8bit_step(weight, weight, *state, step=1, offset=255, **HYPER)
    with pytest.raises(ValueError, match="fp32 or bf16"):
        adamw8bit_step(weight.half(), weight, *state, step=1, **HYPER)
    with pytest.raises(ValueError, match="codes are int8 and uint8"):
        adamw8bit_step(weight, weight, state.v8, *state[1:], step=1, **HYPER)
    with pytest.raises(ValueError, match="steps count from 1"):
        adamw8bit_step(weight, weight, *state, step=0, **HYPER)


def test_bytes_of_a_parameter() -> None:
    n = 2**20
    assert sum(x.nbytes for x in adamw8bit_state(n)) == 2 * n + 8 * n // BLOCK  # 2.03 per element


@pytest.mark.skipif(not INTERPRET, reason="once is enough")
def test_without_triton_eager_code_serves() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from smpo_fast.kernels import adamw8bit as a\n"
        "w = torch.ones(10); a.adamw8bit_step(w, w.clone(), *a.adamw8bit_state(10), lr=1., beta1=.9, beta2=.999,\n"
        "    eps=1e-8, weight_decay=0., step=1)\n"
        "assert a.triton is None and w.abs().max() < 1e-6, w\n"
        "from smpo_fast.kernels import ema as e\n"
        "x = torch.zeros(10).bfloat16(); e.ema_update([x], [x + 1], decay=0., step=0, seeds=[0], offsets=[0])\n"
        "assert e.triton is None and x.eq(1).all(), x"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
