"""The policy: the network that is trained."""

from __future__ import annotations

import torch
from torch import nn

from smpo_fast.common.runtime import COMPUTE_DTYPES
from smpo_fast.config.schema import Config
from smpo_fast.models import kernel_patch, lora
from smpo_fast.models.load import load_unet
from smpo_fast.models.locate import ModelSource


def load_policy(
    config: Config, source: ModelSource, precision: str, device: torch.device, *, flattened: bool = False
) -> nn.Module:
    """The network to train: all weights in float32 (the engine casts them), or a frozen base with adapters.

    A frozen base, and weights without a master copy, are loaded in the dtype that computes. flattened: by DeepSpeed.
    """
    rounded = config.lora.rank or config.optim.master == "none"
    dtype = COMPUTE_DTYPES[precision] if rounded else torch.float32
    unet = load_unet(source, config.model, dtype, device, flattened=flattened)
    if config.lora.rank:
        lora.add_adapters(unet, config.lora, config.run.seed)
    kernel_patch.patch(unet, config.kernels.listed)
    return unet
