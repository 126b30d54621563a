"""The attention implementations that a UNet can run with."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from smpo_fast.common.runtime import warn0

# model.attention -> the kernel that scaled_dot_product_attention tries first
_SDPA_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# The fallbacks where that kernel does not support an input, as flash attention in float32: a choice made for speed must
# not stop a run.
_SDPA_FALLBACKS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


class Attention(AttnProcessor2_0):
    """Scaled dot-product attention, by a given kernel first or by PyTorch's choice.

    Where ``attn.cached_key_value`` is set (by ``inference.kv_cache``) the processor projects the queries only. It is
    (key, value), each [pairs, heads, tokens, d]: one row for the two images of a pair, whose prompt is the same.
    """

    def __init__(self, kernel: SDPBackend | None = None) -> None:
        super().__init__()
        self.kernels = [] if kernel is None else [kernel, *(other for other in _SDPA_FALLBACKS if other is not kernel)]

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        with sdpa_kernel(self.kernels, set_priority=True) if self.kernels else nullcontext():
            cached = getattr(attn, "cached_key_value", None)
            if cached is None or encoder_hidden_states is None:
                return super().__call__(attn, hidden_states, encoder_hidden_states, *args, **kwargs)
            key, value = cached
            # The two images of a pair are adjacent and have the same prompt: one row of 2 L queries.
            query = attn.to_q(hidden_states).view(len(key), -1, attn.heads, key.shape[-1]).transpose(1, 2)
            out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
            return attn.to_out[1](attn.to_out[0](out.reshape(*hidden_states.shape[:2], -1).to(query.dtype)))


warn_once = cache(warn0)  # policy and reference are loaded one after the other: one notice is enough


def set_attention(unets: Sequence[UNet2DConditionModel], name: str, device: torch.device) -> str:
    """Select the attention of UNets; returns the name of the one in use.

    Falls back to PyTorch's choice, with one notice, where the selected one cannot run: xformers needs CUDA and its
    package, the others their hardware.
    """
    try:
        if name == "xformers":
            _enable_xformers(unets, device)
            return name
        kernel = _SDPA_KERNELS.get(name)
        if kernel is not None:
            _try_attention(kernel, device)
    except (ModuleNotFoundError, ValueError, NotImplementedError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        warn_once(f"model.attention = '{name}' cannot be used here ({reason}): SDPA is used instead")
        name, kernel = "sdpa", None
    for unet in unets:
        unet.set_attn_processor(AttnProcessor() if name == "eager" else Attention(kernel))
    return name


def _enable_xformers(unets: Sequence[UNet2DConditionModel], device: torch.device) -> None:
    if device.type != "cuda":
        raise ModuleNotFoundError("xformers has no attention for the CPU")
    for unet in unets:
        unet.enable_xformers_memory_efficient_attention()


def _try_attention(kernel: SDPBackend, device: torch.device) -> None:
    """Raise RuntimeError where a kernel cannot compute attention of SDXL's heads, forward and backward."""
    x = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
    with sdpa_kernel(kernel), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a long list of why each other kernel was not chosen
        F.scaled_dot_product_attention(x, x, x).sum().backward()
