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
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from smpo_fast.common.errors import UserError
from smpo_fast.common.runtime import World
from smpo_fast.config.schema import Config
from smpo_fast.engine.aligned_adamw8bit import ALIGNED, AlignedAdamW8bit
from smpo_fast.engine.optimizer_states import _BITSANDBYTES, _RESTORE
from smpo_fast.engine.shards import Reader, Slice


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
        raise UserError(
            f"optim.name = '{name}' needs bitsandbytes: pip install bitsandbytes (or take {ALIGNED} or adamw)"
        ) from error
    finally:
        if hide:
            del modules["kernels"]
    return bitsandbytes
