"""A diffusers pipeline in memory, as a user has it, described and taken apart like one that was found on disk."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smpo_fast.common.errors import ModelError
from smpo_fast.models.encoders import LoadedEncoders
from smpo_fast.models.locate import KINDS, PREDICTIONS, ModelSource
from smpo_fast.models.pipeline_folder import TEXT_PARTS


def source_of(pipeline: Any) -> ModelSource:
    """What ``models.locate.find`` would say of the pipeline; its folders are those that it was loaded from.

    Raises ModelError for pipelines other than SDXL and SD1.5, and for other predictions than noise and v.
    """
    name = type(pipeline).__name__
    if name not in KINDS:
        raise ModelError(f"a pipeline of the class {name} is not supported; supported are {', '.join(KINDS)}")
    scheduler = {"_class_name": type(pipeline.scheduler).__name__, **pipeline.scheduler.config}
    predicts = scheduler.get("prediction_type", "epsilon")
    if predicts not in PREDICTIONS:
        raise ModelError(f"the pipeline's scheduler predicts {predicts!r}; supported are {', '.join(PREDICTIONS)}")
    if pipeline.unet.config.in_channels != 4:
        raise ModelError(
            f"the UNet has {pipeline.unet.config.in_channels} input channels (inpainting?); 4 are supported"
        )
    folder = Path(pipeline.config.get("_name_or_path") or ".")
    return ModelSource(folder, folder / "vae", folder / "unet", KINDS[name], predicts, scheduler, None)


def encoders_of(pipeline: Any, source: ModelSource) -> LoadedEncoders:
    """The pipeline's own text encoders and, in float32, its VAE: a copy if it is in another dtype."""
    vae = pipeline.vae
    if vae.dtype != torch.float32:
        vae = nn.Module.to(copy.deepcopy(vae), torch.float32)
    text = [
        (getattr(pipeline, tokenizer), getattr(pipeline, encoder)) for tokenizer, encoder in TEXT_PARTS[source.kind]
    ]
    return LoadedEncoders(source.kind, vae, text, pipeline.unet.device)
