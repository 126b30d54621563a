"""Where the networks of ``[model]`` are: a diffusers folder, on this machine, from the hub, or converted from a file.

Weights are read from safetensors only, and no code of a repository is executed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from smpo_fast import embedded
from smpo_fast.common import remote
from smpo_fast.common.errors import EnvironmentProblem, ModelError
from smpo_fast.common.runtime import warn0
from smpo_fast.config import schema
from smpo_fast.config.schema import Inversion, Model
from smpo_fast.method.schedule import NoiseSchedule
from smpo_fast.models import public_pipelines
from smpo_fast.models.base_loras import BaseLora, locate_loras
from smpo_fast.models.config_files import read_object, shown
from smpo_fast.models.pipeline_folder import OPTIONAL_PARTS, PARTS, TEXT_PARTS
from smpo_fast.models.public_pipelines import HUB_IDS
from smpo_fast.models.single_file.convert import converted
from smpo_fast.models.single_file.recognise import SingleFile, recognise, recognise_vae

# Their progress bars count the shards of a weight file, which tells a user nothing about the run.
diffusers_logging.disable_progress_bar()
transformers_logging.disable_progress_bar()

KINDS = {"StableDiffusionXLPipeline": "sdxl", "StableDiffusionPipeline": "sd15"}
PREDICTIONS = ("epsilon", "v_prediction")
FILE_PATTERNS = ("*.json", "*.txt", "*.safetensors")


@dataclass(frozen=True)
class ModelSource:
    """A pipeline on disk whose configuration has been checked; no weights are loaded.

    scheduler: its configuration, with the prediction type and the schedule of ``[model]``; file: what the pipeline was
    converted from, if it was.
    """

    folder: Path
    vae_folder: Path
    unet_folder: Path
    kind: str  # "sdxl" | "sd15"
    prediction_type: str  # "epsilon" | "v_prediction"
    scheduler: Mapping[str, Any]
    variant: str | None
    file: SingleFile | None = None
    loras: tuple[BaseLora, ...] = ()  # added to the weights whenever they are loaded

    def place(self, part: str) -> Path:
        """The folder of a part, which may be another pipeline's."""
        return {"unet": self.unet_folder, "vae": self.vae_folder}.get(part, self.folder / part)

    def loras_of(self, part: str) -> tuple[BaseLora, ...]:
        """The LoRAs that change a part."""
        return tuple(lora for lora in self.loras if part in lora.layers)

    def describe(self) -> str:
        """Kind, prediction and place, for a user."""
        zero = " with zero terminal SNR" if self.scheduler.get("rescale_betas_zero_snr") else ""
        known = f" ({self.file.clues or 'no marker says otherwise'})" if self.file else ""
        loras = "".join(f" + {lora}" for lora in self.loras)
        place = self.file.header.file if self.file else self.folder
        return f"{self.kind}, {self.prediction_type}{zero}{known}, {place}{loras}"


def find(model: Model, *, weights: bool = True) -> ModelSource:
    """The networks of ``[model]``, downloaded where a hub id is given, converted where a single file is.

    weights: if false, only configurations are downloaded, and nothing is converted: for a file, the folders of the
    result are those of its public pipeline. Raises ModelError for a folder that is not a diffusers pipeline, a pipeline
    other than SDXL or SD1.5, a prediction type other than epsilon and v_prediction, a UNet with additional input
    channels, and a file that ``recognise``, ``recognise_vae`` or ``locate_loras`` refuses; EnvironmentProblem when the
    hub cannot be reached.
    """
    model = _explicit(model)
    folder, file = _pipeline(model, weights)
    pipeline = read_object(folder / "model_index.json", "model.path").get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in KINDS:
        raise ModelError(f"model.path: {folder} holds the pipeline {shown(pipeline)}; supported are {', '.join(KINDS)}")
    vae = _vae(model, folder, KINDS[pipeline], weights)
    unet, unet_file = _unet(model, folder, KINDS[pipeline], weights)
    scheduler = _scheduler(model, folder, unet_file if unet_file and unet_file.clues else file)
    source = ModelSource(
        folder,
        _part(vae, "vae"),
        _part(unet, "unet"),
        KINDS[pipeline],
        scheduler.get("prediction_type", "epsilon"),
        scheduler,
        model.variant or None,
        file,
    )
    config = read_object(source.unet_folder / "config.json", "model.unet")
    channels = config.get("in_channels")
    if channels != 4:
        raise ModelError(
            f"model.path: {source.unet_folder} has {shown(channels)} input channels (inpainting?); 4 are supported"
        )
    if not model.lora:
        return source
    encoders = [encoder for _, encoder in TEXT_PARTS[source.kind]]
    configs = {part: read_object(source.place(part) / "config.json") for part in ("unet", *encoders)}
    return replace(source, loras=locate_loras(model.lora, configs))


def _explicit(model: Model) -> Model:
    """The section with what ``model.path = "embedded-v"`` stands for, except where it is given."""
    if model.path != schema.EMBEDDED_V:
        return model
    meant = {"unet": str(embedded.v_unet_path()), "prediction": "v", "zero_terminal_snr": "yes"}
    open_ones = {key: value for key, value in meant.items() if getattr(model, key) in ("", "auto")}
    return model.model_copy(update={**open_ones, "path": schema.EMBEDDED})


def _pipeline(model: Model, weights: bool) -> tuple[Path, SingleFile | None]:
    """The folder of ``model.path``, and the file that it was converted from."""
    if model.path == schema.EMBEDDED:
        return embedded.pipeline_path(), None
    if model.path in HUB_IDS and not Path(model.path).exists():
        return public_pipelines.folder(model.path), None
    if not Path(model.path).is_file():
        return _folder(model.path, "model.path", model, weights), None
    file = _recognised(model.path, "model.path")
    needed = [encoder for _, encoder in TEXT_PARTS[file.kind]]
    needed += [part for part in ("unet", "vae") if not getattr(model, part)]
    for part in needed:
        if part not in file.parts:
            advice = (
                "name one as model.vae" if part == "vae" else "a whole checkpoint is needed (this may be model.unet)"
            )
            raise ModelError(f"model.path: {file.header.file} has no {part}: {advice}")
    return converted(file, needed) if weights else public_pipelines.folder(file.kind), file


def _unet(model: Model, folder: Path, kind: str, weights: bool) -> tuple[Path, SingleFile | None]:
    """The folder with the UNet, and the file that it was converted from."""
    if not model.unet:
        return folder, None
    if not Path(model.unet).is_file():
        return _folder(model.unet, "model.unet", model, weights), None
    file = _recognised(model.unet, "model.unet")
    if file.kind != kind:
        raise ModelError(f"model.unet: {file.header.file} is a UNet of {file.kind}, but model.path is of {kind}")
    return converted(file, ["unet"]) if weights else public_pipelines.folder(kind), file


def _vae(model: Model, folder: Path, kind: str, weights: bool) -> Path:
    """The folder with the VAE."""
    if not model.vae:
        return folder
    if not Path(model.vae).is_file():
        return _folder(model.vae, "model.vae", model, weights)
    file = recognise_vae(Path(model.vae), "model.vae", kind)
    return converted(file, ["vae"]) if weights else public_pipelines.folder(kind)


def _recognised(where: str, key: str) -> SingleFile:
    file = recognise(Path(where), key)
    for warning in file.warnings:
        warn0(warning)
    return file


def _scheduler(model: Model, folder: Path, file: SingleFile | None) -> dict[str, Any]:
    """The pipeline's scheduler; what the file of its UNet says comes first, and ``[model]`` before all."""
    scheduler = read_object(folder / "scheduler" / "scheduler_config.json", "model.path")
    predicts = scheduler.get("prediction_type", "epsilon")
    zero = bool(scheduler.get("rescale_betas_zero_snr"))
    if file:
        predicts, zero = file.prediction_type, file.zero_terminal_snr
    predicts = {"auto": predicts, "v": "v_prediction"}.get(model.prediction, model.prediction)
    zero = {"auto": zero, "yes": True, "no": False}[model.zero_terminal_snr]
    if predicts not in PREDICTIONS:
        raise ModelError(
            f"model.path: {folder}/scheduler predicts {shown(predicts)}; supported are {', '.join(PREDICTIONS)}"
        )
    if (predicts, zero) == (scheduler.get("prediction_type", "epsilon"), bool(scheduler.get("rescale_betas_zero_snr"))):
        return scheduler
    return public_pipelines.adapted_scheduler(scheduler, predicts, zero)


def schedule_of(source: ModelSource, inversion: Inversion) -> NoiseSchedule:
    """The noise schedule that the pipeline was trained with."""
    return NoiseSchedule.from_config(source.scheduler, inversion.schedule_dtype)


def wanted_files(variant: str) -> tuple[list[str], list[str]]:
    """Patterns of files to fetch from the hub, and to leave out: card, configurations, one variant of the weights."""
    weights = f"*.{variant}*.safetensors" if variant else "*.safetensors"
    inside = [f"{part}/{p}" for part in (*PARTS, *OPTIONAL_PARTS) for p in ("*.json", "*.txt", weights)]
    alone = ["README.md", "config.json", "model_index.json", "diffusion_pytorch_model.safetensors"]
    others = [] if variant else ["*.fp16.safetensors", "*.bf16.safetensors", "*non_ema*"]
    return [*inside, *alone, f"diffusion_pytorch_model{weights[1:]}"], others


def _folder(where: str, key: str, model: Model, weights: bool) -> Path:
    if Path(where).is_dir():
        return Path(where)
    if Path(where).is_file():
        raise ModelError(f"{key}: {where} is a file; give a diffusers folder or a hub id")
    if not remote.is_hub_id(where) or Path(where).suffix in (".safetensors", ".ckpt"):
        raise ModelError(f"{key}: '{where}' is neither a folder nor a hub id (owner/name), and there is no such file")
    wanted, unwanted = wanted_files(model.variant) if weights else (["README.md", "*.json", "*/*.json"], [])
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
