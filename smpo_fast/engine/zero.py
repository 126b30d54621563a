"""The engine on DeepSpeed, ZeRO stage 0 to 3."""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import json
import logging
import math
import os
import socket
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from smpo_fast.common.runtime import COMPUTE_DTYPES as DTYPES
from smpo_fast.common.runtime import World
from smpo_fast.config.schema import Config
from smpo_fast.engine.ds_config import zero_stage
from smpo_fast.engine.optimizers import Held, make_optimizer
from smpo_fast.engine.protocol import COLLECTIVE_TIMEOUT, StepResult, _check_ready, _layout, _poisoned, _set_lr
from smpo_fast.engine.shards import Slice
from smpo_fast.engine.state_files import _persistent_buffers, _read, _whole, _write

_SCALER = "loss_scale.json"


class _ForwardCounter(nn.Module):
    """The policy as its callers see it: the module's own attributes, with forward passes through DeepSpeed.

    DeepSpeed's engine is no stand-in for the module: its ``config`` is DeepSpeed's, and its ``training`` flag
    does not follow ``eval()``.
    """

    def __init__(self, module: nn.Module, deepspeed_engine: nn.Module) -> None:
        super().__init__()
        self.module = module
        object.__setattr__(self, "_deepspeed", deepspeed_engine)  # no child: it holds the module too

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._deepspeed(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


class DeepSpeedEngine:
    """ZeRO 0 to 3 on all ranks of ``world``."""

    def __init__(self, unet: nn.Module, config: Config, world: World, precision: str, settings: dict[str, Any]) -> None:
        deepspeed = _import_deepspeed(world)
        self.dtype = DTYPES[precision]
        self._stage = zero_stage(settings)
        self.layout = _layout("deepspeed", self._stage, world, precision, config)
        self._module, self._world = unet, world
        named = [(name, p) for name, p in unet.named_parameters() if p.requires_grad]
        originals = {name: p.data.cpu() for name, p in named if p.dtype is not self.dtype}
        for parameter in unet.parameters():
            parameter.data = parameter.data.to(self.dtype)
        unet.to(world.device)
        self._optimizer = make_optimizer([p for _, p in named], config, world)
        with contextlib.redirect_stdout(io.StringIO()):  # its bf16 optimizer prints memory tables
            self._engine, *_ = deepspeed.initialize(model=unet, optimizer=self._optimizer, config=settings)
        owners, self._held = self._find_slices()
        self._optimizer.hold(owners, self._held)
        if self.dtype is not torch.float32:
            self._restore_masters(originals)
        self.unet: nn.Module = _ForwardCounter(unet, self._engine)
        self._ready = False

    def _find_slices(self) -> tuple[list[list[Tensor]], list[Held]]:
        """What DeepSpeed steps at a time, and where in it this rank's slices of the parameters lie."""
        trained = {name: p for name, p in self._module.named_parameters() if p.requires_grad}
        zero, groups = self._engine.optimizer, self._optimizer.param_groups
        if self._stage == 0:
            return [list(trained.values())], _whole(cast(dict[str, Tensor], trained))
        held = []
        if self._stage < 3:
            for name, p in trained.items():
                if (mapped := p._hp_mapping) is not None:  # type: ignore[attr-defined]
                    piece = Slice(name, mapped.lp_fragment_address.start, mapped.lp_fragment_address.numel)
                    owner = groups[mapped.param_group_index]["params"][0]
                    held.append(Held(piece, p.numel(), owner, mapped.hp_fragment_address.start))
            return [[group["params"][0]] for group in groups], held
        for name, p in trained.items():
            group, start, share = zero.grad_position[zero.get_param_id(p)]
            offset, total = share * self._world.rank, p.ds_numel  # type: ignore[attr-defined]
            if offset < total:
                piece = Slice(name, offset, min(share, total - offset))
                held.append(Held(piece, total, zero.fp32_partitioned_groups_flat[group], start))
        return [[flat] for flat in zero.fp32_partitioned_groups_flat], held

    @torch.no_grad()
    def _restore_masters(self, originals: dict[str, Tensor]) -> None:
        """DeepSpeed makes the fp32 master weights from the rounded ones: give them back the digits they lost."""
        for one in self._held:
            if (original := originals.get(one.piece.name)) is not None:
                one.values().copy_(original.flatten()[one.piece.offset :][: one.piece.numel])

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        # The loss is a share of the mean already: DeepSpeed would divide by the number of micro-batches again.
        self._engine.backward(_poisoned(loss), scale_wrt_gas=False)
        self._ready = last

    def step(self, lr: float) -> StepResult:
        _check_ready(self._ready)
        self._ready = False
        _set_lr(self._engine.optimizer, lr)
        if self._stage == 0:
            return self._step_unsharded()
        self._engine.step()
        applied = bool(self._engine.was_step_applied())
        return StepResult(applied, float(self._engine.get_global_grad_norm()))

    def _step_unsharded(self) -> StepResult:
        """At stage 0 in fp32 DeepSpeed has no check for non-finite gradients of its own."""
        # The gradients are averaged already, so the norm is the same on every rank.
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._module.parameters() if p.grad is not None])
        result = StepResult(math.isfinite(norm), float(norm))
        if result.applied:
            self._engine.step()
        else:
            self._engine.zero_grad()
        return result

    def save(self, folder: Path) -> None:
        mine = self._held if self._stage > 0 or self._world.rank == 0 else []
        _write(folder, self._world.rank, mine, self._optimizer, self._module)
        if self.dtype is torch.float16 and self._world.rank == 0:
            (folder / _SCALER).write_text(json.dumps(_numbers_of(self._engine.optimizer.loss_scaler)))

    def load(self, folder: Path) -> None:
        problem: Exception | None = None
        try:
            _read(folder, self._held, self._optimizer, self._module)
            if self.dtype is torch.float16:
                vars(self._engine.optimizer.loss_scaler).update(json.loads((folder / _SCALER).read_text()))
        except Exception as error:
            problem = error
        problems: list[Any] = [None] * self._world.size
        torch.distributed.all_gather_object(problems, problem)
        if found := next((p for p in problems if p is not None), None):
            raise found
        self._spread_masters()

    @torch.no_grad()
    def _spread_masters(self) -> None:
        """Make the weights that compute from the master weights, on all ranks."""
        zero = self._engine.optimizer
        if self._stage in (1, 2):
            zero.update_lp_params()
        elif self._stage == 3:
            zero._partition_all_parameters()
            for group in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(group)
            zero._post_step(set())

    @torch.no_grad()
    def full_state(self) -> dict[str, Tensor]:
        state = {}
        for name, parameter in self._module.named_parameters():
            weights = self._gathered(parameter)
            if self._world.rank == 0:
                state[name] = weights.float().cpu().clone()
        if self._world.rank == 0:
            state |= {name: b.cpu().clone() for name, b in _persistent_buffers(self._module).items()}
        return state

    def _gathered(self, parameter: nn.Parameter) -> Tensor:
        import deepspeed

        if parameter.requires_grad and self._stage > 0:
            return cast(Tensor, deepspeed.utils.safe_get_full_fp32_param(parameter))
        if self._stage < 3:
            return parameter.detach()
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()


def shutdown() -> None:
    """Leave the process group, if there is one; called at exit by itself, and harmless to call earlier."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _numbers_of(loss_scaler: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(loss_scaler).items() if isinstance(value, (bool, int, float))}


@functools.cache
def _import_deepspeed(world: World) -> Any:
    """DeepSpeed, with the process group it needs, also without a launcher."""
    # DeepSpeed picks its device when imported; run.device = "cpu" on a GPU machine must reach it.
    os.environ["DS_ACCELERATOR"] = world.device.type
    if "MASTER_PORT" not in os.environ and world.size == 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that torch is giving up: hundreds of lines that no user can act on.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # On CPU it would compile an operator for inference that training never calls: a minute, and a C++ compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    deepspeed.init_distributed(backend, verbose=False, timeout=COLLECTIVE_TIMEOUT)
    atexit.register(shutdown)  # gloo's threads abort a process that ends without it
    return deepspeed
