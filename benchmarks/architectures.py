"""The measured networks as configurations: SDXL base 1.0 and SD1.5 at their true size, and miniatures of both.

Weights are random, so no file is downloaded. Neither time nor memory depends on their values, as long as they are
finite and not zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

SCHEDULER: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
    "prediction_type": "epsilon",
}

_CLIP_L = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "projection_dim": 768,
}  # fmt: skip
_CLIP_BIG_G = {
    "vocab_size": 49408, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
    "num_attention_heads": 20, "max_position_embeddings": 77, "hidden_act": "gelu", "projection_dim": 1280,
}  # fmt: skip
_CLIP_TOY = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 16, "projection_dim": 32, "bos_token_id": 126, "eos_token_id": 127,
}  # fmt: skip


def _vae(scaling_factor: float, widths: tuple[int, ...], layers: int, groups: int) -> dict[str, Any]:
    return {
        "block_out_channels": widths, "layers_per_block": layers, "latent_channels": 4, "norm_num_groups": groups,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths), "scaling_factor": scaling_factor,
    }  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """Everything needed to build one model family at one size."""

    name: str
    kind: str  # "sdxl" | "sd15"
    resolution: int  # side in px
    latent: int  # side of the latent
    inversion_steps: int
    optimizer: str  # of the released recipe
    beta: float
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text: tuple[Mapping[str, Any], ...]
    tokens: int = 77

    @property
    def prompt_width(self) -> int:
        """Width of the token embeddings in the UNet's cross-attention."""
        return int(self.unet["cross_attention_dim"])

    @property
    def pooled_width(self) -> int | None:
        """Width of the pooled prompt; None for SD1.5."""
        return int(self.text[-1]["projection_dim"]) if self.kind == "sdxl" else None


_SDXL_BLOCKS = {
    "in_channels": 4, "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True, "addition_embed_type": "text_time",
}  # fmt: skip
_SD15_BLOCKS = {
    "in_channels": 4, "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip

SDXL = Architecture(
    "sdxl", "sdxl", resolution=1024, latent=128, inversion_steps=10, optimizer="adafactor", beta=5000.0,
    unet={
        **_SDXL_BLOCKS, "sample_size": 128, "block_out_channels": (320, 640, 1280), "layers_per_block": 2,
        "attention_head_dim": (5, 10, 20), "transformer_layers_per_block": (1, 2, 10), "cross_attention_dim": 2048,
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    },
    vae=_vae(0.13025, (128, 256, 512, 512), 2, 32), text=(_CLIP_L, _CLIP_BIG_G),
)  # fmt: skip
SD15 = Architecture(
    "sd15", "sd15", resolution=512, latent=64, inversion_steps=5, optimizer="adamw", beta=2000.0,
    unet={
        **_SD15_BLOCKS, "sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2,
        "attention_head_dim": 8, "cross_attention_dim": 768,
    },
    vae=_vae(0.18215, (128, 256, 512, 512), 2, 32), text=(_CLIP_L,),
)  # fmt: skip
SDXL_TOY = Architecture(
    "sdxl-toy", "sdxl", resolution=32, latent=16, inversion_steps=10, optimizer="adafactor", beta=5000.0,
    unet={
        **_SDXL_BLOCKS, "sample_size": 16, "block_out_channels": (32, 64, 64), "layers_per_block": 1,
        "attention_head_dim": (2, 4, 4), "transformer_layers_per_block": (1, 1, 2), "cross_attention_dim": 64,
        "addition_time_embed_dim": 16, "projection_class_embeddings_input_dim": 128, "norm_num_groups": 16,
    },
    vae=_vae(0.13025, (16, 32), 1, 4), text=(_CLIP_TOY, _CLIP_TOY), tokens=16,
)  # fmt: skip
SD15_TOY = Architecture(
    "sd15-toy", "sd15", resolution=32, latent=16, inversion_steps=5, optimizer="adamw", beta=2000.0,
    unet={
        **_SD15_BLOCKS, "sample_size": 16, "block_out_channels": (32, 32, 64, 64), "layers_per_block": 1,
        "attention_head_dim": 4, "cross_attention_dim": 32, "norm_num_groups": 16,
    },
    vae=_vae(0.18215, (16, 32), 1, 4), text=(_CLIP_TOY,), tokens=16,
)  # fmt: skip
ALL = {a.name: a for a in (SDXL, SD15, SDXL_TOY, SD15_TOY)}
TOY_OF = {"sdxl": SDXL_TOY, "sd15": SD15_TOY}


@dataclass(frozen=True)
class Networks:
    """The trained and the frozen networks of a run."""

    architecture: Architecture
    unet: nn.Module
    reference: nn.Module
    vae: nn.Module | None
    text: tuple[nn.Module, ...]


def make_unet(architecture: Architecture, device: torch.device, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """A UNet with random weights; on the meta device it has shapes and no memory."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**architecture.unet)
    return _materialise(unet, device, dtype, seed)


def make_vae(architecture: Architecture, device: torch.device, dtype: torch.dtype, seed: int = 1) -> nn.Module:
    """A VAE with random weights, frozen."""
    with torch.device("meta"):
        vae = AutoencoderKL(**architecture.vae)
    return _materialise(vae, device, dtype, seed).requires_grad_(False).eval()


def make_text_encoders(
    architecture: Architecture, device: torch.device, dtype: torch.dtype, seed: int = 2
) -> tuple[nn.Module, ...]:
    """The text encoders with random weights, frozen: CLIP-L, and for SDXL OpenCLIP bigG with its projection."""
    classes = (CLIPTextModel, CLIPTextModelWithProjection)
    encoders = []
    for cls, config in zip(classes, architecture.text, strict=False):
        # created on the CPU: the position ids are a buffer, whose content the meta device would lose
        encoder = cls(CLIPTextConfig(**config))
        _randomise(encoder, seed)
        encoders.append(encoder.to(device, dtype).requires_grad_(False).eval())
    return tuple(encoders)


def make_inputs(
    architecture: Architecture, images: int, device: torch.device, dtype: torch.dtype, seed: int = 3
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    """Positional arguments (latents, timesteps, prompt) and keyword arguments of one UNet call."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        if device.type == "meta":
            return torch.empty(shape, device=device, dtype=dtype)
        return torch.randn(shape, generator=generator).to(device, dtype)

    side = architecture.latent
    sample, prompt = normal(images, 4, side, side), normal(images, architecture.tokens, architecture.prompt_width)
    times = torch.arange(images).mul_(37).add_(201).remainder_(1000).to(device)
    added = None
    if architecture.pooled_width is not None:
        size = float(architecture.resolution)
        time_ids = torch.tensor([size, size, 0.0, 0.0, size, size]).repeat(images, 1)
        added = {"text_embeds": normal(images, architecture.pooled_width), "time_ids": time_ids.to(device, dtype)}
    return (sample, times, prompt), {"added_cond_kwargs": added, "return_dict": False}


def _materialise(module: nn.Module, device: torch.device, dtype: torch.dtype, seed: int) -> nn.Module:
    """Draw weights in float32, then cast, so that networks of every dtype have the same weights up to rounding."""
    if device.type != "meta":
        module = module.to_empty(device=device)
        _randomise(module, seed)
    # not diffusers' own `to`, which warns about modules to keep in float32; these networks have none
    return nn.Module.to(module, dtype)


@torch.no_grad()
def _randomise(module: nn.Module, seed: int) -> None:
    """Weights that keep activations near 1: norms get weight 1, matrices are normal by fan-in, biases are small."""
    device = next(module.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel() if "embedding" not in name else parameter.shape[-1]
            parameter.normal_(0.0, fan_in**-0.5, generator=generator)
        elif name.endswith("weight"):
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, 0.02, generator=generator)
