"""The engine in plain PyTorch: what a step does, what it skips, and in which precision it sums."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import toy
from torch import nn

from smpo_fast.common.runtime import World
from smpo_fast.engine import create

STEPS = range(4)


def test_local_engine_is_adamw_on_the_whole_batch() -> None:
    settings, reference = toy.settings(), toy.network()
    trained = toy.make(settings)
    adamw = torch.optim.AdamW(reference.parameters(), betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01)
    for step in STEPS:
        x, y = toy.batch(step, 10)
        adamw.zero_grad()
        (reference(x) - y).square().mean().backward()
        norm = nn.utils.clip_grad_norm_(reference.parameters(), toy.CLIP)
        adamw.param_groups[0]["lr"] = 1e-3 * (step + 1) / 4
        adamw.step()
        ((_, applied, got),) = toy.train(trained, settings, [step])
        assert applied and got == pytest.approx(norm.item(), rel=1e-6)
    assert toy.distance(trained.full_state(), reference.state_dict()) < 1e-6


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-autocast"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "adamw8bit_aligned", "adafactor"])
def test_a_nonfinite_step_leaves_no_trace(optimizer: str, precision: str) -> None:
    settings = toy.settings(optimizer, precision, ema=0.9)
    plain, skipping = toy.make(settings), toy.make(settings)
    toy.train(plain, settings, [0, 2])
    toy.train(skipping, settings, [0])
    for factor in (math.nan, math.inf, -math.inf):
        toy.accumulate(skipping, settings, 1, factor=factor)
        assert not skipping.step(1e-3).applied
    with toy.infinite_gradient(skipping):  # of a single weight, while the loss is finite
        assert math.isfinite(toy.accumulate(skipping, settings, 1))
    assert not skipping.step(1e-3).applied
    toy.train(skipping, settings, [2])
    assert toy.same(plain.full_state(), skipping.full_state())
    assert toy.same(plain.full_average(), skipping.full_average())


def test_a_nonfinite_loss_with_finite_gradients_is_skipped() -> None:
    settings = toy.settings()
    trained = toy.make(settings)
    before = trained.full_state()
    x, y = toy.batch(0, 2)
    trained.backward(toy.losses(trained, x, y).sum() + math.inf, last=True)
    assert not trained.step(1e-3).applied
    assert toy.same(before, trained.full_state())


def test_bf16_weights_move_below_their_own_resolution() -> None:
    """At lr 1e-6 no bf16 weight of size 1 can move; the fp32 master weights do, and add up."""
    settings = toy.settings(precision="bf16")
    trained = toy.make(settings)
    before = trained.full_state()
    for step in range(3):
        toy.accumulate(trained, settings, step)
        trained.step(1e-6)
    moved = {k: (trained.full_state()[k] - before[k]).abs().max().item() for k in before}
    assert all(1e-6 < m < 4e-6 for m in moved.values()), moved
    for name, half in trained.unet.named_parameters():
        assert half.dtype is torch.bfloat16
        assert torch.equal(half, trained.full_state()[name].bfloat16())


def test_bf16_gradients_are_summed_in_fp32() -> None:
    """256 + 1 + 1 + ... stays 256 in bf16."""
    parameter = nn.Linear(1, 1, bias=False)
    settings = toy.settings(precision="bf16", clip=0.0)
    trained = create.make_engine(parameter, settings, World(), "bf16", None)
    for gradient in (256.0, 1.0, 1.0, 1.0):
        x = torch.full((1, 1), gradient, dtype=torch.bfloat16)
        trained.backward(trained.unet(x).float().sum(), last=True)
    assert trained.step(0.0).grad_norm == 259.0


def test_adafactor_is_that_of_the_recipe() -> None:
    """The first update of a matrix: factored second moments, RMS clipped at 1, the given rate, decay."""
    layer = nn.Linear(7, 5, bias=False)
    settings = toy.settings("adafactor", clip=0.0)
    trained = create.make_engine(layer, settings, World(), "fp32", None)
    before = layer.weight.detach().clone()
    gradient = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    trained.backward((layer.weight * gradient).sum(), last=True)
    assert trained.step(1e-2).applied
    squares = gradient.square() + 1e-30  # the running averages start with weight 1 on the first step
    rows, columns = squares.mean(1, keepdim=True), squares.mean(0, keepdim=True)
    update = gradient / (rows / rows.mean() * columns).sqrt()
    update = update / max(1.0, update.square().mean().sqrt().item())
    expected = before - 1e-2 * 0.01 * before - 1e-2 * update
    assert torch.allclose(layer.weight, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16-autocast", torch.bfloat16)])
def test_autocast_is_the_engines_own(precision: str, dtype: torch.dtype) -> None:
    trained = toy.make(toy.settings(precision=precision))
    assert trained.dtype is torch.float32
    assert trained.unet(torch.zeros(1, 3, 8, 8)).dtype is dtype
    assert toy.distance_from_reference(trained, precision) == 0.0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_clipping_leaves_small_gradients_alone(precision: str) -> None:
    states = []
    for clip in (0.0, 1e6):
        settings = toy.settings("adafactor", precision, clip=clip)  # its update depends on the gradient's scale at eps
        trained = toy.make(settings)
        seen: list[float] = []
        step = trained._optimizer.step  # type: ignore[attr-defined]
        trained._optimizer.step = lambda *, scale, gradients, s=step, f=seen: (  # type: ignore[attr-defined]
            f.append(float(scale)),
            s(scale=scale, gradients=gradients),
        )
        toy.train(trained, settings, STEPS)
        assert seen == [1.0] * len(STEPS)
        states.append(trained.full_state())
    assert toy.same(*states)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1e30])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_largest_weight(value: float, precision: str) -> None:
    trained = toy.make(toy.settings(precision=precision))
    assert trained.largest_weight() == max(w.abs().max() for w in trained.full_state().values())
    with torch.no_grad():
        trained._masters["3.bias"][1] = value  # type: ignore[attr-defined]
    assert trained.largest_weight() == pytest.approx(abs(value), nan_ok=True)


def test_step_needs_the_last_backward() -> None:
    trained = toy.make(toy.settings())
    with pytest.raises(RuntimeError, match="last=True"):
        trained.step(1e-3)


def test_weights_of_any_dtype_train_in_the_requested_one() -> None:
    trained = create.make_engine(toy.network().half(), toy.settings(), World(), "fp32", None)
    assert {p.dtype for p in trained.unet.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_state_has_the_frozen_weights_too(precision: str) -> None:
    """As of a base with adapters."""
    unet = toy.network().to(torch.bfloat16 if precision == "bf16" else torch.float32)
    wanted = {name: value.float() for name, value in unet.state_dict().items()}
    unet[0].requires_grad_(False)
    trained = create.make_engine(unet, toy.settings(precision=precision), World(), precision, None)
    assert toy.same(trained.full_state(), wanted)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_dropped_engine_leaves_nothing(precision: str) -> None:
    """Its gradient hooks are kept by autograd, so they must not keep it: another network needs the memory."""
    peak, left = toy.bytes_left(0, 1, None, precision, close=False)
    assert peak > 100_000 and left < 0.02 * peak
