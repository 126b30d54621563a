"""The training step: by phase and whole, ours against both baselines; the arithmetic of the inversion; optimizers."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any, get_args

import harness
import ladder
import ours
import pairs
import pytest
import torch
from architectures import SCHEDULER, SD15, SD15_TOY, SDXL, SDXL_TOY, Architecture, make_unet
from reference_trainer import InverseScheduler, Recipe, make_optimizer

from smpo_fast.common.runtime import World
from smpo_fast.config.schema import Config
from smpo_fast.engine import create
from smpo_fast.method import inversion
from smpo_fast.method.schedule import NoiseSchedule

ON_GPU = torch.cuda.is_available()
NETWORKS = (SDXL, SD15) if ON_GPU else (SDXL_TOY, SD15_TOY)
PAIRS = 8 if ON_GPU else 2
ROUNDS = 3
KERNELS = "ours, all kernels"
CONTENDERS = [*pairs.MAKERS, KERNELS]


def make(name: str, architecture: Architecture, device: torch.device) -> pairs.Contender:
    if name == KERNELS:
        return pairs.make_ours(architecture, device, PAIRS, ours.all_kernels(), KERNELS)
    return pairs.MAKERS[name](architecture, device, PAIRS)


@pytest.fixture(scope="module")
def steps(device: torch.device) -> Any:
    """Phase times of a few steps of a contender, measured once, after its inversion was checked."""
    known: dict[tuple[str, str], list[Mapping[str, float]]] = {}
    truth: dict[str, torch.Tensor] = {}

    def get(architecture: Architecture, name: str) -> list[Mapping[str, float]]:
        key = (architecture.name, name)
        if key not in known:
            with ladder.free_after(device):
                contender = make(name, architecture, device)
                pair = pairs.check_pair(architecture, device)
                if architecture.name not in truth:
                    reference = pairs.make_reference(architecture, device, 1) if name != pairs.REFERENCE else contender
                    truth[architecture.name] = reference.invert(pair)
                pairs.check_agrees(contender, architecture, device, truth[architecture.name])
                contender.warm()
                known[key] = [contender.step() for _ in range(ROUNDS)]
                del contender
        return known[key]

    return get


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("architecture", NETWORKS, ids=lambda a: a.name)
def test_whole_step(bench: Any, steps: Any, architecture: Architecture, name: str) -> None:
    """Seconds per pair, all phases together."""
    taken = [sum(step.values()) / PAIRS for step in steps(architecture, name)]
    bench.record(
        f"whole step {architecture.name}", "a pair", name, taken, baseline=pairs.REFERENCE, extra={"pairs": PAIRS},
        also=None if name in (pairs.REFERENCE, pairs.BEST_EAGER) else pairs.BEST_EAGER,
    )  # fmt: skip


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("phase", ["inversion", "reference", "policy", "optimizer"])
@pytest.mark.parametrize("architecture", NETWORKS, ids=lambda a: a.name)
def test_phase(bench: Any, steps: Any, architecture: Architecture, phase: str, name: str) -> None:
    """Seconds per pair of one phase; the policy phase is its forward and backward pass."""
    taken = [step[phase] / PAIRS for step in steps(architecture, name)]
    bench.record(f"phase {architecture.name}", phase, name, taken, baseline=pairs.REFERENCE)


# --- the inversion without its network ------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["scheduler objects", "ours"])
@pytest.mark.parametrize("count", [8, 64] if ON_GPU else [8])
def test_inversion_arithmetic(bench: Any, device: torch.device, count: int, implementation: str) -> None:
    """An inversion with a network that costs nothing, which leaves the overhead of the ReNoise steps."""
    architecture = SDXL if ON_GPU else SDXL_TOY
    settings = ours.settings(architecture).inversion
    schedule = NoiseSchedule.from_config(SCHEDULER)
    paths = [schedule.path(t, settings) for t in pairs.even_times(count)]
    shape = (count, 2, 4, architecture.latent, architecture.latent)
    clean = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    scheduler = InverseScheduler(architecture.inversion_steps, device)

    def ours_() -> torch.Tensor:
        return inversion.invert(lambda rows: _tenth, clean, paths, settings, chunk=count)[0][0]

    def released() -> torch.Tensor:
        return torch.stack(
            [_released(scheduler, clean[i], path.final_level.timestep, device) for i, path in enumerate(paths)]
        )

    bench(
        "inversion arithmetic", f"{count} pairs", implementation, ours_ if implementation == "ours" else released,
        baseline="scheduler objects", reference=released, tolerance=1e-4, moved=3 * clean.nbytes,
    )  # fmt: skip


def _tenth(x: torch.Tensor, timesteps: torch.Tensor, *, refinement: bool = False) -> torch.Tensor:
    return 0.1 * x


def _released(scheduler: InverseScheduler, latents: torch.Tensor, time: int, device: torch.device) -> torch.Tensor:
    at = torch.full((2,), time, device=device)
    for source in scheduler.timesteps[scheduler.timesteps < at[0]]:
        first = 0.1 * latents
        ahead = scheduler.step(first, source, latents)
        latents = scheduler.step((first + 0.1 * ahead) / 2, source, latents)
    return latents


# --- optimizers -----------------------------------------------------------------------------------------------


class _Lion:
    """The first step of Lion (Chen et al., NeurIPS 2023): the sign of the gradient, with decoupled weight decay."""

    def __init__(self, weights: list[torch.nn.Parameter], run: Config) -> None:
        self._weights, self._rate, self._decay = weights, run.optim.lr, run.optim.weight_decay

    @torch.no_grad()
    def step(self) -> None:
        """Update the weights."""
        for w in self._weights:
            assert w.grad is not None
            w.mul_(1 - self._rate * self._decay).sub_(self._rate * w.grad.sign())


OPTIMIZERS = get_args(Config.model_fields["optim"].annotation.model_fields["name"].annotation)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_step(bench: Any, device: torch.device, name: str) -> None:
    """Norm, clipping, update and refresh of half-precision weights, over all parameters of SDXL's UNet.

    The weights after a step must match those of plain AdamW, Adafactor or Lion in fp32; with 8-bit states they may
    differ by a tenth of the update.
    """
    architecture = SDXL if ON_GPU else SDXL_TOY
    run = ours.settings(architecture, {"optim": {"name": name}})
    with ladder.free_after(device):
        engine: Any = create.make_engine(make_unet(architecture, device, torch.float32), run, World(device=device),
                                          "fp32", None)  # fmt: skip
        weights = list(engine.unet.parameters())
        generator = torch.Generator(device).manual_seed(1)
        gradients = [torch.empty_like(w).normal_(0, 1e-3, generator=generator) for w in weights]

        def provide() -> None:
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient.clone() if weight.grad is None else weight.grad.copy_(gradient)
            engine._ready = True

        few = weights[:: max(1, len(weights) // 40)]
        before = [w.detach().clone() for w in few]
        copies = [torch.nn.Parameter(b.clone()) for b in before]
        family = "adamw" if "adamw" in name else name
        plain = (
            _Lion(copies, run)
            if name == "lion8bit"
            else make_optimizer(copies, Recipe(optimizer=family, lr=run.optim.lr))
        )
        norm = torch.nn.utils.get_total_norm(gradients)
        for copy, gradient in zip(copies, gradients[:: max(1, len(weights) // 40)], strict=True):
            copy.grad = gradient * (run.optim.clip / (norm + 1e-6)).clamp(max=1.0)
        plain.step()
        provide()
        engine.step(run.optim.lr)
        moved = [w.detach() - b for w, b in zip(few, before, strict=True)]
        wanted = [c.detach() - b for c, b in zip(copies, before, strict=True)]
        harness.agree(name, torch.cat([m.flatten() for m in moved]), torch.cat([w.flatten() for w in wanted]),
                      0.1 if "8bit" in name else 2e-2)  # fmt: skip
        del before, copies, plain, moved, wanted
        bench(
            "optimizer step", architecture.name, name, lambda: engine.step(run.optim.lr), baseline="adamw",
            reset=provide, seconds=1.0 if ON_GPU else 0.3, most=20,
        )  # fmt: skip


def test_phases_are_positive(steps: Any) -> None:
    """A phase that a trainer does not time would appear infinitely fast."""
    for name in pairs.MAKERS:
        rounds = steps(NETWORKS[0], name)
        assert all(statistics.median(step[p] for step in rounds) > 0 for p in ("inversion", "reference", "policy"))
