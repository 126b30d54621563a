"""The networks: find a diffusers pipeline, load its parts, encode, denoise, export.

Weights are read from safetensors only and no code of a repository is ever run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from smpo_fast import embedded
from smpo_fast.common import remote
from smpo_fast.common.errors import EnvironmentProblem, UserError
from smpo_fast.config import schema
from smpo_fast.config.schema import Inversion, Model
from smpo_fast.method.schedule import NoiseSchedule

# Their bars count shards of a file; ours count pairs.
diffusers_logging.disable_progress_bar()
transformers_logging.disable_progress_bar()

KINDS = {"StableDiffusionXLPipeline": "sdxl", "StableDiffusionPipeline": "sd15"}
PREDICTIONS = ("epsilon", "v_prediction")
TEXT_PARTS = {
    "sdxl": (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")),
    "sd15": (("tokenizer", "text_encoder"),),
}
_FILES = ("*.json", "*.txt", "*.safetensors")
PARTS = ("unet", "vae", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
OPTIONAL_PARTS = ("feature_extractor", "safety_checker")


@dataclass(frozen=True)
class ModelSource:
    """A pipeline on disk that has been looked at but not loaded."""

    folder: Path
    vae_folder: Path
    unet_folder: Path
    kind: str  # "sdxl" | "sd15"
    prediction_type: str  # "epsilon" | "v_prediction"
    scheduler: Mapping[str, Any]
    variant: str | None


def find(model: Model) -> ModelSource:
    """Where the networks of ``[model]`` are, downloaded if they are a hub id.

    Raises SettingsError for a folder that is no diffusers pipeline, a pipeline other than SDXL or SD1.5, and a
    prediction type other than epsilon and v_prediction: each named.
    """
    folder = embedded.pipeline_path() if model.path == schema.EMBEDDED else _folder(model.path, "model.path", model)
    pipeline = _read_json(folder / "model_index.json", "model.path").get("_class_name", "nothing")
    if pipeline not in KINDS:
        raise UserError(f"model.path: {folder} holds a {pipeline}; supported are {', '.join(KINDS)}")
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json", "model.path")
    prediction_type = scheduler.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTIONS:
        raise UserError(
            f"model.path: {folder}/scheduler predicts '{prediction_type}'; supported are {', '.join(PREDICTIONS)}"
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
    channels = _read_json(source.unet_folder / "config.json", "model.unet").get("in_channels")
    if channels != 4:
        raise UserError(
            f"model.path: {source.unet_folder} has {channels} input channels (inpainting?); 4 are supported"
        )
    return source


def schedule_of(source: ModelSource, inversion: Inversion) -> NoiseSchedule:
    """The noise schedule the pipeline was trained with."""
    return NoiseSchedule.from_config(source.scheduler, inversion.schedule_dtype)


def encoders_identity(source: ModelSource) -> str:
    """A hash of all files of the VAE, text encoders and tokenizers: what a cache's content depends on."""
    digest = hashlib.sha256()
    parts = [source.vae_folder] + [source.folder / name for pair in TEXT_PARTS[source.kind] for name in pair]
    for part in parts:
        for file in sorted(f for pattern in _FILES for f in part.glob(pattern)):
            digest.update(f"{part.name}/{file.name}\0".encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:32]


def weights_identity(part: Path) -> str:
    """A quick hash of a network's folder: its configuration, and size, first and last MiB of its weight files.

    Fine-tuned weights differ in both ends; reading 10 GB to learn that would take longer than loading them.
    """
    digest = hashlib.sha256((part / "config.json").read_bytes())
    for file in sorted(part.glob("*.safetensors")):
        with file.open("rb") as stream:
            digest.update(f"{file.name}/{file.stat().st_size}\0".encode() + stream.read(2**20))
            stream.seek(-min(2**20, file.stat().st_size), 2)
            digest.update(stream.read())
    return digest.hexdigest()[:16]


def _folder(where: str, key: str, model: Model) -> Path:
    if Path(where).is_dir():
        return Path(where)
    if not remote.is_hub_id(where):
        raise UserError(f"{key}: '{where}' is neither a folder nor a hub id (owner/name)")
    wanted, unwanted = _wanted_files(model.variant)
    try:
        return remote.fetch_repository(where, revision=model.revision, only=wanted, never=unwanted)
    except EnvironmentProblem as error:
        raise EnvironmentProblem(f"{key}: {error}") from error


def _wanted_files(variant: str) -> tuple[list[str], list[str]]:
    """Patterns of a hub repository's files to fetch, and not: configurations and one variant of the weights."""
    weights = f"*.{variant}*.safetensors" if variant else "*.safetensors"
    inside = [f"{part}/{p}" for part in (*PARTS, *OPTIONAL_PARTS) for p in ("*.json", "*.txt", weights)]
    alone = ["config.json", "model_index.json", "diffusion_pytorch_model.safetensors"]
    others = [] if variant else ["*.fp16.safetensors", "*.bf16.safetensors", "*non_ema*"]
    return [*inside, *alone, f"diffusion_pytorch_model{weights[1:]}"], others


def _part(folder: Path, name: str) -> Path:
    """A part's folder: below a pipeline, or given itself."""
    part = folder / name if (folder / name).is_dir() else folder
    if not (part / "config.json").is_file():
        raise UserError(f"model.{name}: {folder} has neither {name}/config.json nor config.json")
    return part


def _read_json(file: Path, key: str) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {file} cannot be read: is this a diffusers pipeline folder? ({error})") from error
