"""The optimizers, by name, on slices of parameters: what a step does does not depend on who holds which slice.

ZeRO hands an optimizer flat tensors in which many parameters lie behind one another, cut where a rank's share ends.
``SlicedOptimizer`` stands between: it steps the slice of every parameter by itself. So the blocks of quantised
states never run from one parameter into the next, small parameters keep fp32 states as the library means it, and
states are saved and read per parameter, for any other number of ranks or ZeRO stage.

``optim.name`` and what it keeps beside the weights, in bytes a parameter (``STATE_BYTES``):

    adamw               8       torch, fused with a GPU
    adamw8bit           2.03    bitsandbytes
    paged_adamw8bit     2.03    bitsandbytes; the driver moves states to the host where the GPU has no room
    lion8bit            1.02    bitsandbytes
    adamw8bit_aligned   2.03    smpo_fast.kernels.adamw8bit: the same result however it is sharded
    adafactor           ~0      transformers; 0.38 for SDXL's UNet, whose 3x3 kernels are factored as 3x3 matrices

bitsandbytes counts blocks from where a rank's slice starts. Slices that are whole parameters step bit for bit as in one
process; those that a rank's share cuts (at most two a rank under ZeRO 1 and 2, all under ZeRO 3) have other blocks.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from smpo_fast.config import Config, SettingsError
from smpo_fast.kernels.adamw8bit import BLOCK, adamw8bit_block_max, adamw8bit_state, adamw8bit_step
from smpo_fast.runtime import World, rng
from smpo_fast.slices import Reader, Slice

STATE_BYTES: dict[str, float] = {
    "adamw": 8.0,
    "adamw8bit": 2 + 8 / 256,
    "paged_adamw8bit": 2 + 8 / 256,
    "lion8bit": 1 + 4 / 256,
    "adamw8bit_aligned": 2 + 8 / BLOCK,
    "adafactor": 0.0,
}
ALIGNED = "adamw8bit_aligned"
_BITSANDBYTES = {"adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit", "lion8bit": "Lion8bit"}


class Held(NamedTuple):
    """A slice of a parameter that this process updates, and where it lies."""

    piece: Slice
    total: int
    """Elements of the whole parameter."""
    owner: Tensor
    """What the engine hands to the optimizer: the parameter itself, or a flat tensor of many."""
    start: int = 0
    """The slice's first element in the owner."""

    def values(self) -> Tensor:
        """The slice's weights: in the parameter's shape where it is the owner, else flat."""
        weights = self.owner.detach()
        return weights if self.owns_all() else weights.narrow(0, self.start, self.piece.numel)

    def owns_all(self) -> bool:
        """Whether the owner is the parameter itself."""
        return self.owner.numel() == self.piece.numel == self.total


def make_optimizer(parameters: Iterable[Tensor], config: Config, world: World) -> SlicedOptimizer:
    """The optimizer that the settings name; ``hold`` tells it where the slices lie. Imports what it needs.

    Raises SettingsError for a missing bitsandbytes.
    """
    if config.optim.name in _BITSANDBYTES:
        _import_bitsandbytes(config.optim.name)
    return SlicedOptimizer(parameters, config, world)


class _Part(NamedTuple):
    """Slices that are stepped in one call, the tensors that stand for them, and who steps them."""

    held: list[Held]
    tensors: list[Tensor]
    inner: Any


class SlicedOptimizer(torch.optim.Optimizer):
    """The optimizer that the settings name, for parameters or for flat tensors of slices."""

    def __init__(self, parameters: Iterable[Tensor], config: Config, world: World) -> None:
        super().__init__(parameters, {"lr": config.optim.lr})
        self._config, self._world = config, world
        self._parts: list[_Part] = []
        self._part_of: dict[int, int] = {}  # id of an owner -> place in _parts
        self._stands: dict[Slice, tuple[Tensor, Any]] = {}  # the tensor that stands for a slice, and who steps it

    def hold(self, owners: Sequence[Sequence[Tensor]], held: Iterable[Held]) -> None:
        """Say where the slices lie. ``owners``: the tensors of each call of ``step``. Collective."""
        self._part_of = {id(owner): i for i, group in enumerate(owners) for owner in group}
        groups: list[list[Held]] = [[] for _ in owners]
        for one in held:
            groups[self._part_of[id(one.owner)]].append(one)
        self._parts, self._stands = [], {}
        for group in groups:
            tensors = [h.owner if h.owns_all() else h.values().requires_grad_() for h in group]
            inner = self._make(group, tensors)
            self._parts.append(_Part(group, tensors, inner))
            self._stands |= {h.piece: (t, inner) for h, t in zip(group, tensors, strict=True)}

    def _make(self, held: list[Held], tensors: list[Tensor]) -> Any:
        if self._config.optim.name == ALIGNED:
            pieces = [(h.piece, h.total) for h in held]
            optim = self._config.optim
            inner: Any = AlignedAdamW8bit(
                tensors, optim.lr, (optim.beta1, optim.beta2), optim.eps, optim.weight_decay, pieces=pieces,
                seed=self._config.run.seed, on_host=optim.offload != "none", world=self._world,
            )  # fmt: skip
        else:
            # torch's constructors refuse an empty list, which a rank beyond the last parameter has
            inner = _make_inner(tensors, self._config, self._world) if tensors else None
        if inner is not None:
            inner.state = self.state  # one place to look at
        return inner

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: None = None, *, scale: Tensor | float = 1.0, gradients: Sequence[Tensor] | None = None
    ) -> None:
        """Update the owners in ``param_groups`` with ``scale`` times their gradients.

        gradients: of the parameters in ``param_groups``, where they cannot be their ``.grad``; adamw8bit_aligned takes
        them in any float type and from the host. Collective for adamw8bit_aligned.
        """
        owners = [p for group in self.param_groups for p in group["params"]]
        given = None if gradients is None else {id(p): g for p, g in zip(owners, gradients, strict=True)}
        for i in dict.fromkeys(self._part_of[id(owner)] for owner in owners):
            part = self._parts[i]
            if part.inner is None:
                continue
            sums = [_gradient(h, given) for h in part.held]
            for held, tensor in zip(part.held, part.tensors, strict=True):
                if not held.owns_all():
                    tensor.data = held.values()  # owners may have been moved
            for group in part.inner.param_groups:
                group["lr"] = self.param_groups[0]["lr"]
            if isinstance(part.inner, AlignedAdamW8bit):
                part.inner.step(scale=scale, gradients=sums)
            else:
                _step_inner(part, sums, scale)

    def numbers(self, piece: Slice) -> Iterator[tuple[str, Tensor]]:
        """What is kept for a slice beside its weights, as (word, tensor) to be saved; nothing before the first step."""
        for word, value in self.state.get(self._stands[piece][0], {}).items():
            if not word.startswith("qmap"):  # bitsandbytes' table of codes is a constant
                yield word, value if isinstance(value, Tensor) else torch.tensor([value])

    def restore(self, piece: Slice, saved: Reader) -> None:
        """Take from ``saved`` what ``numbers`` gave for this slice, however the parameter was cut then.

        bitsandbytes' states of a slice that was cut otherwise are read in fp32 and quantised again. Raises
        SettingsError for what is not there.
        """
        if saved.slices(piece.name, "step"):  # else it was saved before the first step
            tensor, inner = self._stands[piece]
            _RESTORE[self._config.optim.name](inner, tensor, piece, saved)

    def steps(self) -> int:
        """How many steps have been made."""
        made = (state["step"] for state in self.state.values() if "step" in state)
        return int(next(made, 0))


def _gradient(held: Held, given: dict[int, Tensor] | None) -> Tensor:
    whole = held.owner.grad if given is None else given[id(held.owner)]
    assert whole is not None, f"{held.piece.name} has no gradient"
    return whole if held.owns_all() else whole.narrow(0, held.start, held.piece.numel)


def _step_inner(part: _Part, gradients: list[Tensor], scale: Tensor | float) -> None:
    if isinstance(scale, Tensor) or scale != 1.0:
        torch._foreach_mul_(gradients, scale)
    for tensor, gradient in zip(part.tensors, gradients, strict=True):
        tensor.grad = gradient
    part.inner.step()
    for held, tensor in zip(part.held, part.tensors, strict=True):
        if not held.owns_all():
            tensor.grad = None


# --- the libraries' own ---------------------------------------------------------------------------------------


def _make_inner(tensors: list[Tensor], config: Config, world: World) -> torch.optim.Optimizer:
    optim = config.optim
    betas = (optim.beta1, optim.beta2)
    if optim.name == "adamw":
        fused = True if world.device.type == "cuda" else None  # also where the weights are offloaded to the host
        return torch.optim.AdamW(tensors, optim.lr, betas, optim.eps, optim.weight_decay, fused=fused)
    if optim.name in _BITSANDBYTES:
        kind = getattr(_import_bitsandbytes(optim.name).optim, _BITSANDBYTES[optim.name])
        eps = () if optim.name == "lion8bit" else (optim.eps,)
        return cast(torch.optim.Optimizer, kind(tensors, optim.lr, betas, *eps, optim.weight_decay))
    from transformers.optimization import Adafactor

    # The paper's recipe: an outer learning rate, no scaling by the size of the parameter. torch's own
    # Adafactor always scales by it, so it is another optimizer.
    return Adafactor(
        tensors, lr=optim.lr, clip_threshold=1.0, weight_decay=optim.weight_decay, scale_parameter=False,
        relative_step=False, warmup_init=False,
    )  # fmt: skip


def _import_bitsandbytes(name: str) -> Any:
    # On some CPUs its import fetches a compiled 4-bit kernel from the hub through the package `kernels`, and
    # warns where that is not installed. Training needs no such kernel, and runs no code from the network.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    modules = cast(dict[str, Any], sys.modules)
    hide = "kernels" not in modules
    if hide:
        modules["kernels"] = None
    try:
        import bitsandbytes
    except ImportError as error:
        raise SettingsError(
            f"optim.name = '{name}' needs bitsandbytes: pip install bitsandbytes (or take {ALIGNED} or adamw)"
        ) from error
    finally:
        if hide:
            del modules["kernels"]
    return bitsandbytes


def _steps_saved(piece: Slice, saved: Reader) -> int:
    """Every slice of a parameter has made as many steps."""
    found = saved.exact(saved.slices(piece.name, "step")[0], "step")
    assert found is not None
    return int(found)


_MOMENTS = ("exp_avg", "exp_avg_sq")


@torch.no_grad()
def _restore_adamw(inner: torch.optim.AdamW, tensor: Tensor, piece: Slice, saved: Reader) -> None:
    where = tensor.device if inner.param_groups[0]["fused"] else torch.device("cpu")
    inner.state[tensor] = {
        "step": torch.tensor(float(_steps_saved(piece, saved)), device=where),
        # in the weights' memory order, which fused kernels take for granted
        **{w: torch.empty_like(tensor).copy_(saved.elements(piece, w).view(tensor.shape)) for w in _MOMENTS},
    }


def _restore_adafactor(inner: torch.optim.Optimizer, tensor: Tensor, piece: Slice, saved: Reader) -> None:
    """Slices are whole parameters: it is refused where they could be others."""
    shapes = {
        "exp_avg_sq_row": tensor.shape[:-1], "exp_avg_sq_col": tensor.shape[:-2] + tensor.shape[-1:],
        "exp_avg_sq": tensor.shape, "RMS": (),
    }  # fmt: skip
    found = {word: saved.exact(piece, word) for word in shapes}
    kept = {w: value.to(tensor.device).view(shapes[w]) for w, value in found.items() if value is not None}
    inner.state[tensor] = {"step": _steps_saved(piece, saved), **kept}


def _restore_bitsandbytes(inner: Any, tensor: Tensor, piece: Slice, saved: Reader) -> None:
    from bitsandbytes import functional

    inner.init_state(inner.param_groups[0], tensor, 0, 0)  # so that paged states are in paged memory again
    state = inner.state[tensor]
    state["step"] = _steps_saved(piece, saved)
    for i, table in (("1", "dynamic"), ("2", "udynamic")):
        kept = state.get(f"state{i}")
        if kept is None:  # Lion has one
            continue
        codes, scales = saved.exact(piece, f"state{i}"), saved.exact(piece, f"absmax{i}")
        if codes is None:
            codes, scales = _dequantised(piece, f"state{i}", f"absmax{i}", inner.name2qmap[table], saved), None
            if kept.dtype is torch.uint8:
                codes, quantised = functional.quantize_blockwise(codes, inner.name2qmap[table].cpu(), blocksize=256)
                scales = quantised.absmax
        kept.copy_(codes.view_as(kept))
        if scales is not None:
            state[f"absmax{i}"].copy_(scales)


def _dequantised(piece: Slice, word: str, scales: str, table: Tensor, saved: Reader) -> Tensor:
    """A state of bitsandbytes in fp32, from slices that were cut otherwise."""
    from bitsandbytes import functional

    values, end = torch.full((piece.numel,), float("nan")), piece.offset + piece.numel
    for other in saved.slices(piece.name, word):
        low, high = max(piece.offset, other.offset), min(end, other.offset + other.numel)
        if low >= high:
            continue
        codes, absmax = saved.exact(other, word), saved.exact(other, scales)
        assert codes is not None
        if absmax is not None:
            codes = functional.dequantize_blockwise(codes, absmax=absmax, code=table.cpu(), blocksize=256)
        values[low - piece.offset : high - piece.offset] = codes[low - other.offset : high - other.offset]
    if values.isnan().any():
        raise SettingsError(f"'{word}' of {piece.name} is not complete: the checkpoint is of another network")
    return values


def _restore_aligned(inner: AlignedAdamW8bit, tensor: Tensor, piece: Slice, saved: Reader) -> None:
    state = inner.state_of(tensor)
    state["step"] = _steps_saved(piece, saved)
    for word in _STATES:
        state[word].copy_(saved.elements(piece, word, BLOCK if word.endswith("scale") else 1))


_RESTORE: dict[str, Callable[[Any, Tensor, Slice, Reader], None]] = {
    "adamw": _restore_adamw,
    "adafactor": _restore_adafactor,
    ALIGNED: _restore_aligned,
    **dict.fromkeys(_BITSANDBYTES, _restore_bitsandbytes),
}


# --- our own --------------------------------------------------------------------------------------------------

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
