"""What a network call costs: parameters, FLOPs, and peak bytes as a function of the batch size.

All of it is counted on the meta device, by the instruments of ``tracing``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smpo_fast.common.runtime import COMPUTE_DTYPES
from smpo_fast.models.inference import float8, weight_copies
from smpo_fast.models.network_spec import IMAGES_PER_PAIR, NetworkSpec
from smpo_fast.models.tracing import Autocast, Flops, LiveBytes, fused_attention


class LinearBytes(NamedTuple):
    """Bytes as a linear function of the pairs in a call."""

    fixed: int
    per_pair: int

    def at(self, pairs: int) -> int:
        """Bytes for this many pairs."""
        return self.fixed + self.per_pair * pairs


class Cost(NamedTuple):
    """The cost of a call."""

    peak: LinearBytes  # highest use of memory during the call, not counting weights and gradients
    flops: int  # per image


class ParameterShapes(NamedTuple):
    """The shapes of a network's parameters."""

    trained: tuple[torch.Size, ...]
    frozen: tuple[torch.Size, ...]


@lru_cache(maxsize=64)
def parameter_shapes(network: NetworkSpec) -> ParameterShapes:
    """The network's trained parameters (all of them without LoRA) and frozen ones."""
    found = list(network.build().parameters())
    return ParameterShapes(*(tuple(p.shape for p in found if p.requires_grad is trained) for trained in (True, False)))


def numel(shapes: Iterable[torch.Size]) -> int:
    """Total number of elements of tensors of these shapes."""
    return sum(shape.numel() for shape in shapes)


@lru_cache(maxsize=64)
def inference_cost(network: NetworkSpec, precision: str, trained: bool = True) -> Cost:
    """The cost of a no-gradient call. trained: the weights have ``requires_grad``, so that autocast caches its casts.

    Two traces, of one and two pairs, give the line.
    """
    if not trained and precision != "bf16-autocast":
        return inference_cost(network, precision)
    ones, counted = _trace_inference(network, precision, 1, trained)
    twos, _ = _trace_inference(network, precision, 2, trained)
    return Cost(LinearBytes(2 * ones - twos, twos - ones), counted // IMAGES_PER_PAIR)


@lru_cache(maxsize=64)
def training_cost(network: NetworkSpec, precision: str, checkpointing: bool) -> Cost:
    """The cost of a forward and backward pass in which every gradient is consumed as soon as it is complete.

    Everything but autocast's casts of the weights is proportional to the pairs, so a single trace gives the line.
    """
    unet, autocast = _prepared(network, precision, True)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    for parameter in (p for p in unet.parameters() if p.requires_grad):
        parameter.register_post_accumulate_grad_hook(drop_gradient)
    args, kwargs = network.inputs(1, COMPUTE_DTYPES[precision])
    with fused_attention(), Flops() as counted, LiveBytes(unet.parameters()) as live:
        weights = live.now
        with autocast.active() if autocast else nullcontext():
            loss = unet(*args, **kwargs)[0].float().square().sum()
            fixed = autocast.end_forward() if autocast else 0
            loss.backward()
    return Cost(LinearBytes(fixed, live.peak - weights - fixed), counted.total // IMAGES_PER_PAIR)


def pairs_within(budget_bytes: float, network: NetworkSpec, precision: str, trained: bool = True) -> int:
    """The most pairs whose inversion stays within a memory budget, not counting the weights; at least 1."""
    peak = inference_cost(network, precision, trained).peak
    return max(1, int((budget_bytes - peak.fixed) // (peak.per_pair + prompt_bytes(network, precision))))


def inversion_pairs_within(
    unet_config: Mapping[str, Any], kind: str, latent_shape: Iterable[int], prompt_shape: Iterable[int],
    dtype: torch.dtype, gigabytes: float,
) -> int:  # fmt: skip
    """``batch.inversion_pairs`` that ``batch.inversion_gb`` allows (1 GB = 1e9 bytes); at least 1.

    latent_shape: C, H, W; prompt_shape: S, D; dtype: of the weights that the UNet computes with.
    """
    precision = next(name for name, compute in COMPUTE_DTYPES.items() if compute is dtype)
    return pairs_within(gigabytes * 1e9, NetworkSpec.make(unet_config, kind, latent_shape, prompt_shape), precision)


@lru_cache(maxsize=64)
def prompt_bytes(network: NetworkSpec, precision: str) -> int:
    """Bytes that the cross-attentions' keys and values of a pair's prompt take during the calls of its inversion."""
    cross = (m for name, m in network.build().named_modules() if name.endswith("attn2"))
    width = sum(int(attention.inner_kv_dim) for attention in cross)  # type: ignore[arg-type]
    return 2 * width * network.prompt[0] * COMPUTE_DTYPES[precision].itemsize


@lru_cache(maxsize=64)
def float8_bytes(network: NetworkSpec) -> int:
    """Bytes of the weights' second copy for ``inversion.fp8``."""
    return float8.weight_bytes(network.build())


@lru_cache(maxsize=64)
def convolution_elements(network: NetworkSpec) -> int:
    """Elements of the convolution weights, which the inversion copies channels-last under DeepSpeed."""
    return weight_copies.convolution_elements(network.build())


@lru_cache(maxsize=64)
def merged_elements(network: NetworkSpec) -> int:
    """Elements of the weights' second copy for ``model.merge_qkv``."""
    return weight_copies.merged_elements(network.build())


def drop_gradient(parameter: Tensor) -> None:
    """Drop the gradient of a parameter of any shape, as if it had been added to a sum elsewhere."""
    parameter.grad = None


def _prepared(network: NetworkSpec, precision: str, trained: bool) -> tuple[Any, Autocast | None]:
    unet = network.build(COMPUTE_DTYPES[precision])
    if not trained:
        unet.requires_grad_(False)
    return unet, Autocast() if precision == "bf16-autocast" else None


def _trace_inference(network: NetworkSpec, precision: str, pairs: int, trained: bool) -> tuple[int, int]:
    """Peak bytes of a no-gradient call, not counting its weights, and its FLOPs."""
    unet, autocast = _prepared(network, precision, trained)
    args, kwargs = network.inputs(pairs, COMPUTE_DTYPES[precision])
    with torch.no_grad(), fused_attention(), Flops() as counted:
        with LiveBytes(unet.parameters()) as live, autocast.active() if autocast else nullcontext():
            weights = live.now
            unet(*args, **kwargs)[0].float()
    return live.peak - weights, counted.total
