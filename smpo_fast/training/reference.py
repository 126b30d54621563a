"""The frozen reference and where its weights are kept: on the device, in host memory, in shards, or in the policy.

``with reference() as denoiser`` provides it while a phase needs it. Its weights and its arithmetic do not depend on
where it is kept, so neither do the losses, and at the first step every margin is exactly 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from smpo_fast.common.errors import ConfigError
from smpo_fast.common.runtime import COMPUTE_DTYPES, World
from smpo_fast.config.schema import Config
from smpo_fast.engine import zero as engine_zero
from smpo_fast.method.objective import OBJECTIVES
from smpo_fast.models import kernel_patch, lora
from smpo_fast.models.denoiser import Denoiser
from smpo_fast.models.load import load_unet
from smpo_fast.models.locate import ModelSource

Reference = Callable[[], AbstractContextManager[Denoiser]]

_BLOCK_BYTES = 1 << 28  # pinned memory comes in powers of two: one block of all weights would waste up to half
_ALIGNMENT = 256  # bytes, as the device's allocator aligns tensors: kernels choose their loads by it


def resolve(config: Config, ds_settings: Mapping[str, Any] | None) -> str:
    """Where a run keeps its reference: ``model.reference`` with 'auto' resolved; 'none' where nothing uses it.

    Raises ConfigError for a place that this run does not have.
    """
    wanted, adapted = config.model.reference, config.lora.rank > 0
    if wanted == "adapters-off" and not adapted:
        raise ConfigError(
            "model.reference = 'adapters-off': without LoRA the policy has no adapters to switch off: set lora.rank, "
            "or take 'replicated' or 'streamed'"
        )
    if wanted == "sharded" and ds_settings is None:
        raise ConfigError(
            "model.reference = 'sharded' needs DeepSpeed: give --ds_config, or take 'streamed', which also frees the "
            "memory of the device"
        )
    inverts = config.inversion.source == "inversion" and config.inversion.network == "reference"
    whole = config.model.compile != "off" or config.model.cuda_graphs or config.model.merge_qkv
    if wanted == "sharded" and inverts and (whole or config.inversion.fp8 or config.inversion.reuse_deep):
        raise ConfigError(
            "model.reference = 'sharded' with inversion.network = 'reference': shards are gathered module by module, "
            "so model.compile, model.cuda_graphs, model.merge_qkv, inversion.fp8 and inversion.reuse_deep must be off; "
            "or take 'replicated'"
        )
    if not inverts and not OBJECTIVES[config.objective.name].needs_reference:
        return "none"
    return wanted if wanted != "auto" else "adapters-off" if adapted else "replicated"


def make_reference(
    where: str,
    config: Config,
    source: ModelSource,
    world: World,
    precision: str,
    policy: nn.Module,
    as_denoiser: Callable[[nn.Module], Denoiser],
    ds_settings: Mapping[str, Any] | None,
) -> Reference:
    """The reference kept at a place that ``resolve`` returned, or 'cached' (errors are stored: nothing is loaded).

    Collective for 'sharded'. ``policy`` is the engine's network.
    """
    if where in ("none", "cached"):
        return partial(_absent, where)
    if where == "adapters-off":
        return partial(_without_adapters, as_denoiser(policy))
    flattened = ds_settings is not None  # the policy: policy and reference must compute with the same kernels
    unet: nn.Module = load_unet(source, config.model, COMPUTE_DTYPES[precision], world.device, flattened=flattened)
    kernel_patch.patch(unet, config.kernels.listed)
    unet.requires_grad_(False).eval()
    if where == "sharded":
        unet = shard_frozen(unet, world, precision, ds_settings or {})
    denoiser = as_denoiser(unet)
    if where == "streamed":
        return Streamed(denoiser, world.device)
    return lambda: nullcontext(denoiser)


def _absent(where: str) -> AbstractContextManager[Denoiser]:
    raise RuntimeError(f"the reference is needed, but was not loaded ({where})")


@contextmanager
def _without_adapters(denoiser: Denoiser) -> Iterator[Denoiser]:
    denoiser.unet.eval()
    with lora.adapters_off(denoiser.unet):
        yield denoiser


class Streamed:
    """Weights in host memory, pinned for CUDA; a copy is on the device while a phase needs it.

    The copy is made when the first user enters and dropped when the last one leaves.
    """

    def __init__(self, denoiser: Denoiser, device: torch.device) -> None:
        self._denoiser, self._device, self._users = denoiser, device, 0
        unet = denoiser.unet
        self._blocks = list(_pack(list(chain(unet.parameters(), unet.buffers())), device.type == "cuda"))
        self._use([host for host, _ in self._blocks])

    @contextmanager
    def __call__(self) -> Iterator[Denoiser]:
        if not self._users:
            self._use([host.to(self._device, non_blocking=True, copy=True) for host, _ in self._blocks])
        self._users += 1
        try:
            yield self._denoiser
        finally:
            self._users -= 1
            if not self._users:
                self._use([host for host, _ in self._blocks])

    def _use(self, blocks: list[Tensor]) -> None:
        """Make the weights views of these blocks."""
        for block, (_, tensors) in zip(blocks, self._blocks, strict=True):
            for tensor, first in tensors:
                view = block[first : first + tensor.numel() * tensor.element_size()].view(tensor.dtype)
                tensor.data = view.as_strided(tensor.size(), tensor.stride())


def _pack(tensors: list[Tensor], pin: bool) -> Iterator[tuple[Tensor, list[tuple[Tensor, int]]]]:
    """Blocks of host memory with the tensors' values, each with its tensors and the offsets of their first bytes."""
    groups: list[list[tuple[Tensor, int]]] = [[]]
    used = 0
    for tensor in tensors:
        size = -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
        if groups[-1] and used + size > _BLOCK_BYTES:
            groups.append([])
            used = 0
        groups[-1].append((tensor, used))
        used += size
    for group in groups:
        last, first = group[-1]
        host = torch.empty(first + last.numel() * last.element_size(), dtype=torch.uint8, pin_memory=pin)
        for tensor, first in group:
            # in memory order, so that channels-last weights stay channels-last
            flat = tensor.data.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
            host[first : first + len(flat)].copy_(flat)
        yield host, group


def shard_frozen(unet: nn.Module, world: World, precision: str, ds_settings: Mapping[str, Any]) -> nn.Module:
    """Split a frozen network's weights over the ranks: ZeRO-3 without an optimizer. Collective.

    Every rank must call the network equally often. The ZeRO stage of the policy does not matter; where the DeepSpeed
    file offloads parameters, the shards of the reference are in host memory too.
    """
    deepspeed = engine_zero.import_deepspeed(world)
    given = ds_settings.get("zero_optimization", {})
    zero: dict[str, Any] = {name: value for name, value in given.items() if name.startswith("stage3_")}
    if given.get("offload_param", {}).get("device", "none") != "none":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        # it would replace torch's linear layer, for the policy too
        "zero_optimization": {**zero, "stage": 3, "memory_efficient_linear": False},
        **{name: {"enabled": precision == name} for name in ("bf16", "fp16")},
    }
    sharded, *_ = deepspeed.initialize(model=unet, config=settings)
    # the module itself, whose hooks gather and release weights: DeepSpeed's forward disables autocast
    return sharded.module.eval()
