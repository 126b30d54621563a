"""The names of SDXL's and SD1.5's tensors in the original repositories' layout, derived from diffusers' names.

UNet and VAE count their blocks through all resolutions there; the second text encoder of SDXL is OpenCLIP's, with
query, key and value in one matrix. The first text encoder has the same names in both layouts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

# What the names of each part's tensors begin with.
PREFIXES = {
    "sdxl": {
        "unet": "model.diffusion_model.",
        "vae": "first_stage_model.",
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    "sd15": {
        "unet": "model.diffusion_model.",
        "vae": "first_stage_model.",
        "text_encoder": "cond_stage_model.transformer.",
    },
}


POSITION_IDS = "text_model.embeddings.position_ids"  # a first text encoder's 0, 1, 2, ...
TEXT_PROJECTION = "text_projection"  # of the second, transposed


class Original(NamedTuple):
    """An original tensor's name without its prefix; third: 0, 1 or 2 if only that third of its rows is meant."""

    name: str
    third: int | None = None


_UNET_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = (
    ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm.", "ln_final."),
    ("text_model.encoder.layers.", "transformer.resblocks."),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
    (".self_attn.out_proj.", ".attn.out_proj."),
    ("text_projection.weight", TEXT_PROJECTION),
)


def original_names(part: str, names: Iterable[str], config: Mapping[str, Any]) -> dict[str, Original]:
    """What each tensor of a part, by diffusers' and transformers' names, is called in the original layout.

    part: of a pipeline folder; config: its configuration. Raises KeyError for a name that the original networks lack.
    """
    names = set(names)
    if part == "unet":
        return {name: Original(_unet_name(name, config["layers_per_block"], names)) for name in names}
    if part == "vae":
        return {name: Original(_vae_name(name, len(config["block_out_channels"]))) for name in names}
    return {name: _open_clip_name(name) if part == "text_encoder_2" else Original(name) for name in names}


def _unet_name(name: str, layers: int, names: set[str]) -> str:
    if name.startswith("mid_block."):
        block, number, inner = name.removeprefix("mid_block.").split(".", 2)
        place = {"resnets.0": 0, "attentions.0": 1, "resnets.1": 2}[f"{block}.{number}"]
        return f"middle_block.{place}.{_unet_inner(inner)}"
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
    if found is None:
        module, _, leaf = name.rpartition(".")
        return f"{_UNET_TOP[module]}.{leaf}"
    way, level, part, index, inner = found[1], int(found[2]), found[3], int(found[4]), found[5]
    first = level * (layers + 1)
    if part == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.{inner.replace('conv.', 'op.')}"
    if part == "upsamplers":
        attended = any(other.startswith(f"up_blocks.{level}.attentions.") for other in names)
        return f"output_blocks.{first + layers}.{1 + attended}.{inner}"
    blocks = f"input_blocks.{1 + first + index}" if way == "down" else f"output_blocks.{first + index}"
    return f"{blocks}.{('resnets', 'attentions').index(part)}.{_unet_inner(inner)}"


def _unet_inner(inner: str) -> str:
    """The name inside a residual block; inside a transformer it is the same in both layouts."""
    module, _, leaf = inner.rpartition(".")
    return f"{_UNET_RESNET[module]}.{leaf}" if module in _UNET_RESNET else inner


def _vae_name(name: str, levels: int) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    if "mid_block.attentions.0." in name:
        place, _, inner = name.partition("mid_block.attentions.0.")
        module, _, leaf = inner.rpartition(".")
        return f"{place}mid.attn_1.{_VAE_ATTENTION[module]}.{leaf}"
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{levels - 1 - int(m[1])}.block.", name)
    return re.sub(r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"up.{levels - 1 - int(m[1])}.upsample.", name)


def is_vae_attention(name: str) -> bool:
    """Whether an original name is that of a matrix of a VAE's attention."""
    return ".mid.attn_1." in name and name.endswith(".weight") and not name.endswith(".norm.weight")


def _open_clip_name(name: str) -> Original:
    for here, there in _OPEN_CLIP:
        name = name.replace(here, there)
    found = re.fullmatch(r"(.+)\.self_attn\.([qkv])_proj\.(weight|bias)", name)
    return Original(f"{found[1]}.attn.in_proj_{found[3]}", "qkv".index(found[2])) if found else Original(name)
