"""Loading the networks of a located pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

from smpo_fast.common.errors import ModelError
from smpo_fast.common.runtime import warn0
from smpo_fast.config.schema import Model
from smpo_fast.models.attention import set_attention
from smpo_fast.models.locate import ModelSource


def load_unet(source: ModelSource, model: Model, dtype: torch.dtype, device: torch.device) -> UNet2DConditionModel:
    """A UNet in ``dtype`` on ``device``, with the attention and the gradient checkpointing of ``[model]``.

    Two UNets with equal weights give bitwise equal predictions.
    """
    unet = load_network(UNet2DConditionModel, source.unet_folder, source.variant, dtype).to(device)
    set_attention([unet], model.attention, device)
    if model.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet.to(memory_format=torch.channels_last) if model.channels_last else unet


def empty_unet(source: ModelSource) -> UNet2DConditionModel:
    """The UNet on the meta device: modules, names and shapes, but no weights."""
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(source.unet_folder))


def pipeline_class(source: ModelSource) -> Any:
    """The diffusers class of a source's pipeline."""
    return StableDiffusionXLPipeline if source.kind == "sdxl" else StableDiffusionPipeline


def load_pipeline(source: ModelSource, dtype: torch.dtype) -> Any:
    """The diffusers pipeline of a source, with the same UNet and VAE as training uses."""
    replaced = {"unet": (UNet2DConditionModel, source.unet_folder), "vae": (AutoencoderKL, source.vae_folder)}
    parts = {
        name: load_network(cls, folder, source.variant, dtype)
        for name, (cls, folder) in replaced.items()
        if folder != source.folder / name
    }
    return pipeline_class(source).from_pretrained(
        source.folder, dtype=dtype, variant=source.variant, use_safetensors=True, **parts
    )


def load_network(cls: Any, folder: Path, variant: str | None, dtype: torch.dtype) -> Any:
    """A network of the diffusers or transformers class ``cls`` in ``dtype``, from the safetensors files of a folder.

    Falls back to the plain weights, with a warning, where the folder has none of the variant. Raises ModelError where
    the folder cannot be loaded as such a network.
    """
    if variant and not list(folder.glob(f"*.{variant}*.safetensors")):
        warn0(f"{folder} has no '{variant}' weights: its plain ones are used")
        variant = None
    try:
        return cls.from_pretrained(folder, variant=variant, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: cannot be loaded as {cls.__name__} (safetensors only): {error}") from error
