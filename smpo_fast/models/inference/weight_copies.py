"""Second copies of weights, in the form that is fastest for no-gradient calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from smpo_fast.common.errors import ConfigError
from smpo_fast.models.attention import Attention, plain


class WeightCopies:
    """Channels-last convolutions, half-precision adapters, and self-attention's q, k and v projections in one matrix.

    Each only where the network's own weights are not like that already. DeepSpeed flattens weights in the default
    memory format, and adapters are trained in float32: in eager code the first lets every GroupNorm of a half-precision
    network copy its images, the second turns its layers' inputs and outputs into float32 and back. dtype: the network
    computes in it. The copies belong to the modules, so that all callers of a network share them.

    Raises ConfigError where ``merge_qkv`` finds nothing to merge.
    """

    def __init__(self, unet: nn.Module, dtype: torch.dtype, channels_last: bool, merge_qkv: bool) -> None:
        wanted = {m: _form(m, dtype if adapter else m.weight.dtype, channels_last) for m, adapter in _layers(unet)}
        self._forms = {m: form for m, form in wanted.items() if not _has_form(m, *form)}
        self._merged = list(_mergeable(unet)) if merge_qkv else []
        if merge_qkv and not self._merged:
            raise ConfigError(
                "model.merge_qkv matches no self-attention of this network: with adapters on all of them, and with "
                "model.attention = 'xformers' or 'eager', there is nothing to merge; leave it off"
            )

    def refresh(self) -> None:
        """Copy the current weights; in place from the second time on, because captured graphs read that memory."""
        for module, (dtype, memory_format) in self._forms.items():
            if (copy := getattr(module, "inversion_weight", None)) is None:
                copy = nn.Parameter(module.weight.detach().to(dtype, memory_format=memory_format), requires_grad=False)
                object.__setattr__(module, "inversion_weight", copy)
            else:
                copy.copy_(module.weight)
        for attn in self._merged:
            weights = [layer.weight.detach() for layer in (attn.to_q, attn.to_k, attn.to_v)]
            if (copy := getattr(attn, "inversion_qkv", None)) is None:
                attn.inversion_qkv = torch.cat(weights)
            else:
                torch.cat(weights, out=copy)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the layers compute with the copies."""
        own: dict[Any, Any] = {module: module._parameters["weight"] for module in self._forms}
        try:
            for module in own:
                module._parameters["weight"] = module.inversion_weight
            for attn in self._merged:
                attn.merged_qkv = attn.inversion_qkv
            yield
        finally:
            for module, weight in own.items():
                module._parameters["weight"] = weight
            for attn in self._merged:
                attn.merged_qkv = None


def convolution_elements(unet: nn.Module) -> int:
    """Elements of all convolution weights, which ``model.channels_last`` copies where DeepSpeed flattens them."""
    return sum(m.weight.numel() for m, _ in _layers(unet) if isinstance(m, nn.Conv2d))


def merged_elements(unet: nn.Module) -> int:
    """Elements of all weights that ``model.merge_qkv`` copies."""
    return sum(layer.weight.numel() for attn in _mergeable(unet) for layer in (attn.to_q, attn.to_k, attn.to_v))


def _mergeable(unet: nn.Module) -> Iterator[Any]:
    """Self-attentions whose processor can use merged projections, and whose projections are plain matrices."""
    for module in unet.modules():
        if type(getattr(module, "processor", None)) is Attention and plain(module) and not module.is_cross_attention:
            layers: tuple[Any, ...] = (module.to_q, module.to_k, module.to_v)
            if all(type(layer) is nn.Linear and layer.bias is None for layer in layers):
                yield module


def _layers(unet: nn.Module) -> Iterator[tuple[nn.Linear | nn.Conv2d, bool]]:
    """Convolutions and adapters, and whether they are adapters. DoRA measures its weights and keeps its own."""
    dora = {inner for m in unet.modules() if getattr(m, "lora_magnitude_vector", None) for inner in m.modules()}
    for name, module in unet.named_modules():
        adapter = ".lora_A." in name or ".lora_B." in name
        if (adapter or isinstance(module, nn.Conv2d)) and isinstance(module, (nn.Conv2d, nn.Linear)):
            if not (adapter and module in dora):
                yield module, adapter


def _form(module: nn.Module, dtype: torch.dtype, channels_last: bool) -> tuple[torch.dtype, torch.memory_format]:
    turned = channels_last and isinstance(module, nn.Conv2d)
    return dtype, torch.channels_last if turned else torch.preserve_format


def _has_form(module: nn.Linear | nn.Conv2d, dtype: torch.dtype, memory_format: torch.memory_format) -> bool:
    # By strides: the weight of a 1 x 1 convolution is contiguous in both formats, but kernels take the strides' word.
    turned = torch.empty_like(module.weight, device="meta", memory_format=memory_format)
    return module.weight.dtype is dtype and module.weight.stride() == turned.stride()
