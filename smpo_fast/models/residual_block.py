"""The residual block of diffusers without its division by 1."""

from __future__ import annotations

from typing import Any

from diffusers.models import resnet
from torch import Tensor, nn


class ResnetBlock2D(resnet.ResnetBlock2D):
    """A residual block of SDXL and SD1.5: the numbers of diffusers' own, bit for bit.

    It leaves out the division by ``output_scale_factor``, which is 1: a pass over the whole output. It has the name of
    its base, by which diffusers and ``inference.compilation`` find repeated blocks.
    """

    def forward(self, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Images [N, C, H, W] and time embeddings [N, E] to [N, K, H, W]."""
        hidden = self.conv1(self.nonlinearity(self.norm1(input_tensor)))
        hidden = hidden + self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]
        hidden = self.conv2(self.dropout(self.nonlinearity(self.norm2(hidden))))
        return (input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)) + hidden


def skip_unit_scales(unet: nn.Module) -> int:
    """Change the class of every residual block that this holds for; returns their number."""
    blocks = [module for module in unet.modules() if type(module) is resnet.ResnetBlock2D and _plain(module)]
    for block in blocks:
        block.__class__ = ResnetBlock2D
    return len(blocks)


def _plain(block: resnet.ResnetBlock2D) -> bool:
    sampled = block.upsample is not None or block.downsample is not None
    timed = block.time_embedding_norm == "default" and block.time_emb_proj is not None and not block.skip_time_act
    return timed and not sampled and block.output_scale_factor == 1.0
