"""AdamW with 8-bit states whose results do not depend on the sharding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from smpo_fast.common.runtime import World, rng
from smpo_fast.engine.shards import ParameterSlice
from smpo_fast.kernels.adamw8bit import BLOCK, adamw8bit_block_max, adamw8bit_state, adamw8bit_step

ALIGNED = "adamw8bit_aligned"

STATE_NAMES = ("m8", "v8", "m_scale", "v_scale")


class AlignedAdamW8bit(torch.optim.Optimizer):
    """AdamW with 8-bit states whose blocks are counted from the parameter's start (smpo_fast.kernels.adamw8bit).

    Tensors have any shape, are contiguous or not, and are fp32, or bf16 with stochastic rounding. slices: the slice of
    a parameter that each tensor is, and how many elements the whole parameter has; without it each tensor is a
    parameter. The rounding depends on ``seed``, the parameter's name, the step, and the index of the element. on_host:
    states are kept in (pinned) host memory and copied to the device while their parameter is updated.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        slices: Sequence[tuple[ParameterSlice, int]] | None = None,
        seed: int = 0,
        on_host: bool = False,
        world: World | None = None,
    ) -> None:
        tensors = list(params)
        # a rank without any slice takes part in the collectives too
        super().__init__(tensors or [torch.zeros(0)], dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.param_groups[0]["params"] = tensors
        if slices is None:
            slices = [(ParameterSlice(str(i), 0, p.numel()), p.numel()) for i, p in enumerate(tensors)]
        self._slices = dict(zip(tensors, slices, strict=True))
        self._seeds = {
            p: int(rng(seed, f"round/{param_slice.name}").integers(2**63))
            for p, (param_slice, _) in self._slices.items()
        }
        self._on_host, self._world = on_host, world or World()
        self._slots = self._number_cut_blocks()

    def _number_cut_blocks(self) -> dict[tuple[str, int], int]:
        """(parameter, block) -> its number among the blocks that are cut on any rank: the same on every rank."""
        mine = [(part.name, b) for part, numel in self._slices.values() for b in _cut_blocks(part, numel)]
        everyone: list[Any] = [mine]
        if self._world.size > 1:
            everyone = [None] * self._world.size
            torch.distributed.all_gather_object(everyone, mine)
        return {key: i for i, key in enumerate(sorted({key for keys in everyone for key in keys}))}

    def state_of(self, tensor: Tensor) -> dict[str, Any]:
        """The state of one of the tensors, of any shape; zeros before its first step."""
        state = self.state[tensor]
        if not state:
            device = torch.device("cpu") if self._on_host else tensor.device
            made = adamw8bit_state(tensor.numel(), device, self._slices[tensor][0].offset)
            pin = self._on_host and tensor.device.type == "cuda"
            state |= {"step": 0, **{name: t.pin_memory() if pin else t for name, t in made._asdict().items()}}
        return state

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: None = None, *, scale: Tensor | float = 1.0, gradients: Sequence[Tensor | None] | None = None
    ) -> None:
        """One step with ``scale`` times the gradients; a tensor without a gradient does not change. Collective.

        scale: a scalar. gradients: one for each tensor, in order and shaped like it, where they cannot be its
        ``.grad``: of another dtype, or on the host.
        """
        tensors = [(group, p) for group in self.param_groups for p in group["params"]]
        found = [p.grad for _, p in tensors] if gradients is None else list(gradients)
        updates = [(group, p, g.reshape(-1)) for (group, p), g in zip(tensors, found, strict=True) if g is not None]
        maxima = self._maxima_of_cut_blocks(updates, scale) if self._slots else None
        for group, p, gradient in updates:
            self._update(group, p, gradient, scale, maxima)
        if self._on_host and self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)  # once: the states are then in the host's memory

    def _maxima_of_cut_blocks(
        self, updates: list[tuple[dict[str, Any], Tensor, Tensor]], scale: Tensor | float
    ) -> Tensor:
        """The largest |m| and v of every cut block over all ranks, [2, cut blocks]."""
        largest = torch.full((2, len(self._slots)), -1.0, device=self._world.device)
        for group, p, gradient in updates:
            param_slice, numel = self._slices[p]
            state = self.state_of(p)
            for block in _cut_blocks(param_slice, numel):
                low = max(param_slice.offset, block * BLOCK) - param_slice.offset
                high = min(param_slice.end, (block + 1) * BLOCK) - param_slice.offset
                i = block - param_slice.offset // BLOCK
                states = [state[s][i : i + 1] if s.endswith("scale") else state[s][low:high] for s in STATE_NAMES]
                beta1, beta2 = group["betas"]
                maxima = adamw8bit_block_max(
                    gradient[low:high].to(p.device), *(s.to(p.device) for s in states), beta1=beta1, beta2=beta2,
                    grad_scale=scale, offset=param_slice.offset + low,
                )  # fmt: skip
                slot = largest[:, self._slots[param_slice.name, block]]
                slot.copy_(torch.maximum(slot, torch.cat(maxima).to(slot.device)))
        if self._world.size > 1:
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        return largest

    def _update(
        self, group: dict[str, Any], p: Tensor, gradient: Tensor, scale: Tensor | float, maxima: Tensor | None
    ) -> None:
        param_slice, numel = self._slices[p]
        state = self.state_of(p)
        state["step"] += 1
        states = [state[name].to(p.device, non_blocking=True) for name in STATE_NAMES]
        m_max = v_max = None
        if maxima is not None and (cut := _cut_blocks(param_slice, numel)):
            m_max, v_max = torch.full((2, len(states[2])), -1.0, device=p.device)
            for block in cut:
                i = block - param_slice.offset // BLOCK
                m_max[i], v_max[i] = maxima[:, self._slots[param_slice.name, block]]
        weight = p.reshape(-1)  # a copy where the parameter is not contiguous
        beta1, beta2 = group["betas"]
        adamw8bit_step(
            weight, gradient.to(p.device), *states, lr=group["lr"], beta1=beta1, beta2=beta2, eps=group["eps"],
            weight_decay=group["weight_decay"], step=state["step"], grad_scale=scale, seed=self._seeds[p],
            offset=param_slice.offset, m_max=m_max, v_max=v_max,
        )  # fmt: skip
        if not p.is_contiguous():
            p.copy_(weight.view(p.shape))
        for name, moved in zip(STATE_NAMES, states, strict=True):
            if moved is not state[name]:
                state[name].copy_(moved, non_blocking=True)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Like torch's, which would cast the 8-bit codes to the dtype of the weights."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        for i, p in enumerate(p for group in self.param_groups for p in group["params"]):
            for name, value in state_dict["state"].get(i, {}).items():
                state = self.state_of(p)
                if isinstance(value, Tensor):
                    state[name].copy_(value)
                else:
                    state[name] = value


def _cut_blocks(param_slice: ParameterSlice, parameter_numel: int) -> list[int]:
    """The blocks of a parameter that lie in a slice only partly; the rest of them is on another rank."""
    start, end = param_slice.offset, param_slice.end
    first, last = start // BLOCK, (end - 1) // BLOCK
    cut = [first] if start % BLOCK else []
    return sorted({*cut, *([last] if end % BLOCK and end < parameter_numel else [])})
