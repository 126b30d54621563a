"""Loading the networks of a located pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from smpo_fast.common.console import printable
from smpo_fast.common.errors import ModelError
from smpo_fast.common.runtime import warn0
from smpo_fast.config.schema import Model
from smpo_fast.models.attention import set_attention
from smpo_fast.models.base_loras import merge_loras
from smpo_fast.models.config_files import check_weight_index, read_object, some, whole_number
from smpo_fast.models.locate import ModelSource
from smpo_fast.models.pipeline_folder import TEXT_PARTS
from smpo_fast.models.public_pipelines import check_weights
from smpo_fast.models.residual_block import skip_unit_scales
from smpo_fast.models.single_file.parts import CLASSES

TEXT_ENCODERS = (CLIPTextModel, CLIPTextModelWithProjection)  # in the order of TEXT_PARTS


def load_unet(
    source: ModelSource, model: Model, dtype: torch.dtype, device: torch.device, *, flattened: bool = False
) -> UNet2DConditionModel:
    """A UNet in ``dtype`` on ``device``, with the attention and the gradient checkpointing of ``[model]``.

    flattened: DeepSpeed will flatten the policy's weights, so policy and reference keep the default memory format.
    Two UNets with equal weights give bitwise equal predictions.
    """
    unet = load_part(source, "unet", dtype).to(device)
    set_attention([unet], model.attention, device)
    skip_unit_scales(unet)
    if model.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet.to(memory_format=torch.channels_last) if model.channels_last and not flattened else unet


def load_part(source: ModelSource, part: str, dtype: torch.dtype) -> Any:
    """A network of a source in ``dtype``, with the LoRAs of ``model.lora``, which are added before it is rounded.

    part: by the names of a pipeline folder's parts. Raises ModelError like ``load_network``.
    """
    loras = source.loras_of(part)
    loaded = torch.float32 if loras else dtype
    network = load_network(CLASSES[part], source.place(part), source.variant, loaded)
    merge_loras(network, part, loras)
    return nn.Module.to(network, dtype) if loras else network


def empty_unet(source: ModelSource) -> UNet2DConditionModel:
    """The UNet on the meta device: modules, names and shapes, but no weights.

    Raises ModelError where its configuration describes no UNet.
    """
    config = read_object(source.unet_folder / "config.json", "model.unet")
    try:
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(config)
    except Exception as error:  # wrong values make the library raise anything
        raise ModelError(f"model.unet: {source.unet_folder}/config.json describes no UNet: {error}") from error


def pipeline_class(source: ModelSource) -> Any:
    """The diffusers class of a source's pipeline."""
    return StableDiffusionXLPipeline if source.kind == "sdxl" else StableDiffusionPipeline


def load_pipeline(source: ModelSource, dtype: torch.dtype) -> Any:
    """The diffusers pipeline of a source, with the same UNet and VAE as training uses.

    Raises ModelError for a network that cannot be loaded, or not completely.
    """
    parts = {part: load_part(source, part, dtype) for part in ("unet", "vae")}
    for tokenizer, encoder in TEXT_PARTS[source.kind]:
        parts[encoder] = load_part(source, encoder, dtype)
        parts[tokenizer] = load_tokenizer(source.folder / tokenizer, parts[encoder])
    parts["scheduler"] = getattr(diffusers, source.scheduler["_class_name"]).from_config(dict(source.scheduler))
    return pipeline_class(source).from_pretrained(
        source.folder, dtype=dtype, variant=source.variant, use_safetensors=True, **parts
    )


def set_sampler(pipeline: Any, name: str) -> None:
    """Give a pipeline the sampler of ``eval.sampler``, with the noise schedule that it has."""
    samplers = {"euler": EulerDiscreteScheduler, "ddim": DDIMScheduler}
    if name in samplers:
        pipeline.scheduler = samplers[name].from_config(pipeline.scheduler.config)


def load_network(cls: Any, folder: Path, variant: str | None, dtype: torch.dtype) -> Any:
    """A network of the diffusers or transformers class ``cls`` in ``dtype``, from the safetensors files of a folder.

    Falls back to the plain weights, with a warning, where the folder has none of the variant. Raises ModelError where
    the folder cannot be loaded as such a network, and where tensors are missing: the libraries would leave them
    uninitialised or draw them at random.
    """
    check_weights(folder)
    if variant and not list(folder.glob(f"*.{variant}*.safetensors")):
        warn0(f"{folder} has no '{variant}' weights: its plain ones are used")
        variant = None
    check_weight_index(folder)
    try:
        network, info = cls.from_pretrained(
            folder, variant=variant, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # a damaged file makes the libraries raise anything
        raise ModelError(
            f"{folder}: cannot be loaded as {cls.__name__} (safetensors only): {printable(error)}"
        ) from error
    # transformers 4 counts these constants among a network's tensors; transformers 5 no longer saves them
    missing = sorted(name for name in info["missing_keys"] if not name.endswith("position_ids"))
    unexpected = sorted(name for name in info["unexpected_keys"] if not name.endswith("position_ids"))
    if missing:
        extra = f"; it has {some(unexpected)} instead" if unexpected else ""
        raise ModelError(
            f"{folder}: the weights are not those of a complete {cls.__name__}: {some(missing)} missing{extra}"
        )
    if unexpected:
        warn0(f"{folder}: {some(unexpected)} not used: {cls.__name__} has no such weights")
    return network


def load_tokenizer(folder: Path, encoder: Any) -> CLIPTokenizer:
    """A tokenizer for a loaded text encoder.

    Raises ModelError for files that make no tokenizer, and for one with more tokens or longer prompts than the encoder.
    """
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        tokens, longest = len(tokenizer), tokenizer.model_max_length
        tokenizer(["a"], max_length=2, truncation=True)
    except Exception as error:  # a damaged file makes the library raise anything
        raise ModelError(f"{folder}: the tokenizer cannot be loaded: {printable(error)}") from error
    config = encoder.config
    whole_number(longest, 1, config.max_position_embeddings, f"{folder}/tokenizer_config.json: model_max_length")
    if not 2 < tokens <= config.vocab_size:
        raise ModelError(f"{folder}: the vocabulary has {tokens} tokens, its text encoder {config.vocab_size}")
    return tokenizer
