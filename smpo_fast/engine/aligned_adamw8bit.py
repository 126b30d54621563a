"""AdamW with 8-bit states whose result does not depend on the sharding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from smpo_fast.common.runtime import World, rng
from smpo_fast.engine.shards import Slice
from smpo_fast.kernels.adamw8bit import BLOCK, adamw8bit_block_max, adamw8bit_state, adamw8bit_step

ALIGNED = "adamw8bit_aligned"

_STATES = ("m8", "v8", "m_scale", "v_scale")


class AlignedAdamW8bit(torch.optim.Optimizer):
    """AdamW with 8-bit states whose blocks are counted from the parameter's start (smpo_fast.kernels.adamw8bit).

    Parameters are contiguous or not, fp32, or bf16 that is rounded by chance. ``pieces`` says which slice of a
    parameter each tensor is, and how many elements the whole has; without it each is a parameter of its own. Chance
    depends on ``seed``, the parameter's name, the step, and the element's place. on_host: states are kept in (pinned)
    host memory and visit the device for the moment of their parameter's step.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        pieces: Sequence[tuple[Slice, int]] | None = None,
        seed: int = 0,
        on_host: bool = False,
        world: World | None = None,
    ) -> None:
        tensors = list(params)
        # a rank may hold nothing, and take part in the collectives all the same
        super().__init__(tensors or [torch.zeros(0)], dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.param_groups[0]["params"] = tensors
        if pieces is None:
            pieces = [(Slice(str(i), 0, p.numel()), p.numel()) for i, p in enumerate(tensors)]
        self._pieces = dict(zip(tensors, pieces, strict=True))
        self._seeds = {
            p: int(rng(seed, f"round/{piece.name}").integers(2**63)) for p, (piece, _) in self._pieces.items()
        }
        self._on_host, self._world = on_host, world or World()
        self._slots = self._agree_on_slots()

    def _agree_on_slots(self) -> dict[tuple[str, int], int]:
        """(parameter, block) -> place, of all blocks that are cut on any rank: the same on every rank."""
        mine = [(piece.name, b) for piece, total in self._pieces.values() for b in _cut_blocks(piece, total)]
        everyone: list[Any] = [mine]
        if self._world.size > 1:
            everyone = [None] * self._world.size
            torch.distributed.all_gather_object(everyone, mine)
        return {key: i for i, key in enumerate(sorted({key for keys in everyone for key in keys}))}

    def state_of(self, tensor: Tensor) -> dict[str, Any]:
        """The tensor's state; zeros before its first step."""
        state = self.state[tensor]
        if not state:
            where = torch.device("cpu") if self._on_host else tensor.device
            made = adamw8bit_state(tensor.numel(), where, self._pieces[tensor][0].offset)
            pin = self._on_host and tensor.device.type == "cuda"
            state |= {"step": 0, **{word: t.pin_memory() if pin else t for word, t in made._asdict().items()}}
        return state

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: None = None, *, scale: Tensor | float = 1.0, gradients: Sequence[Tensor | None] | None = None
    ) -> None:
        """One step with ``scale`` times the gradients; a tensor without one is left as it is. Collective.

        gradients: of the parameters in order, where they cannot be their ``.grad``: of another dtype, or on the host.
        """
        work = [(group, p) for group in self.param_groups for p in group["params"]]
        found = [p.grad for _, p in work] if gradients is None else list(gradients)
        ready = [(group, p, g.reshape(-1)) for (group, p), g in zip(work, found, strict=True) if g is not None]
        joint = self._joint_maxima(ready, scale) if self._slots else None
        for group, p, gradient in ready:
            self._update(group, p, gradient, scale, joint)

    def _joint_maxima(self, ready: list[tuple[dict[str, Any], Tensor, Tensor]], scale: Tensor | float) -> Tensor:
        """The largest |m| and v of every cut block over all ranks, [2, slots]."""
        largest = torch.full((2, len(self._slots)), -1.0, device=self._world.device)
        for group, p, gradient in ready:
            piece, total = self._pieces[p]
            state = self.state_of(p)
            for block in _cut_blocks(piece, total):
                low = max(piece.offset, block * BLOCK) - piece.offset
                high = min(piece.offset + piece.numel, (block + 1) * BLOCK) - piece.offset
                i = block - piece.offset // BLOCK
                parts = [state[w][i : i + 1] if w.endswith("scale") else state[w][low:high] for w in _STATES]
                beta1, beta2 = group["betas"]
                maxima = adamw8bit_block_max(
                    gradient[low:high].to(p.device), *(s.to(p.device) for s in parts), beta1=beta1, beta2=beta2,
                    grad_scale=scale, offset=piece.offset + low,
                )  # fmt: skip
                slot = largest[:, self._slots[piece.name, block]]
                slot.copy_(torch.maximum(slot, torch.cat(maxima).to(slot.device)))
        if self._world.size > 1:
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        return largest

    def _update(
        self, group: dict[str, Any], p: Tensor, gradient: Tensor, scale: Tensor | float, joint: Tensor | None
    ) -> None:
        piece, total = self._pieces[p]
        state = self.state_of(p)
        state["step"] += 1
        states = [state[word].to(p.device, non_blocking=True) for word in _STATES]
        m_max = v_max = None
        if joint is not None and (cut := _cut_blocks(piece, total)):
            m_max, v_max = torch.full((2, len(states[2])), -1.0, device=p.device)
            for block in cut:
                i = block - piece.offset // BLOCK
                m_max[i], v_max[i] = joint[:, self._slots[piece.name, block]]
        weight = p.reshape(-1)  # a copy where the parameter is not contiguous
        beta1, beta2 = group["betas"]
        adamw8bit_step(
            weight, gradient.to(p.device), *states, lr=group["lr"], beta1=beta1, beta2=beta2, eps=group["eps"],
            weight_decay=group["weight_decay"], step=state["step"], grad_scale=scale, seed=self._seeds[p],
            offset=piece.offset, m_max=m_max, v_max=v_max,
        )  # fmt: skip
        if not p.is_contiguous():
            p.copy_(weight.view(p.shape))
        for word, moved in zip(_STATES, states, strict=True):
            if moved is not state[word]:
                state[word].copy_(moved)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's own, which would cast the codes to the weights' dtype."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        for i, p in enumerate(p for group in self.param_groups for p in group["params"]):
            for word, value in state_dict["state"].get(i, {}).items():
                state = self.state_of(p)
                if isinstance(value, Tensor):
                    state[word].copy_(value)
                else:
                    state[word] = value


def _cut_blocks(piece: Slice, total: int) -> list[int]:
    """The blocks of a parameter that a slice has in part; the others' part is another rank's."""
    end = piece.offset + piece.numel
    first, last = piece.offset // BLOCK, (end - 1) // BLOCK
    cut = [first] if piece.offset % BLOCK else []
    return sorted({*cut, *([last] if end % BLOCK and end < total else [])})
