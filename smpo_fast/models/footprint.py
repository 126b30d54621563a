"""What a network call costs, counted on the meta device: parameters, FLOPs, and bytes at the worst moment.

On the meta device tensors have shapes and no memory: SDXL at its true size is traced in seconds on a laptop. There
"meta" plays the accelerator: ``LiveBytes`` follows every storage from its making to its end, which gives the memory
plan of a call without a GPU. Allocator rounding, libraries' workspaces and the driver's own memory are not in it, nor
is what kernels of ours or a compiler save.
"""

from __future__ import annotations

import json
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from smpo_fast.common.runtime import COMPUTE_DTYPES
from smpo_fast.config.schema import Lora
from smpo_fast.models.locate import ModelSource
from smpo_fast.models.lora import add_adapters

META = torch.device("meta")
IMAGES_PER_PAIR = 2  # of a pair
_TIME_IDS = 6  # SDXL's sizes and crop, each embedded


# --- instruments ----------------------------------------------------------------------------------------------


def _flash(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention.default(query, key, value)[0]


def fused_attention() -> AbstractContextManager[Any]:
    """Attention as one kernel, as a GPU runs it: without this the meta device takes the unfused formula."""
    return mock.patch.object(F, "scaled_dot_product_attention", _flash)


def flops(call: Callable[[], Any]) -> int:
    """Floating-point operations of a call and of everything it starts; a multiply-add counts as two."""
    with fused_attention(), _Flops() as counted:
        call()
    return counted.total


class _Flops(TorchDispatchMode):
    """torch's formulas without torch's counter, whose module hooks keep gradients alive that LiveBytes would see."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages alive on a device, the meta device unless said, and the most there were."""

    def __init__(self, alive: Iterable[Tensor] = (), device: str = "meta") -> None:
        super().__init__()
        self.device, self.now, self.peak = device, 0, 0
        self._seen: dict[int, int] = {}
        for tensor in alive:
            self._add(tensor)

    def _add(self, tensor: Tensor) -> None:
        if tensor.device.type != self.device:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        self._seen[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._seen.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_iter(out):
            if isinstance(x, Tensor):
                self._add(x)
        return out


@contextmanager
def saved_bytes(parameters: Iterable[Tensor]) -> Iterator[Counter[str]]:
    """Bytes that autograd keeps for the backward pass, beside the parameters: ``counter["bytes"]`` after the block."""
    own = {p.untyped_storage()._cdata for p in parameters}
    kept: dict[int, Tensor] = {}  # holding them keeps a storage's address from being used again
    total: Counter[str] = Counter()

    def pack(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in own and key not in kept:
            kept[key] = tensor.detach()
            total["bytes"] += tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total


class _Autocast:
    """What CUDA's bfloat16 autocast does to a UNet; the meta device has none.

    Products take bfloat16, norms and softmax float32. The casts of trained weights are kept for the whole forward
    pass (``weights``), those of frozen ones are not.
    """

    PRODUCTS: tuple[tuple[Any, str], ...] = ((F, "linear"), (F, "conv2d"), (torch, "baddbmm"), (torch, "bmm"))
    EXACT: tuple[tuple[Any, str], ...] = ((F, "group_norm"), (F, "layer_norm"), (Tensor, "softmax"))

    def __init__(self) -> None:
        self.weights: dict[int, Tensor] = {}
        self.keep = True

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with ExitStack() as stack:
            for owner, name in self.PRODUCTS:
                stack.enter_context(mock.patch.object(owner, name, self._in(torch.bfloat16, getattr(owner, name))))
            for owner, name in self.EXACT:
                stack.enter_context(mock.patch.object(owner, name, self._in(torch.float32, getattr(owner, name))))
            yield

    def _in(self, dtype: torch.dtype, inner: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def outer(*args: Any, **kwargs: Any) -> Tensor:
            named = {name: self._cast(value, dtype) for name, value in kwargs.items()}
            return inner(*(self._cast(value, dtype) for value in args), **named)

        return outer

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype is dtype:
            return value
        if not (self.keep and value.is_leaf and value.requires_grad and dtype is torch.bfloat16):
            return value.to(dtype)
        if id(value) not in self.weights:
            self.weights[id(value)] = value.to(dtype)
        return self.weights[id(value)]

    def forward_done(self) -> int:
        """The kept casts end here, but for those that autograd holds; returns their bytes."""
        held = sum(weight.nbytes for weight in self.weights.values())
        self.weights.clear()
        self.keep = False
        return held


# --- a UNet and what it is called with ------------------------------------------------------------------------


@dataclass(frozen=True)
class NetworkSpec:
    """A UNet and the shapes it is called with. The configuration is JSON text, so that results can be kept by it."""

    config: str
    kind: str  # "sdxl" | "sd15"
    latent: tuple[int, int, int]  # C, H, W
    prompt: tuple[int, int]  # S, D
    attention: str = "sdpa"
    lora: str = ""  # the section [lora] as JSON; empty: all weights are trained

    @classmethod
    def make(
        cls, unet_config: Mapping[str, Any], kind: str, latent: Iterable[int], prompt: Iterable[int],
        attention: str = "sdpa", lora: Lora | None = None,
    ) -> NetworkSpec:  # fmt: skip
        """From a UNet's configuration as diffusers has it. Raises SettingsError for adapters that no layer can have."""
        channels, height, width = latent
        tokens, wide = prompt
        text = json.dumps(dict(unet_config), sort_keys=True)
        adapters = lora.model_dump_json() if lora and lora.rank else ""
        return cls(text, kind, (channels, height, width), (tokens, wide), attention, adapters)

    @property
    def pooled(self) -> int:
        """Width of SDXL's pooled prompt: what its embedding takes beside the time ids."""
        values = json.loads(self.config)
        return int(values["projection_class_embeddings_input_dim"] - _TIME_IDS * values["addition_time_embed_dim"])

    def build(self, dtype: torch.dtype = torch.float32, device: torch.device = META) -> nn.Module:
        """The UNet, its weights not set: on the meta device it takes no memory."""
        with META:
            unet = UNet2DConditionModel.from_config(json.loads(self.config))
        unet.set_attn_processor(AttnProcessor() if self.attention == "eager" else AttnProcessor2_0())
        if self.lora:
            add_adapters(unet, Lora.model_validate_json(self.lora), seed=0)
        unet = nn.Module.to(unet, dtype)  # diffusers' own warns of modules to keep in float32: these have none
        return unet if device == META else unet.to_empty(device=device)

    def inputs(
        self, pairs: int, dtype: torch.dtype, device: torch.device = META
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments and keywords of a call; on the meta device they have shapes only, elsewhere zeros."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(IMAGES_PER_PAIR * pairs, *shape, dtype=dtype, device=device)

        added = {"text_embeds": zeros(self.pooled), "time_ids": zeros(_TIME_IDS)} if self.kind == "sdxl" else None
        times = torch.zeros(IMAGES_PER_PAIR * pairs, dtype=torch.long, device=device)
        return (zeros(*self.latent), times, zeros(*self.prompt)), {"added_cond_kwargs": added, "return_dict": False}


def network_spec(
    source: ModelSource, resolution: int, attention: str = "sdpa", lora: Lora | None = None
) -> NetworkSpec:
    """The UNet of a pipeline at a resolution in px, from its configuration files alone."""

    def read(file: str, default: str = "{}") -> dict[str, Any]:
        path = source.folder / file
        return json.loads(path.read_text() if path.is_file() else default)

    unet = json.loads((source.unet_folder / "config.json").read_text())
    vae = json.loads((source.vae_folder / "config.json").read_text())
    side = resolution // 2 ** (len(vae["block_out_channels"]) - 1)
    tokens = read("text_encoder/config.json").get("max_position_embeddings", 77)
    wide = unet["cross_attention_dim"]
    return NetworkSpec.make(unet, source.kind, (unet["in_channels"], side, side), (tokens, wide), attention, lora)


# --- counts ---------------------------------------------------------------------------------------------------


class LinearBytes(NamedTuple):
    """Bytes as a function of the pairs in a call."""

    fixed: int
    per_pair: int

    def at(self, pairs: int) -> int:
        """Bytes for so many pairs."""
        return self.fixed + self.per_pair * pairs


class Cost(NamedTuple):
    """Of a call: bytes at its worst moment beside weights and gradients; FLOPs of a picture."""

    peak: LinearBytes
    flops: int


class Parameters(NamedTuple):
    """The shapes of a network's parameters."""

    trained: tuple[torch.Size, ...]
    frozen: tuple[torch.Size, ...]


@lru_cache(maxsize=64)
def parameter_shapes(network: NetworkSpec) -> Parameters:
    """What the network has learnt, and what of it is trained (all of it without LoRA)."""
    found = list(network.build().parameters())
    return Parameters(*(tuple(p.shape for p in found if p.requires_grad is trained) for trained in (True, False)))


def numel(shapes: Iterable[torch.Size]) -> int:
    """Numbers in tensors of these shapes."""
    return sum(shape.numel() for shape in shapes)


@lru_cache(maxsize=64)
def inference_cost(network: NetworkSpec, precision: str, trained: bool = True) -> Cost:
    """A call without gradients. trained: the weights have ``requires_grad``, so that autocast keeps its casts."""
    if not trained and precision != "bf16-autocast":
        return inference_cost(network, precision)
    ones, counted = _no_gradient(network, precision, 1, trained)
    twos, _ = _no_gradient(network, precision, 2, trained)
    return Cost(LinearBytes(2 * ones - twos, twos - ones), counted // IMAGES_PER_PAIR)


@lru_cache(maxsize=64)
def training_cost(network: NetworkSpec, precision: str, checkpointing: bool) -> Cost:
    """A forward and backward pass whose gradients are added elsewhere as soon as they are there.

    All but autocast's copies of the weights grows with the pairs, so one trace tells the line.
    """
    unet, autocast = _prepared(network, precision, True)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    for parameter in (p for p in unet.parameters() if p.requires_grad):
        parameter.register_post_accumulate_grad_hook(_drop_gradient)
    args, kwargs = network.inputs(1, COMPUTE_DTYPES[precision])
    with fused_attention(), _Flops() as counted, LiveBytes(unet.parameters()) as live:
        held = live.now
        with autocast() if autocast else nullcontext():
            loss = unet(*args, **kwargs)[0].float().square().sum()
            fixed = autocast.forward_done() if autocast else 0
            loss.backward()
    return Cost(LinearBytes(fixed, live.peak - held - fixed), counted.total // IMAGES_PER_PAIR)


def pairs_within(budget_bytes: float, network: NetworkSpec, precision: str, trained: bool = True) -> int:
    """The most pairs whose no-gradient call stays within a memory budget beside the weights; 1 if none does."""
    peak = inference_cost(network, precision, trained).peak
    return max(1, int((budget_bytes - peak.fixed) // peak.per_pair))


def inversion_pairs_within(
    unet_config: Mapping[str, Any], kind: str, latent_shape: Iterable[int], prompt_shape: Iterable[int],
    dtype: torch.dtype, gigabytes: float,
) -> int:  # fmt: skip
    """``batch.inversion_pairs`` that ``batch.inversion_gb`` allows (1 GB = 1e9 bytes); at least 1.

    latent_shape: C, H, W; prompt_shape: S, D; dtype: of the weights that compute.
    """
    precision = next(name for name, held in COMPUTE_DTYPES.items() if held is dtype)
    return pairs_within(gigabytes * 1e9, NetworkSpec.make(unet_config, kind, latent_shape, prompt_shape), precision)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _prepared(network: NetworkSpec, precision: str, trained: bool) -> tuple[Any, _Autocast | None]:
    unet = network.build(COMPUTE_DTYPES[precision])
    if not trained:
        unet.requires_grad_(False)
    return unet, _Autocast() if precision == "bf16-autocast" else None


def _no_gradient(network: NetworkSpec, precision: str, pairs: int, trained: bool) -> tuple[int, int]:
    """Bytes at the worst moment of a call beside its weights, and its FLOPs."""
    unet, autocast = _prepared(network, precision, trained)
    args, kwargs = network.inputs(pairs, COMPUTE_DTYPES[precision])
    with torch.no_grad(), fused_attention(), _Flops() as counted:
        with LiveBytes(unet.parameters()) as live, autocast() if autocast else nullcontext():
            held = live.now
            unet(*args, **kwargs)[0].float()
    return live.peak - held, counted.total
