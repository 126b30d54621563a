"""What the optimizers promise: their size, slices that step like whole parameters, and bf16 weights that learn."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import toy
from torch import Tensor, nn

from smpo_fast.common.errors import CheckpointError, EnvironmentProblem
from smpo_fast.common.runtime import World
from smpo_fast.engine import create, optimizers
from smpo_fast.engine.aligned_adamw8bit import AlignedAdamW8bit
from smpo_fast.engine.optimizer_states import STATE_BYTES
from smpo_fast.engine.optimizers import LocalSlice, SlicedOptimizer
from smpo_fast.engine.shards import ParameterSlice, ShardReader, ShardWriter

ALIGNED = "adamw8bit_aligned"
SIZES = {"conv": 5000, "bias": 37, "matrix": 10_000}
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


def parameters() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {name: torch.randn(n, generator=g).requires_grad_() for name, n in SIZES.items()}


def gradients(step: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(step + 1)
    return {name: torch.randn(n, generator=g) * 1e-2 for name, n in SIZES.items()}


def whole(tensors: dict[str, Tensor]) -> list[LocalSlice]:
    return [LocalSlice(ParameterSlice(name, 0, t.numel()), t.numel(), t) for name, t in tensors.items()]


def make(name: str, owners: list[Tensor], held: list[LocalSlice]) -> SlicedOptimizer:
    made = optimizers.make_optimizer(owners, toy.settings(name), World())
    made.assign_slices([owners], held)
    return made


def step_whole(made: SlicedOptimizer, tensors: dict[str, Tensor], step: int) -> None:
    for name, gradient in gradients(step).items():
        tensors[name].grad = gradient.clone()
    made.step()


@pytest.mark.parametrize("name", [n for n in STATE_BYTES if n != "adafactor"])
def test_bytes_a_parameter(name: str) -> None:
    weight = {"weight": torch.zeros(256 * 256).requires_grad_()}
    made = make(name, list(weight.values()), whole(weight))
    weight["weight"].grad = torch.ones_like(weight["weight"])
    made.step()
    held = sum(t.nbytes for _, t in made.states(ParameterSlice("weight", 0, 256 * 256)))
    assert held / 256**2 == pytest.approx(STATE_BYTES[name], abs=1e-3)


@pytest.mark.parametrize("name", [n for n in STATE_BYTES if n != "adafactor"])
def test_whole_parameters_in_a_flat_tensor_step_like_themselves(name: str) -> None:
    """Under ZeRO parameters lie behind one another, with something before and after them."""
    alone, inside = parameters(), parameters()
    flat = torch.cat([torch.full((3,), 7.0), *[t.detach() for t in inside.values()], torch.full((5,), 9.0)])
    starts = dict(zip(SIZES, [3, 5003, 5040], strict=True))
    held = [LocalSlice(ParameterSlice(n, 0, size), size, flat, starts[n]) for n, size in SIZES.items()]
    mine, flats = make(name, list(alone.values()), whole(alone)), make(name, [flat], held)
    for step in range(3):
        step_whole(mine, alone, step)
        flat.grad = torch.cat([torch.ones(3), *gradients(step).values(), torch.ones(5)])
        flats.step()
    for one in held:
        assert torch.equal(one.values(), alone[one.param_slice.name]), one.param_slice
    assert flat[:3].eq(7).all() and flat[-5:].eq(9).all(), "what belongs to no parameter stays as it is"


@pytest.mark.parametrize("cuts", [[256, 5000], [300, 301, 700], [1], [4999], [100, 120]], ids=str)
def test_cuts_change_no_bit_of_the_aligned_optimizer(cuts: list[int]) -> None:
    """Also where several cuts fall into one block."""
    total = 5000
    g = torch.Generator().manual_seed(0)
    weight, steps = torch.randn(total, generator=g), [torch.randn(total, generator=g) for _ in range(3)]
    ends = [0, *[c for c in cuts if c < total], total]
    parts = [weight[a:b].clone() for a, b in zip(ends, ends[1:], strict=False)]
    slices = [(ParameterSlice("w", a, b - a), total) for a, b in zip(ends, ends[1:], strict=False)]
    one = AlignedAdamW8bit([weight], slices=[(ParameterSlice("w", 0, total), total)], seed=3)
    many = AlignedAdamW8bit(parts, slices=slices, seed=3)
    for gradient in steps:
        one.step(scale=0.25, gradients=[gradient])
        many.step(scale=0.25, gradients=list(gradient.split([p.numel for p, _ in slices])))
    assert torch.equal(torch.cat(parts), weight)
    for word in ("m8", "v8"):
        assert torch.equal(torch.cat([many.state[p][word] for p in parts]), one.state[weight][word])


def test_the_aligned_optimizer_is_adamw() -> None:
    """Its 8-bit states differ from fp32 ones by a small part of an update."""
    mine, fp32 = parameters(), parameters()
    ours, plain = make(ALIGNED, list(mine.values()), whole(mine)), make("adamw", list(fp32.values()), whole(fp32))
    start = {name: t.detach().clone() for name, t in mine.items()}
    for step in range(20):
        step_whole(ours, mine, step)
        step_whole(plain, fp32, step)
    for name in SIZES:
        moved, expected = mine[name] - start[name], fp32[name] - start[name]
        assert (moved - expected).norm() / expected.norm() < 0.1, name


def test_host_states_and_memory_order_change_nothing() -> None:
    g = torch.Generator().manual_seed(0)
    weight, gradient = torch.randn(64, 8, 3, 3, generator=g), torch.randn(64, 8, 3, 3, generator=g)
    plain, hosted = weight.clone(), weight.clone()
    other = weight.clone().to(memory_format=torch.channels_last)
    for w, g_, more in ((plain, gradient, {}), (hosted, gradient, {"on_host": True}), (other, gradient, {})):
        made = AlignedAdamW8bit([w], **more)
        for _ in range(3):
            made.step(gradients=[g_])
    assert torch.equal(plain, hosted) and torch.equal(plain, other)
    assert not torch.equal(plain, weight) and other.is_contiguous(memory_format=torch.channels_last)


def test_every_parameter_is_rounded_with_random_numbers_of_its_own() -> None:
    """Equal bf16 weights with equal gradients must not be rounded alike, or their errors would add up."""
    g = torch.Generator().manual_seed(0)
    start, gradient = (1 + torch.rand(4096, generator=g)).bfloat16(), torch.randn(4096, generator=g)
    slices = [(ParameterSlice(name, 0, 4096), 4096) for name in ("a", "b", "a")]
    weights = [start.clone() for _ in slices]
    for weight, one in zip(weights, slices, strict=True):
        AlignedAdamW8bit([weight], lr=1e-3, slices=[one], seed=3).step(gradients=[gradient])
    a, b, again = weights
    assert torch.equal(a, again) and not torch.equal(a, start)
    assert 0.05 < (a != b).float().mean() < 0.95


def test_the_aligned_optimizers_state_dict() -> None:
    def trained(steps: range, made: AlignedAdamW8bit, weight: Tensor) -> None:
        for step in steps:
            weight.grad = gradients(step)["conv"].to(weight.dtype)
            made.step()

    straight = parameters()["conv"].detach().bfloat16()
    first = AlignedAdamW8bit([straight])
    trained(range(2), first, straight)
    again = straight.clone()
    second = AlignedAdamW8bit([again], lr=1.0)
    second.load_state_dict(first.state_dict())
    trained(range(2, 4), first, straight)
    trained(range(2, 4), second, again)
    assert torch.equal(straight, again)


def test_a_slice_that_nobody_saved_is_an_error(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 0)
    for first, end in ((0, 300), (400, 500)):
        writer.add(ParameterSlice("w", first, end - first), "weight", torch.arange(first, end))
    writer.close()
    saved = ShardReader(list(tmp_path.iterdir()))
    assert saved.elements(ParameterSlice("w", 100, 150), "weight").tolist() == list(range(100, 250))
    with pytest.raises(CheckpointError, match="'weight' of w, elements 250 to 449"):
        saved.elements(ParameterSlice("w", 250, 200), "weight")
    with pytest.raises(CheckpointError, match="another network or optimizer"):
        saved.elements(ParameterSlice("w", 0, 1), "exp_avg")


def test_writing_takes_little_memory_and_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smpo_fast.engine.shards.FILE_BYTES", 1000)
    writer, values = ShardWriter(tmp_path, 2), torch.arange(1000.0)
    for first in range(0, 1000, 100):
        writer.add(ParameterSlice("w", first, 100), "weight", values[first:][:100])
    writer.close()
    assert [p.name for p in sorted(tmp_path.iterdir())] == [f"rank00002-{i:04d}.safetensors" for i in range(4)]
    assert torch.equal(ShardReader(list(tmp_path.iterdir())).elements(ParameterSlice("w", 0, 1000), "weight"), values)


# --- bf16 weights without masters -----------------------------------------------------------------------------


class Mean(nn.Module):
    """x plus the mean of 65,536 weights between 1 and 2, where bf16 numbers are 0.0078 apart."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + torch.rand(65536, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight.float().mean()


def moved(trained: Any, steps: int) -> float:
    """How far the mean goes down in some steps at lr 1e-5; in fp32 each is 1e-5."""
    before = trained.full_state()["weight"].double().mean().item()
    for _ in range(steps):
        trained.backward(trained.unet(torch.zeros(())), last=True)
        trained.step(1e-5)
    return before - trained.full_state()["weight"].double().mean().item()


def test_at_lr_1e_5_bf16_weights_learn_by_chance_and_stall_when_rounded_to_nearest() -> None:
    steps, optim = 30, {"eps": 1e-12, "weight_decay": 0.0, "clip": 0.0}
    exact = moved(create.make_engine(Mean(), toy.settings("adamw", **optim), World(), "fp32", None), steps)
    rounded_stochastically = toy.settings(ALIGNED, "bf16", master="none", **optim)
    assert exact == pytest.approx(steps * 1e-5, rel=1e-2)
    assert moved(create.make_engine(Mean(), rounded_stochastically, World(), "bf16", None), steps) == pytest.approx(
        exact, rel=0.1
    )
    nearest = Mean().bfloat16()
    adamw = torch.optim.AdamW(nearest.parameters(), 1e-5, weight_decay=0.0)
    for _ in range(steps):
        adamw.zero_grad()
        nearest(torch.zeros(())).backward()
        adamw.step()
    assert torch.equal(nearest.weight, Mean().weight.bfloat16()), "rounded to nearest, no weight has moved"


@pytest.mark.parametrize("accumulate, tolerance", [("fp32", 0.0), ("bf16-sr", 0.02)])
def test_gradients_are_summed_without_masters(accumulate: str, tolerance: float) -> None:
    """256 + 1 + 1 + ... stays 256 in bf16 that is rounded to nearest."""
    n = 4096
    settings = toy.settings(ALIGNED, "bf16", clip=0.0, master="none", accumulate=accumulate)
    trained = create.make_engine(nn.Linear(n, 1, bias=False), settings, World(), "bf16", None)
    for gradient in (256.0, *[1.0] * 64):
        trained.backward(trained.unet(torch.full((1, n), gradient, dtype=torch.bfloat16)).float().sum(), last=True)
    assert trained.step(0.0).grad_norm / math.sqrt(n) == pytest.approx(320.0, rel=max(tolerance, 1e-6))


def test_sums_are_rounded_with_new_random_numbers_in_every_step() -> None:
    settings = toy.settings(ALIGNED, "bf16", clip=0.0, master="none", accumulate="bf16-sr")

    def norms() -> list[float]:
        """Of two steps with the same gradients."""
        trained, found = create.make_engine(nn.Linear(4096, 1, bias=False), settings, World(), "bf16", None), []
        for _ in range(2):
            for gradient in (256.0, 1.0, 1.0):
                trained.backward(trained.unet(torch.full((1, 4096), gradient).bfloat16()).float().sum(), last=True)
            found.append(trained.step(0.0).grad_norm)
        return found

    first, second = norms()
    assert first != second and norms() == [first, second]


@pytest.mark.parametrize("name", STATE_BYTES)
def test_weights_decay_by_the_learning_rate_times_the_setting(name: str) -> None:
    trained = create.make_engine(nn.Linear(64, 64), toy.settings(name, weight_decay=0.5), World(), "fp32", None)
    before = {name: weight.detach().clone() for name, weight in trained.unet.named_parameters()}
    trained.backward(0 * trained.unet(torch.ones(1, 64)).sum(), last=True)
    trained.step(0.1)
    for name, weight in trained.unet.named_parameters():
        torch.testing.assert_close(weight.detach(), before[name] * (1 - 0.1 * 0.5))


def test_a_weight_in_bf16_is_exported_as_it_is() -> None:
    settings = toy.settings(ALIGNED, "bf16", master="none")
    trained = toy.make(settings)
    toy.train(trained, settings, range(2))
    for name, weight in trained.unet.named_parameters():
        assert weight.dtype is torch.bfloat16
        assert torch.equal(trained.full_state()[name], weight.float())


@pytest.mark.parametrize("optim", [{"accumulate": "bf16-sr"}, {"offload": "states"}, {"offload": "states+gradients"}])
def test_where_numbers_are_kept(optim: dict[str, str]) -> None:
    """Host memory changes nothing; bf16 sums change little."""
    states = []
    for more in ({}, optim):
        settings = toy.settings(ALIGNED, "bf16", master="none", **more)
        trained = toy.make(settings)
        assert all(applied for _, applied, _ in toy.train(trained, settings, range(3)))
        states.append(trained.full_state())
    if "offload" in optim:
        assert toy.same(*states)
    else:
        assert 0 < toy.distance(*states) < 0.02


def test_a_missing_bitsandbytes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(EnvironmentProblem, match="pip install bitsandbytes"):
        toy.make(toy.settings("adamw8bit"))
