"""A network of 10,000 weights, its data as a function of the step, and a loop: for the engine's tests."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smpo_fast.common.runtime import World
from smpo_fast.config import loading
from smpo_fast.config.schema import Config
from smpo_fast.engine import combinations, create, ds_config
from smpo_fast.engine.protocol import Engine
from smpo_fast.models.tracing import LiveBytes

CONFIGS = Path(__file__).parents[2] / "configs"
CLIP = 0.05  # below every gradient norm of the toy, so clipping is always at work


def network() -> nn.Module:
    """[B, 3, 8, 8] to [B, 5]; no dimension divides by 2, so no ZeRO partition ends where a tensor does."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 13, 3, padding=1), nn.SiLU(), nn.GroupNorm(1, 13), nn.Conv2d(13, 7, 3), nn.SiLU(), nn.Flatten(),
        nn.Linear(7 * 36, 37), nn.SiLU(), nn.Linear(37, 5),
    )  # fmt: skip


def settings(
    optimizer: str = "adamw", precision: str = "fp32", pairs: int = 10, micro: int = 2, **optim: Any
) -> Config:
    # With eps = 1e-8 a gradient that is zero but for rounding still moves its weight by a whole lr.
    return loading.from_dict(
        {
            "batch": {"pairs_per_step": pairs, "micro_pairs": micro},
            "optim": {"name": optimizer, "lr": 1e-3, "clip": CLIP, "eps": 1e-6, **optim},
            "model": {"precision": precision},
        }
    )


def make(config_: Config, rank: int = 0, size: int = 1, stage: int | str | None = None) -> Engine:
    """An engine on the CPU: plain for stage None, else as configs/ds_zero<stage>.json says (3, "3_offload", ...)."""
    world = World(rank, size)
    raw = None if stage is None else ds_config.read_ds_file(CONFIGS / f"ds_zero{stage}.json")
    if raw and "stage3_param_persistence_threshold" in raw["zero_optimization"]:
        raw["zero_optimization"]["stage3_param_persistence_threshold"] = 1000  # some of these weights are gathered too
    precision = combinations.resolve_precision(config_, raw, world.device)
    ds = None if raw is None else ds_config.resolve_ds_settings(raw, "file", config_, size, precision)[0]
    return create.make_engine(network(), config_, world, precision, ds)


def distance_from_reference(trained: Engine, precision: str) -> float:
    """Between the fresh policy's predictions, with and without gradients, and a frozen copy's in its dtype."""
    reference, (x, _) = network().to(trained.dtype), batch(0, 3)
    x = x.to(trained.dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-autocast"):
        expected, evaluated = reference(x), trained.unet.eval()(x)
    predicted = trained.unet.train()(x)
    assert predicted.dtype is expected.dtype
    return max((predicted - expected).abs().max().item(), (evaluated - expected).abs().max().item())


def batch(step: int, pairs: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of all pairs of a step, over all ranks."""
    g = torch.Generator().manual_seed(step)
    return torch.randn(pairs, 3, 8, 8, generator=g), torch.randn(pairs, 5, generator=g)


def losses(trained: Engine, x: Tensor, y: Tensor) -> Tensor:
    return (trained.unet(x.to(trained.dtype)).float() - y).square().mean(1)


def accumulate(
    trained: Engine, config_: Config, step: int, rank: int = 0, size: int = 1, *,
    factor: float = 1.0, finish: bool = True,
) -> float:  # fmt: skip
    """The step's no-gradient calls and backward passes; returns the mean loss over the rank's pairs.

    ``factor`` multiplies the last loss; without ``finish`` the last micro-batch is left out.
    """
    pairs, micro = config_.batch.pairs_per_step // size, config_.batch.micro_pairs
    x, y = (t[rank * pairs : (rank + 1) * pairs] for t in batch(step, config_.batch.pairs_per_step))
    with torch.no_grad():  # the inversion comes before the first backward pass, in eval mode
        trained.unet.eval()
        for _ in range(2):
            losses(trained, x, y)
        trained.unet.train()
    total, starts = 0.0, list(range(0, pairs, micro))
    for start in starts if finish else starts[:-1]:
        last = start == starts[-1]
        loss = losses(trained, x[start : start + micro], y[start : start + micro]).sum() / pairs
        loss = loss * factor if last else loss
        with torch.no_grad():
            losses(trained, x[:1], y[:1])
        trained.backward(loss, last=last)
        total += loss.item()
    return total


@contextmanager
def infinite_gradient(trained: Engine) -> Iterator[None]:
    """Inside, backward passes give one weight an infinite gradient."""
    first = next(trained.unet.parameters())

    def poison(gradient: Tensor) -> Tensor:
        poisoned = gradient.clone()
        poisoned.view(-1)[0] = math.inf
        return poisoned

    hook = first.register_hook(poison)
    try:
        yield
    finally:
        hook.remove()


def train(
    trained: Engine, config_: Config, steps: range | list[int], rank: int = 0, size: int = 1
) -> list[tuple[float, bool, float]]:
    """Loss (mean over the rank's pairs), applied, gradient norm for each of the steps."""
    logged = []
    for step in steps:
        loss = accumulate(trained, config_, step, rank, size)
        result = trained.step(1e-3 * (step + 1) / 4)
        logged.append((loss, result.applied, result.grad_norm))
    return logged


def bytes_left(rank: int, size: int, stage: int | str | None, precision: str, *, close: bool) -> tuple[int, int]:
    """CPU bytes of an engine: at most during a step, and after it was dropped. close: it is closed before."""
    config_ = settings(precision=precision, pairs=8, ema=0.9)
    with LiveBytes(device="cpu") as live:
        trained = make(config_, rank, size, stage)
        train(trained, config_, [0], rank, size)
        if close:
            trained.close()
        del trained
        gc.collect()
    return live.peak, live.now


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bitwise."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest relative distance of two tensors of the same name."""
    assert a.keys() == b.keys()
    return max(((a[k] - b[k]).norm() / b[k].norm()).item() for k in a)
