"""Where the networks of ``[model]`` are: a diffusers pipeline folder, on this machine or from the hub.

Weights are read from safetensors only, and no code of a repository is executed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from smpo_fast import embedded
from smpo_fast.common import remote
from smpo_fast.common.errors import EnvironmentProblem, ModelError
from smpo_fast.config import schema
from smpo_fast.config.schema import Inversion, Model
from smpo_fast.method.schedule import NoiseSchedule
from smpo_fast.models.config_files import read_object, shown
from smpo_fast.models.pipeline_folder import OPTIONAL_PARTS, PARTS

# Their progress bars count the shards of a weight file, which tells a user nothing about the run.
diffusers_logging.disable_progress_bar()
transformers_logging.disable_progress_bar()

KINDS = {"StableDiffusionXLPipeline": "sdxl", "StableDiffusionPipeline": "sd15"}
PREDICTIONS = ("epsilon", "v_prediction")
FILE_PATTERNS = ("*.json", "*.txt", "*.safetensors")


@dataclass(frozen=True)
class ModelSource:
    """A pipeline on disk whose configuration has been checked; no weights are loaded."""

    folder: Path
    vae_folder: Path
    unet_folder: Path
    kind: str  # "sdxl" | "sd15"
    prediction_type: str  # "epsilon" | "v_prediction"
    scheduler: Mapping[str, Any]
    variant: str | None


def find(model: Model) -> ModelSource:
    """The networks of ``[model]``, downloaded where a hub id is given.

    Raises ModelError for a folder that is not a diffusers pipeline, a pipeline other than SDXL or SD1.5, a prediction
    type other than epsilon and v_prediction, and a UNet with additional input channels; EnvironmentProblem when the hub
    cannot be reached.
    """
    folder = embedded.pipeline_path() if model.path == schema.EMBEDDED else _folder(model.path, "model.path", model)
    pipeline = read_object(folder / "model_index.json", "model.path").get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in KINDS:
        raise ModelError(f"model.path: {folder} holds the pipeline {shown(pipeline)}; supported are {', '.join(KINDS)}")
    scheduler = read_object(folder / "scheduler" / "scheduler_config.json", "model.path")
    prediction_type = scheduler.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTIONS:
        raise ModelError(
            f"model.path: {folder}/scheduler predicts {shown(prediction_type)}; supported are {', '.join(PREDICTIONS)}"
        )
    vae = _folder(model.vae, "model.vae", model) if model.vae else folder
    unet = _folder(model.unet, "model.unet", model) if model.unet else folder
    source = ModelSource(
        folder,
        _part(vae, "vae"),
        _part(unet, "unet"),
        KINDS[pipeline],
        prediction_type,
        scheduler,
        model.variant or None,
    )
    channels = read_object(source.unet_folder / "config.json", "model.unet").get("in_channels")
    if channels != 4:
        raise ModelError(
            f"model.path: {source.unet_folder} has {shown(channels)} input channels (inpainting?); 4 are supported"
        )
    return source


def schedule_of(source: ModelSource, inversion: Inversion) -> NoiseSchedule:
    """The noise schedule that the pipeline was trained with."""
    return NoiseSchedule.from_config(source.scheduler, inversion.schedule_dtype)


def wanted_files(variant: str) -> tuple[list[str], list[str]]:
    """Patterns of the files to fetch from the hub, and to leave out: configurations and one variant of the weights."""
    weights = f"*.{variant}*.safetensors" if variant else "*.safetensors"
    inside = [f"{part}/{p}" for part in (*PARTS, *OPTIONAL_PARTS) for p in ("*.json", "*.txt", weights)]
    alone = ["config.json", "model_index.json", "diffusion_pytorch_model.safetensors"]
    others = [] if variant else ["*.fp16.safetensors", "*.bf16.safetensors", "*non_ema*"]
    return [*inside, *alone, f"diffusion_pytorch_model{weights[1:]}"], others


def _folder(where: str, key: str, model: Model) -> Path:
    if Path(where).is_dir():
        return Path(where)
    if not remote.is_hub_id(where):
        raise ModelError(f"{key}: '{where}' is neither a folder nor a hub id (owner/name)")
    wanted, unwanted = wanted_files(model.variant)
    try:
        return remote.fetch_repository(where, revision=model.revision, only=wanted, never=unwanted)
    except EnvironmentProblem as error:
        raise EnvironmentProblem(f"{key}: {error}") from error


def _part(folder: Path, name: str) -> Path:
    """A part's folder: a subfolder of a pipeline, or the given folder itself."""
    part = folder / name if (folder / name).is_dir() else folder
    if not (part / "config.json").is_file():
        raise ModelError(f"model.{name}: {folder} has neither {name}/config.json nor config.json")
    return part
