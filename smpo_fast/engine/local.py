"""The engine on one device in plain PyTorch: the ground truth for the sharded one."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from smpo_fast.common.runtime import COMPUTE_DTYPES as DTYPES
from smpo_fast.common.runtime import World, rng
from smpo_fast.config.schema import Config
from smpo_fast.engine.optimizers import make_optimizer
from smpo_fast.engine.protocol import StepResult, _check_ready, _layout, _poisoned, _set_lr
from smpo_fast.engine.state_files import _persistent_buffers, _read, _whole, _write


def _add_by_chance(total: Tensor, x: Tensor, generator: torch.Generator) -> None:
    """Add to a bf16 sum, rounding up or down with the probability that leaves the mean."""
    exact = total.float() + x.float()
    chance = torch.randint(1 << 16, exact.shape, dtype=torch.int32, device=exact.device, generator=generator)
    rounded = ((exact.view(torch.int32) + chance) & -65536).view(torch.float32)
    total.copy_(torch.where(exact.isfinite(), rounded, exact))


class LocalEngine:
    """One device, no DeepSpeed."""

    def __init__(self, unet: nn.Module, config: Config, world: World, precision: str) -> None:
        self.unet = unet.to(world.device)
        self.dtype = DTYPES[precision]
        self.layout = _layout("local", 0, world, precision, config)
        self._config, self._device = config, world.device
        self._masters: dict[str, Tensor] = {}  # what is stepped, by parameter name: fp32, but for master = "none"
        self._pairs: list[tuple[nn.Parameter, Tensor]] = []  # half parameter, its fp32 master
        self._sums: dict[str, Tensor] = {}  # the step's gradients of half parameters; those of fp32 ones are .grad
        for name, parameter in unet.named_parameters():
            self._adopt(name, parameter)
        self._optimizer = make_optimizer(self._masters.values(), config, world)
        self._held = _whole(self._masters)
        self._optimizer.hold([list(self._masters.values())], self._held)
        self._chance: torch.Generator | None = None
        if config.optim.accumulate == "bf16-sr":
            self._chance = torch.Generator(self._sums_device())
        self._ready = False

    def _adopt(self, name: str, parameter: nn.Parameter) -> None:
        original = parameter.data
        parameter.data = original.to(self.dtype)
        if not parameter.requires_grad:
            return
        if self.dtype is torch.float32:
            self._masters[name] = parameter
            return
        parameter.register_post_accumulate_grad_hook(partial(self._accumulate, name))
        if self._config.optim.master == "none":
            self._masters[name] = parameter
            return
        master = original.to(torch.float32, copy=True).requires_grad_()
        self._masters[name] = master
        self._pairs.append((parameter, master))

    def _sums_device(self) -> torch.device:
        return torch.device("cpu") if self._config.optim.offload == "states+gradients" else self._device

    @torch.no_grad()
    def _accumulate(self, name: str, half: Tensor) -> None:
        assert half.grad is not None
        gradient, half.grad = half.grad.to(self._sums_device()), None
        if (total := self._sums.get(name)) is None:
            dtype = torch.float32 if self._chance is None else torch.bfloat16
            self._sums[name] = gradient.to(dtype, copy=True)
        elif self._chance is None:
            total.add_(gradient)
        else:
            _add_by_chance(total, gradient, self._chance)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        if self._chance is not None and not self._sums:
            self._chance.manual_seed(
                int(rng(self._config.run.seed, "accumulate", self._optimizer.steps()).integers(2**62))
            )
        _poisoned(loss).backward()
        self._ready = last

    def step(self, lr: float) -> StepResult:
        _check_ready(self._ready)
        gradients = [self._gradient(name, master) for name, master in self._masters.items()]
        norm = _norm(gradients)
        result = StepResult(math.isfinite(norm), float(norm))
        if result.applied:
            clip = self._config.optim.clip
            scale: Tensor | float = (clip / (norm + 1e-6)).clamp(max=1.0).to(self._device) if clip else 1.0
            _set_lr(self._optimizer, lr)
            self._optimizer.step(scale=scale, gradients=gradients)
            self._refresh()
        self._optimizer.zero_grad(set_to_none=True)
        self._sums.clear()
        self._ready = False
        return result

    def _gradient(self, name: str, master: Tensor) -> Tensor:
        found = master.grad if self.dtype is torch.float32 else self._sums.get(name)
        if found is None:  # unused in the forward pass: it still decays, as it does under ZeRO
            found = torch.zeros_like(master, dtype=torch.float32)
        return found

    @torch.no_grad()
    def _refresh(self) -> None:
        for parameter, master in self._pairs:
            parameter.copy_(master)

    def save(self, folder: Path) -> None:
        _write(folder, 0, self._held, self._optimizer, self.unet)

    def load(self, folder: Path) -> None:
        _read(folder, self._held, self._optimizer, self.unet)
        self._refresh()

    def full_state(self) -> dict[str, Tensor]:
        frozen = {name: p for name, p in self.unet.named_parameters() if not p.requires_grad}
        weights = {name: p.detach().float() for name, p in {**frozen, **self._masters}.items()}
        return {name: t.cpu().clone() for name, t in {**weights, **_persistent_buffers(self.unet)}.items()}


def _norm(gradients: list[Tensor]) -> Tensor:
    """The global norm, in fp32 whatever the gradients are in."""
    if all(g.dtype is torch.float32 for g in gradients):
        return torch.nn.utils.get_total_norm(gradients)
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]))
