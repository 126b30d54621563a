"""A UNet described by its configuration and the shapes it is called with, without weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from smpo_fast.common.errors import ConfigError, ModelError
from smpo_fast.config.schema import Lora
from smpo_fast.models.attention import set_processors
from smpo_fast.models.config_files import read_object, shown, whole_number
from smpo_fast.models.locate import ModelSource
from smpo_fast.models.lora import add_adapters
from smpo_fast.models.residual_block import skip_unit_scales
from smpo_fast.models.tracing import META

IMAGES_PER_PAIR = 2
FARTHEST_RESOLUTION = 4  # times the UNet's own, or a fraction of it
_TIME_IDS = 6  # SDXL's image sizes and crop, each embedded


@dataclass(frozen=True)
class NetworkSpec:
    """A UNet and the shapes of its inputs. The configuration is JSON text, so that a spec can be a dictionary key."""

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
        """From a UNet's diffusers configuration."""
        channels, height, width = latent
        tokens, dim = prompt
        text = json.dumps(dict(unet_config), sort_keys=True)
        adapters = lora.model_dump_json() if lora and lora.rank else ""
        return cls(text, kind, (channels, height, width), (tokens, dim), attention, adapters)

    @property
    def pooled(self) -> int:
        """Width of SDXL's pooled prompt: the added embedding's input without the time ids."""
        values = json.loads(self.config)
        return int(values["projection_class_embeddings_input_dim"] - _TIME_IDS * values["addition_time_embed_dim"])

    def build(self, dtype: torch.dtype = torch.float32, device: torch.device = META) -> nn.Module:
        """The UNet with uninitialised weights; on the meta device it takes no memory.

        Raises ConfigError for adapters whose targets match no layer.
        """
        with META:
            unet = UNet2DConditionModel.from_config(json.loads(self.config))
        if self.attention == "eager":
            unet.set_attn_processor(AttnProcessor())
        else:
            set_processors(unet)
        skip_unit_scales(unet)
        if self.lora:
            add_adapters(unet, Lora.model_validate_json(self.lora), seed=0)
        unet = nn.Module.to(unet, dtype)  # diffusers' own .to warns about modules that must stay in float32: none here
        return unet if device == META else unet.to_empty(device=device)

    def inputs(
        self, pairs: int, dtype: torch.dtype, device: torch.device = META
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of a call for some pairs, all zero."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(IMAGES_PER_PAIR * pairs, *shape, dtype=dtype, device=device)

        added = {"text_embeds": zeros(self.pooled), "time_ids": zeros(_TIME_IDS)} if self.kind == "sdxl" else None
        times = torch.zeros(IMAGES_PER_PAIR * pairs, dtype=torch.long, device=device)
        return (zeros(*self.latent), times, zeros(*self.prompt)), {"added_cond_kwargs": added, "return_dict": False}


def vae_factor(source: ModelSource) -> int:
    """Image pixels per latent pixel along a side, from the VAE's configuration. Raises ModelError if it has none."""
    levels = read_object(source.vae_folder / "config.json", "model.vae").get("block_out_channels")
    if not isinstance(levels, list) or not 1 <= len(levels) <= 10:
        raise ModelError(f"{source.vae_folder}/config.json: block_out_channels = {shown(levels)} describes no VAE")
    return 2 ** (len(levels) - 1)


def check_resolution(source: ModelSource, resolution: int) -> None:
    """Raise ConfigError for a ``data.resolution`` that the VAE cannot encode, or far from what the UNet was made for.

    resolution: in px. The UNet's own is read from ``sample_size`` of its configuration, if it has one.
    """
    factor = vae_factor(source)
    if resolution % factor:
        raise ConfigError(
            f"data.resolution = {resolution} is not a multiple of {factor}, the image pixels per latent pixel of this "
            f"VAE: the nearest are {resolution // factor * factor} and {(resolution // factor + 1) * factor}"
        )
    size = read_object(source.unet_folder / "config.json", "model.unet").get("sample_size")
    if not isinstance(size, int) or size < 1:
        return
    native = size * factor
    if not native / FARTHEST_RESOLUTION <= resolution <= native * FARTHEST_RESOLUTION:
        raise ConfigError(
            f"data.resolution = {resolution}, but the UNet of {source.unet_folder} was made for {native} px "
            f"(sample_size): beyond a factor of {FARTHEST_RESOLUTION} it cannot draw anything that training could align"
        )


def network_spec(
    source: ModelSource, resolution: int, attention: str = "sdpa", lora: Lora | None = None
) -> NetworkSpec:
    """The UNet of a pipeline at a resolution in px, from its configuration files alone.

    Raises ModelError for a file that cannot be read or describes no such network.
    """

    unet = read_object(source.unet_folder / "config.json", "model.unet")
    encoder = source.folder / "text_encoder" / "config.json"
    text = read_object(encoder) if encoder.is_file() else {}
    here = f"{source.unet_folder}/config.json"
    channels = whole_number(unet.get("in_channels"), 1, 10_000, f"{here}: in_channels")
    dim = whole_number(unet.get("cross_attention_dim"), 1, 1_000_000, f"{here}: cross_attention_dim")
    tokens = whole_number(text.get("max_position_embeddings", 77), 1, 100_000, f"{encoder}: max_position_embeddings")
    side = resolution // vae_factor(source)
    return NetworkSpec.make(unet, source.kind, (channels, side, side), (tokens, dim), attention, lora)
