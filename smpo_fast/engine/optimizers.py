"""The optimizers, applied to parameter slices: the result of a step does not depend on which rank owns which slice.

ZeRO gives an optimizer flat tensors in which many parameters follow one another, cut where a rank's share ends.
``SlicedOptimizer`` wraps the real optimizer and updates the slice of every parameter by itself. So the blocks of
quantised states never reach from one parameter into the next, small parameters keep fp32 states as the library
intends, and states are saved and loaded per parameter, for any other number of ranks or ZeRO stage.

``optim.name``, and the bytes it keeps per parameter in addition to the weights (``STATE_BYTES``):

    adamw               8       torch, fused on a GPU
    adamw8bit           2.03    bitsandbytes
    paged_adamw8bit     2.03    bitsandbytes; the driver moves states to the host when the GPU is full
    lion8bit            1.02    bitsandbytes
    adamw8bit_aligned   2.03    smpo_fast.kernels.adamw8bit: the same result for every sharding
    adafactor           ~0      transformers; 0.38 for SDXL's UNet, whose 3x3 kernels are factored as 3x3 matrices

bitsandbytes counts blocks from the start of a rank's slice. Slices that are whole parameters are updated bit for bit as
in one process; slices that a rank's share cuts (at most two per rank under ZeRO 1 and 2, all under ZeRO 3) have other
blocks.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from smpo_fast.common.errors import EnvironmentProblem
from smpo_fast.common.runtime import World
from smpo_fast.config.schema import Config
from smpo_fast.engine.aligned_adamw8bit import ALIGNED, AlignedAdamW8bit
from smpo_fast.engine.optimizer_states import BITSANDBYTES_CLASSES, RESTORE
from smpo_fast.engine.shards import ParameterSlice, ShardReader


class LocalSlice(NamedTuple):
    """A parameter slice that this process updates, and where its weights are."""

    param_slice: ParameterSlice
    parameter_numel: int
    """Elements of the whole parameter."""
    owner: Tensor
    """The tensor that the engine gives to the optimizer: the parameter itself, or a flat tensor of many."""
    start: int = 0
    """Index of the slice's first element in the owner."""

    def values(self) -> Tensor:
        """The weights of the slice: in the parameter's shape where it is the owner, else flat."""
        weights = self.owner.detach()
        return weights if self.is_parameter() else weights.narrow(0, self.start, self.param_slice.numel)

    def is_parameter(self) -> bool:
        """Whether the slice is a whole parameter that is its own owner."""
        return self.owner.numel() == self.param_slice.numel == self.parameter_numel


def whole_parameters(parameters: Mapping[str, Tensor]) -> list[LocalSlice]:
    """Parameters of any shape, by name, as slices that are not cut."""
    return [LocalSlice(ParameterSlice(name, 0, p.numel()), p.numel(), p) for name, p in parameters.items()]


def make_optimizer(parameters: Iterable[Tensor], config: Config, world: World) -> SlicedOptimizer:
    """The optimizer named in the settings for tensors of any shape; call its ``assign_slices`` before the first step.

    Raises EnvironmentProblem when bitsandbytes is needed and missing.
    """
    if config.optim.name in BITSANDBYTES_CLASSES:
        _import_bitsandbytes(config.optim.name)
    return SlicedOptimizer(parameters, config, world)


class _StepGroup(NamedTuple):
    """Slices that are updated in one call, a tensor for each, and the optimizer that updates them."""

    slices: list[LocalSlice]
    tensors: list[Tensor]
    inner: Any


class SlicedOptimizer(torch.optim.Optimizer):
    """The optimizer named in the settings, for parameters of any shape or for flat tensors of slices."""

    def __init__(self, parameters: Iterable[Tensor], config: Config, world: World) -> None:
        super().__init__(parameters, {"lr": config.optim.lr})
        self._config, self._world = config, world
        self._groups: list[_StepGroup] = []
        self._group_of: dict[int, int] = {}  # id of an owner -> index in _groups
        self._tensors: dict[ParameterSlice, tuple[Tensor, Any]] = {}  # the tensor of a slice, and its optimizer

    def assign_slices(self, owners: Sequence[Sequence[Tensor]], slices: Iterable[LocalSlice]) -> None:
        """Set which slices the owners contain. Collective.

        owners: the tensors, of any shape, that each call of ``step`` updates.
        """
        self._group_of = {id(owner): i for i, group in enumerate(owners) for owner in group}
        groups: list[list[LocalSlice]] = [[] for _ in owners]
        for local in slices:
            groups[self._group_of[id(local.owner)]].append(local)
        self._groups, self._tensors = [], {}
        for group in groups:
            tensors = [local.owner if local.is_parameter() else local.values().requires_grad_() for local in group]
            inner = self._make_inner(group, tensors)
            self._groups.append(_StepGroup(group, tensors, inner))
            self._tensors |= {local.param_slice: (t, inner) for local, t in zip(group, tensors, strict=True)}

    def _make_inner(self, slices: list[LocalSlice], tensors: list[Tensor]) -> Any:
        if self._config.optim.name == ALIGNED:
            optim = self._config.optim
            inner: Any = AlignedAdamW8bit(
                tensors, optim.lr, (optim.beta1, optim.beta2), optim.eps, optim.weight_decay,
                slices=[(local.param_slice, local.parameter_numel) for local in slices],
                seed=self._config.run.seed, on_host=optim.offload != "none", world=self._world,
            )  # fmt: skip
        else:
            # torch's constructors refuse an empty list, which a rank beyond the last parameter has
            inner = _library_optimizer(tensors, self._config, self._world) if tensors else None
        if inner is not None:
            inner.state = self.state  # all states in one place
        return inner

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: None = None, *, scale: Tensor | float = 1.0, gradients: Sequence[Tensor] | None = None
    ) -> None:
        """Update the owners in ``param_groups`` with ``scale`` (a scalar) times their gradients.

        gradients: one for each owner, shaped like it, where they cannot be its ``.grad``; adamw8bit_aligned takes
        them in any floating-point type and from the host. Collective for adamw8bit_aligned.
        """
        owners = [p for group in self.param_groups for p in group["params"]]
        given = None if gradients is None else {id(p): g for p, g in zip(owners, gradients, strict=True)}
        for i in dict.fromkeys(self._group_of[id(owner)] for owner in owners):
            group = self._groups[i]
            if group.inner is None:
                continue
            sums = [_gradient(local, given) for local in group.slices]
            for local, tensor in zip(group.slices, group.tensors, strict=True):
                if not local.is_parameter():
                    tensor.data = local.values()  # owners may have been moved
            for inner_group in group.inner.param_groups:
                inner_group["lr"] = self.param_groups[0]["lr"]
            if isinstance(group.inner, AlignedAdamW8bit):
                group.inner.step(scale=scale, gradients=sums)
            else:
                _step_library_optimizer(group, sums, scale)

    def states(self, param_slice: ParameterSlice) -> Iterator[tuple[str, Tensor]]:
        """The states of a slice to be saved, as (kind, tensor); none before the first step."""
        for kind, value in self.state.get(self._tensors[param_slice][0], {}).items():
            if not kind.startswith("qmap"):  # bitsandbytes' table of codes is a constant
                yield kind, value if isinstance(value, Tensor) else torch.tensor([value])

    def restore(self, param_slice: ParameterSlice, saved: ShardReader) -> None:
        """Load what ``states`` returned for this slice, however the parameter was cut then.

        bitsandbytes states of a slice that was cut differently are read in fp32 and quantised again. Raises
        CheckpointError for states that are missing.
        """
        if saved.slices(param_slice.name, "step"):  # else it was saved before the first step
            tensor, inner = self._tensors[param_slice]
            RESTORE[self._config.optim.name](inner, tensor, param_slice, saved)

    def steps(self) -> int:
        """The number of steps made."""
        made = (state["step"] for state in self.state.values() if "step" in state)
        return int(next(made, 0))


def _gradient(local: LocalSlice, given: dict[int, Tensor] | None) -> Tensor:
    whole = local.owner.grad if given is None else given[id(local.owner)]
    assert whole is not None, f"{local.param_slice.name} has no gradient"
    return whole if local.is_parameter() else whole.narrow(0, local.start, local.param_slice.numel)


def _step_library_optimizer(group: _StepGroup, gradients: list[Tensor], scale: Tensor | float) -> None:
    if isinstance(scale, Tensor) or scale != 1.0:
        torch._foreach_mul_(gradients, scale)
    for tensor, gradient in zip(group.tensors, gradients, strict=True):
        tensor.grad = gradient
    group.inner.step()
    for local, tensor in zip(group.slices, group.tensors, strict=True):
        if not local.is_parameter():
            tensor.grad = None


def _library_optimizer(tensors: list[Tensor], config: Config, world: World) -> torch.optim.Optimizer:
    optim = config.optim
    betas = (optim.beta1, optim.beta2)
    if optim.name == "adamw":
        fused = True if world.device.type == "cuda" else None  # also where the weights are offloaded to the host
        return torch.optim.AdamW(tensors, optim.lr, betas, optim.eps, optim.weight_decay, fused=fused)
    if optim.name in BITSANDBYTES_CLASSES:
        cls = getattr(_import_bitsandbytes(optim.name).optim, BITSANDBYTES_CLASSES[optim.name])
        eps = () if optim.name == "lion8bit" else (optim.eps,)
        return cast(torch.optim.Optimizer, cls(tensors, optim.lr, betas, *eps, optim.weight_decay))
    from transformers.optimization import Adafactor

    # The paper's recipe: an external learning rate, not scaled by the size of the parameter. torch's own Adafactor
    # always scales by it, so it is a different optimizer.
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
        raise EnvironmentProblem(
            f"optim.name = '{name}' needs bitsandbytes: pip install bitsandbytes (or take {ALIGNED} or adamw)"
        ) from error
    finally:
        if hide:
            del modules["kernels"]
    return bitsandbytes
