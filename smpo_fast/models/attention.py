"""The attention implementations that a UNet can run with."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn
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
    """Scaled dot-product attention of a ``plain`` layer: the numbers of AttnProcessor2_0, bit for bit.

    It leaves out that processor's division by ``rescale_output_factor``, which is 1: a pass over the whole output.

    Where ``attn.cached_key_value`` is set (by ``inference.kv_cache``) the processor projects the queries only. It is
    (key, value), each [pairs, heads, tokens, d]: one row for the two images of a pair, whose prompt is the same.
    Where ``attn.merged_qkv`` is set (by ``inference.weight_copies``), self-attention projects with that matrix, the
    rows of q, k and v one after the other: one product instead of three, rounded differently.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if attention_mask is not None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)
        query, key, value = _projected(attn, hidden_states, encoder_hidden_states)
        # With cached keys and values, the two images of a pair, which are adjacent, make one row of 2 L queries.
        query = query.view(len(key), -1, attn.heads, key.shape[-1]).transpose(1, 2)
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        return attn.to_out[1](attn.to_out[0](out.reshape(*hidden_states.shape[:2], -1)))


def keys_values(attn: Any, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value of prompts [n, tokens, D] in an attention layer: [n, heads, tokens, d] each."""
    return _split_heads(attn, attn.to_k(prompt)), _split_heads(attn, attn.to_v(prompt))


def _split_heads(attn: Any, x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], attn.heads, -1).transpose(1, 2)


def _projected(attn: Any, images: Tensor, prompt: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Query [n, tokens, D], not yet split into heads, and key and value, which are."""
    if prompt is not None:
        cached = getattr(attn, "cached_key_value", None)
        return attn.to_q(images), *(cached if cached is not None else keys_values(attn, prompt))
    if (merged := getattr(attn, "merged_qkv", None)) is None:
        return attn.to_q(images), *keys_values(attn, images)
    query, key, value = F.linear(images, merged).chunk(3, dim=-1)
    return query, _split_heads(attn, key), _split_heads(attn, value)


def plain(attn: Any) -> bool:
    """Whether an attention layer only projects, attends and projects: no norm, residual or scale of its own."""
    more = (attn.norm_cross, attn.spatial_norm, attn.group_norm, attn.norm_q, attn.norm_k, attn.added_kv_proj_dim)
    return not any(more) and not attn.residual_connection and attn.rescale_output_factor == 1.0


def set_processors(unet: UNet2DConditionModel) -> None:
    """Give each attention layer its processor for scaled dot-product attention."""
    unet.set_attn_processor(
        {
            f"{name}.processor": Attention() if plain(module) else AttnProcessor2_0()
            for name, module in unet.named_modules()
            if hasattr(module, "get_processor")
        }
    )


def preferred(unet: nn.Module) -> AbstractContextManager[None]:
    """Inside, attention tries the kernel first that ``set_attention`` selected for a UNet.

    Entered once for a whole call: entering it in each of SDXL's 140 layers takes the host 8 ms. Backward passes belong
    inside too, because gradient checkpointing repeats the forward pass there.
    """
    kernels = getattr(getattr(unet, "module", unet), "attention_kernels", ())
    return sdpa_kernel(list(kernels), set_priority=True) if kernels else nullcontext()


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
        if name == "eager":
            unet.set_attn_processor(AttnProcessor())
        else:
            set_processors(unet)
        object.__setattr__(unet, "attention_kernels", kernel_order(kernel))
    return name


def kernel_order(first: SDPBackend | None) -> tuple[SDPBackend, ...]:
    """A kernel and its fallbacks; nothing for None, which leaves the choice to PyTorch."""
    return () if first is None else (first, *(other for other in _SDPA_FALLBACKS if other is not first))


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
