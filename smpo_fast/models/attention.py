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

# model.attention -> the kernel that scaled_dot_product_attention takes first
_SDPA_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# Those that serve where it cannot, as flash attention in float32: a choice of speed must not stop a run.
_SDPA_OTHERS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


class Attention(AttnProcessor2_0):
    """SDPA, by a given kernel first or PyTorch's choice; with keys and values at hand, it projects the queries alone.

    ``attn.held``, where ``calls`` has set it, is (key, value) [pairs, heads, tokens, d] of a prompt's both pictures.
    """

    def __init__(self, kernel: SDPBackend | None = None) -> None:
        super().__init__()
        self.kernels = [] if kernel is None else [kernel, *(other for other in _SDPA_OTHERS if other is not kernel)]

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        with sdpa_kernel(self.kernels, set_priority=True) if self.kernels else nullcontext():
            held = getattr(attn, "held", None)
            if held is None or encoder_hidden_states is None:
                return super().__call__(attn, hidden_states, encoder_hidden_states, *args, **kwargs)
            key, value = held
            # The two pictures of a pair stand next to each other and read the same prompt: one row of 2 L queries.
            query = attn.to_q(hidden_states).view(len(key), -1, attn.heads, key.shape[-1]).transpose(1, 2)
            out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
            return attn.to_out[1](attn.to_out[0](out.reshape(*hidden_states.shape[:2], -1).to(query.dtype)))


_notice = cache(warn0)  # policy and reference are loaded one after the other: said once is enough


def set_attention(unets: Sequence[UNet2DConditionModel], name: str, device: torch.device) -> str:
    """Select the attention of UNets; returns the one in use.

    Where the wanted one cannot run (xformers needs CUDA and its package, a kernel its hardware), PyTorch's own choice
    serves, and one notice says so.
    """
    try:
        if name == "xformers":
            if device.type != "cuda":
                raise ModuleNotFoundError("it has no attention for the CPU")
            for unet in unets:
                unet.enable_xformers_memory_efficient_attention()
            return name
        kernel = _SDPA_KERNELS.get(name)
        if kernel is not None:
            _try_attention(kernel, device)
    except (ModuleNotFoundError, ValueError, NotImplementedError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        _notice(f"model.attention = '{name}' cannot be used here ({reason}); SDPA serves instead")
        name, kernel = "sdpa", None
    for unet in unets:
        unet.set_attn_processor(AttnProcessor() if name == "eager" else Attention(kernel))
    return name


def _try_attention(kernel: SDPBackend, device: torch.device) -> None:
    """Raise RuntimeError where a kernel cannot compute attention of SDXL's heads, forward and backward."""
    x = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
    with sdpa_kernel(kernel), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tells, at length, why each kernel was not taken
        F.scaled_dot_product_attention(x, x, x).sum().backward()
