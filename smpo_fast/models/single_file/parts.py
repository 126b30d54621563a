"""The networks that a single file consists of: their classes, their files in a folder, their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

CLASSES: dict[str, Any] = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}
WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}
Value = TypeVar("Value")


def empty_state(part: str, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Names and shapes of the tensors of a part with a configuration, on the meta device."""
    cls = CLASSES[part]
    with torch.device("meta"):
        text = part.startswith("text")
        network = cls(CLIPTextConfig(**config)) if text else cls.from_config(dict(config))
    return classic_names(part, network.state_dict())


def classic_names(part: str, state: Mapping[str, Value]) -> dict[str, Value]:
    """A part's tensors by the names that every version of the libraries reads.

    transformers 5.6 took the outer module ``text_model`` out of CLIPTextModel; it reads the earlier names as well.
    """
    if not part.startswith("text"):
        return dict(state)
    outer = ("text_model.", "text_projection.")
    return {name if name.startswith(outer) else f"text_model.{name}": value for name, value in state.items()}
