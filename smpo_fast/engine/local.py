"""The engine for one device in plain PyTorch: the reference that the DeepSpeed engine is tested against."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from smpo_fast.common.runtime import COMPUTE_DTYPES, World, rng
from smpo_fast.config.schema import Config
from smpo_fast.engine.ema import WeightAverage
from smpo_fast.engine.optimizers import make_optimizer, whole_parameters
from smpo_fast.engine.protocol import (
    StepResult,
    describe_layout,
    free_tensors,
    largest_absolute,
    nan_unless_finite,
    require_last_backward,
    set_learning_rate,
)
from smpo_fast.engine.staging import HostCopies
from smpo_fast.engine.state_files import persistent_buffers, read_state, write_state


def add_with_stochastic_rounding(total: Tensor, x: Tensor, generator: torch.Generator) -> None:
    """Add x to a bf16 sum of the same shape, rounding up or down with probabilities that keep the expected value."""
    exact = total.float() + x.float()
    noise = torch.randint(1 << 16, exact.shape, dtype=torch.int32, device=exact.device, generator=generator)
    rounded = ((exact.view(torch.int32) + noise) & -65536).view(torch.float32)
    total.copy_(torch.where(exact.isfinite(), rounded, exact))


class LocalEngine:
    """One device, no DeepSpeed. Losses are scalars; ``protocol.Engine`` documents the methods."""

    def __init__(self, unet: nn.Module, config: Config, world: World, precision: str) -> None:
        self.unet = unet.to(world.device)
        self.dtype = COMPUTE_DTYPES[precision]
        self.layout = describe_layout("local", 0, world, precision, config)
        self._config, self._device = config, world.device
        self._masters: dict[str, Tensor] = {}  # what the optimizer updates: fp32, except with master = "none"
        self._half_and_master: list[tuple[nn.Parameter, Tensor]] = []
        self._to_host = HostCopies()
        self._sums: dict[str, Tensor] = {}  # gradient sums of half-precision parameters; fp32 ones sum in .grad
        for name, parameter in unet.named_parameters():
            self._add_parameter(name, parameter)
        self._optimizer = make_optimizer(self._masters.values(), config, world)
        self._slices = whole_parameters(self._masters)
        self._optimizer.assign_slices([list(self._masters.values())], self._slices)
        self._average = WeightAverage(self._slices, config)
        self._rounding: torch.Generator | None = None
        if config.optim.accumulate == "bf16-sr":
            self._rounding = torch.Generator(self._sums_device())
        self._ready = False

    def _add_parameter(self, name: str, parameter: nn.Parameter) -> None:
        original = parameter.data
        parameter.data = original.to(self.dtype)
        if not parameter.requires_grad:
            return
        if self.dtype is torch.float32:
            self._masters[name] = parameter
            return
        parameter.register_post_accumulate_grad_hook(_accumulate_into(weakref.ref(self), name))
        if self._config.optim.master == "none":
            self._masters[name] = parameter
            return
        master = original.to(torch.float32, copy=True).requires_grad_()
        self._masters[name] = master
        self._half_and_master.append((parameter, master))

    def _sums_device(self) -> torch.device:
        return torch.device("cpu") if self._config.optim.offload == "states+gradients" else self._device

    @torch.no_grad()
    def _accumulate(self, name: str, half: Tensor) -> None:
        assert half.grad is not None
        gradient, half.grad = half.grad, None
        if self._config.optim.offload == "states+gradients" and gradient.device.type != "cpu":
            self._to_host.send(name, gradient, self._add)
        else:
            self._add(name, gradient)

    @torch.no_grad()
    def _add(self, name: str, gradient: Tensor) -> None:
        """Add a gradient to its sum, on the same device."""
        if (total := self._sums.get(name)) is None:
            dtype = torch.float32 if self._rounding is None else torch.bfloat16
            self._sums[name] = gradient.to(dtype, copy=True)
        elif self._rounding is None:
            total.add_(gradient)
        else:
            add_with_stochastic_rounding(total, gradient, self._rounding)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        if self._rounding is not None and not self._sums:
            seed = rng(self._config.run.seed, "accumulate", self._optimizer.steps()).integers(2**62)
            self._rounding.manual_seed(int(seed))
        nan_unless_finite(loss).backward()
        self._to_host.finish(self._add)
        self._ready = last

    def step(self, lr: float) -> StepResult:
        require_last_backward(self._ready)
        gradients = [self._gradient(name, master) for name, master in self._masters.items()]
        norm = _global_norm(gradients)
        result = StepResult(math.isfinite(norm), float(norm))
        if result.applied:
            clip = self._config.optim.clip
            scale: Tensor | float = (clip / (norm + 1e-6)).clamp(max=1.0).to(self._device) if clip else 1.0
            set_learning_rate(self._optimizer, lr)
            self._optimizer.step(scale=scale, gradients=gradients)
            self._copy_masters_to_half()
            self._average.update()
        self._optimizer.zero_grad(set_to_none=True)
        self._sums.clear()
        self._ready = False
        return result

    def _gradient(self, name: str, master: Tensor) -> Tensor:
        found = master.grad if self.dtype is torch.float32 else self._sums.get(name)
        if found is None:  # unused in the forward pass: its weight still decays, as it does under ZeRO
            found = torch.zeros_like(master, dtype=torch.float32)
        return found

    @torch.no_grad()
    def _copy_masters_to_half(self) -> None:
        for parameter, master in self._half_and_master:
            parameter.copy_(master)

    def largest_weight(self) -> float:
        return float(largest_absolute(list(self._masters.values()), self._device))

    def save(self, folder: Path) -> None:
        write_state(folder, 0, self._slices, [self._optimizer, self._average], self.unet)

    def load(self, files: Sequence[Path]) -> None:
        read_state(files, self._slices, [self._optimizer, self._average], self.unet)
        self._copy_masters_to_half()

    def full_state(self) -> dict[str, Tensor]:
        frozen = {name: p for name, p in self.unet.named_parameters() if not p.requires_grad}
        weights = {name: p.detach().float() for name, p in {**frozen, **self._masters}.items()}
        return {name: t.cpu().clone() for name, t in {**weights, **persistent_buffers(self.unet)}.items()}

    def full_average(self) -> dict[str, Tensor]:
        shapes = {name: master.shape for name, master in self._masters.items()}
        return self._average.gathered(shapes, World(device=self._device), cut=False)

    def close(self) -> None:
        free_tensors(self.unet.parameters(), [self._optimizer, self._average])
        self._masters, self._half_and_master, self._sums, self._slices = {}, [], {}, []


def _accumulate_into(engine: weakref.ref[LocalEngine], name: str) -> Callable[[Tensor], None]:
    """A gradient hook that does not keep the engine alive: autograd holds hooks where Python's collector cannot see."""

    def hook(half: Tensor) -> None:
        if (found := engine()) is not None:
            found._accumulate(name, half)

    return hook


def _global_norm(gradients: list[Tensor]) -> Tensor:
    """In fp32, whatever the dtype of the gradients."""
    if all(g.dtype is torch.float32 for g in gradients):
        return torch.nn.utils.get_total_norm(gradients)
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]))
