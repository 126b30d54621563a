"""The engine on DeepSpeed, ZeRO stage 0 to 3, and the import of DeepSpeed with its process group."""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import logging
import math
import os
import warnings
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from smpo_fast.common.runtime import COMPUTE_DTYPES, World
from smpo_fast.config.schema import Config
from smpo_fast.engine import collectives
from smpo_fast.engine.collectives import on_every_rank, shutdown
from smpo_fast.engine.ds_config import zero_stage
from smpo_fast.engine.ema import WeightAverage
from smpo_fast.engine.optimizers import LocalSlice, make_optimizer, whole_parameters
from smpo_fast.engine.protocol import (
    StepResult,
    describe_layout,
    free_tensors,
    largest_absolute,
    nan_unless_finite,
    require_last_backward,
    set_learning_rate,
)
from smpo_fast.engine.shards import ParameterSlice
from smpo_fast.engine.state_files import persistent_buffers, read_state, write_state

_LOSS_SCALE_FILE = "loss_scale.json"


class _PolicyModule(nn.Module):
    """The policy for its callers: forward passes go through DeepSpeed, attributes are the module's own.

    DeepSpeed's engine cannot replace the module: its ``config`` is DeepSpeed's, and its ``training`` flag does not
    follow ``eval()``.
    """

    def __init__(self, module: nn.Module, deepspeed_engine: nn.Module) -> None:
        super().__init__()
        self.module = module
        object.__setattr__(self, "_deepspeed", deepspeed_engine)  # not as a submodule: it contains the module too

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._deepspeed(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


class DeepSpeedEngine:
    """ZeRO 0 to 3 on all ranks of ``world``. Losses are scalars; ``protocol.Engine`` documents the methods."""

    def __init__(self, unet: nn.Module, config: Config, world: World, precision: str, settings: dict[str, Any]) -> None:
        deepspeed = import_deepspeed(world)
        self.dtype = COMPUTE_DTYPES[precision]
        self._stage = zero_stage(settings)
        self.layout = describe_layout("deepspeed", self._stage, world, precision, config)
        self._module, self._world = unet, world
        named = [(name, p) for name, p in unet.named_parameters() if p.requires_grad]
        originals = {name: p.data.cpu() for name, p in named if p.dtype is not self.dtype}
        for parameter in unet.parameters():
            parameter.data = parameter.data.to(self.dtype)
        unet.to(world.device)
        self._optimizer = make_optimizer([p for _, p in named], config, world)
        with contextlib.redirect_stdout(io.StringIO()):  # its bf16 optimizer prints memory tables
            self._engine, *_ = deepspeed.initialize(model=unet, optimizer=self._optimizer, config=settings)
        owners, self._slices = self._find_slices()
        self._optimizer.assign_slices(owners, self._slices)
        if self.dtype is not torch.float32:
            self._restore_masters(originals)
        self._average = WeightAverage(self._slices, config)
        self.unet: nn.Module = _PolicyModule(unet, self._engine)
        self._ready = False

    def _find_slices(self) -> tuple[list[list[Tensor]], list[LocalSlice]]:
        """The tensors of each of DeepSpeed's optimizer calls, and where in them this rank's parameter slices are."""
        trained = {name: p for name, p in self._module.named_parameters() if p.requires_grad}
        zero, groups = self._engine.optimizer, self._optimizer.param_groups
        if self._stage == 0:
            return [list(trained.values())], whole_parameters(cast(dict[str, Tensor], trained))
        slices = []
        if self._stage < 3:
            for name, p in trained.items():
                if (mapped := p._hp_mapping) is not None:  # type: ignore[attr-defined]
                    param_slice = ParameterSlice(
                        name, mapped.lp_fragment_address.start, mapped.lp_fragment_address.numel
                    )
                    owner = groups[mapped.param_group_index]["params"][0]
                    slices.append(LocalSlice(param_slice, p.numel(), owner, mapped.hp_fragment_address.start))
            return [[group["params"][0]] for group in groups], slices
        for name, p in trained.items():
            group, start, share = zero.grad_position[zero.get_param_id(p)]
            offset, total = share * self._world.rank, p.ds_numel  # type: ignore[attr-defined]
            if offset < total:
                param_slice = ParameterSlice(name, offset, min(share, total - offset))
                slices.append(LocalSlice(param_slice, total, zero.fp32_partitioned_groups_flat[group], start))
        return [[flat] for flat in zero.fp32_partitioned_groups_flat], slices

    @torch.no_grad()
    def _restore_masters(self, originals: dict[str, Tensor]) -> None:
        """DeepSpeed makes the fp32 master weights from rounded ones: put the unrounded values back."""
        for local in self._slices:
            where = local.param_slice
            if (original := originals.get(where.name)) is not None:
                local.values().copy_(original.flatten()[where.offset : where.end])

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        # The loss is already a share of the mean: DeepSpeed would divide it by the number of micro-batches again.
        self._engine.backward(nan_unless_finite(loss), scale_wrt_gas=False)
        self._ready = last

    def step(self, lr: float) -> StepResult:
        require_last_backward(self._ready)
        self._ready = False
        set_learning_rate(self._engine.optimizer, lr)
        result = self._step_unsharded() if self._stage == 0 else self._step_sharded()
        if result.applied:
            self._average.update()
        return result

    def _step_sharded(self) -> StepResult:
        self._engine.step()
        applied = bool(self._engine.was_step_applied())
        return StepResult(applied, float(self._engine.get_global_grad_norm()))

    def _step_unsharded(self) -> StepResult:
        """At stage 0 in fp32 DeepSpeed does not check for non-finite gradients itself."""
        # The gradients are already averaged, so the norm is the same on every rank.
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._module.parameters() if p.grad is not None])
        result = StepResult(math.isfinite(norm), float(norm))
        if result.applied:
            self._engine.step()
        else:
            self._engine.zero_grad()
        return result

    def largest_weight(self) -> float:
        mine = largest_absolute([local.values() for local in self._slices], self._world.device)
        if self._world.size == 1:
            return float(mine)
        found = [torch.empty_like(mine) for _ in range(self._world.size)]
        torch.distributed.all_gather(found, mine)  # the maximum of a reduction may drop a nan
        return float(torch.stack(found).amax())

    def save(self, folder: Path) -> None:
        mine = self._slices if self._stage > 0 or self._world.rank == 0 else []
        write_state(folder, self._world.rank, mine, [self._optimizer, self._average], self._module)
        if self.dtype is torch.float16 and self._world.rank == 0:
            (folder / _LOSS_SCALE_FILE).write_text(json.dumps(loss_scaler_state(self._engine.optimizer.loss_scaler)))

    def load(self, files: Sequence[Path]) -> None:
        on_every_rank(self._world, partial(self._read, files))
        self._copy_masters_to_computing_weights()

    def _read(self, files: Sequence[Path]) -> None:
        read_state(files, self._slices, [self._optimizer, self._average], self._module)
        if self.dtype is torch.float16:
            scale = next(file for file in files if file.name == _LOSS_SCALE_FILE)
            vars(self._engine.optimizer.loss_scaler).update(json.loads(scale.read_text()))

    @torch.no_grad()
    def _copy_masters_to_computing_weights(self) -> None:
        """Update the weights of forward passes from the master weights, on all ranks."""
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
            state |= {name: b.cpu().clone() for name, b in persistent_buffers(self._module).items()}
        return state

    def full_average(self) -> dict[str, Tensor]:
        trained = [(name, p) for name, p in self._module.named_parameters() if p.requires_grad]
        shapes = {name: p.ds_shape if self._stage == 3 else p.shape for name, p in trained}  # type: ignore[attr-defined]
        return self._average.gathered(shapes, self._world, cut=self._stage > 0)

    def _gathered(self, parameter: nn.Parameter) -> Tensor:
        import deepspeed

        if parameter.requires_grad and self._stage > 0:
            return cast(Tensor, deepspeed.utils.safe_get_full_fp32_param(parameter))
        if self._stage < 3:
            return parameter.detach()
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def close(self) -> None:
        self._engine.destroy()
        free_tensors(self._module.parameters(), [self._engine.optimizer, self._optimizer, self._average])
        self._slices = []


def loss_scaler_state(loss_scaler: Any) -> dict[str, Any]:
    """The numbers that a DeepSpeed loss scaler consists of, as JSON values."""
    return {name: value for name, value in vars(loss_scaler).items() if isinstance(value, (bool, int, float))}


@cache
def import_deepspeed(world: World) -> Any:
    """DeepSpeed, with the process group that it needs; it works without a launcher too.

    Collective. Raises EnvironmentProblem when not all ranks come.
    """
    # DeepSpeed chooses its device when it is imported; run.device = "cpu" must reach it on a machine with a GPU.
    os.environ["DS_ACCELERATOR"] = world.device.type
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in alone.items():  # DeepSpeed insists on them; one process opens no such port
        os.environ.setdefault(name, value)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls collectives by deprecated names: hundreds of warnings that no user can act on.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # On the CPU it would compile an inference operator that training never calls: it takes a minute and a C++ compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    collectives.join(world)
    deepspeed.init_distributed("nccl" if world.device.type == "cuda" else "gloo", verbose=False)
    atexit.register(shutdown)  # gloo's threads abort a process that ends without it
    return deepspeed
