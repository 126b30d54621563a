"""Writing a trained pipeline as a diffusers folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from smpo_fast.common.errors import ModelError
from smpo_fast.config.schema import Model
from smpo_fast.models.config_files import read_object
from smpo_fast.models.load import empty_unet, load_part
from smpo_fast.models.locate import ModelSource
from smpo_fast.models.pipeline_folder import (
    OPTIONAL_PARTS,
    PARTS,
    begin_export,
    check_written,
    publish_export,
    write_scheduler,
)
from smpo_fast.models.single_file.parts import WEIGHTS, classic_names


def export_pipeline(source: ModelSource, state: Mapping[str, Tensor], folder: Path, dtype: str) -> None:
    """Write the pipeline with the trained UNet as a folder that diffusers can load; it appears complete or not at all.

    state: all parameters of the UNet by name, of the same shapes as there; they are written as ``dtype``. The
    other parts are copied rather than loaded and saved: they are exactly the files used in training, and library
    versions that could read those can read the export. Text encoders that LoRAs of the base change are written with
    these. An earlier export is replaced, except for files that no export writes, such as a README.
    The UNet is read again and compared. Raises RuntimeError when names or shapes differ from the UNet's, ModelError for
    weights that are not finite or do not fit the dtype, and EnvironmentProblem where the disk does not give back what
    was written.
    """
    unet, cast = empty_unet(source), to_export_dtype(state, dtype)
    unet.load_state_dict(cast, assign=True)
    building = begin_export(folder)
    shutil.copyfile(source.folder / "model_index.json", building / "model_index.json")
    for part in (*PARTS[2:], *OPTIONAL_PARTS):
        if source.loras_of(part):
            _write_part(source, part, building / part, dtype)
        elif (source.folder / part).is_dir():
            _copy_part(source.folder / part, building / part, source.variant)
    if source.scheduler != read_object(source.folder / "scheduler" / "scheduler_config.json"):
        write_scheduler(building, read_object(source.folder / "model_index.json"), source.scheduler)
    _copy_part(source.vae_folder, building / "vae", source.variant)
    unet.save_pretrained(building / "unet", safe_serialization=True)
    check_written(building / "unet", cast)
    publish_export(building, folder)


def exported_model(model: Model, folder: Path) -> Model:
    """The section [model] for an exported pipeline: what was chosen beside the path is part of the pipeline now."""
    applied = ("vae", "unet", "variant", "lora", "prediction", "zero_terminal_snr")
    defaults = Model().model_dump(include=set(applied))
    return model.model_copy(update={**defaults, "path": str(folder)})


def to_export_dtype(state: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Tensors of any shape by name, cast to ``model.export_dtype``.

    Raises ModelError naming a tensor that has NaN or infinite values, or values beyond the dtype's range.
    """
    cast = {name: value.to(getattr(torch, dtype)) for name, value in state.items()}
    for name, value in cast.items():
        if value.isfinite().all():
            continue
        if not state[name].isfinite().all():
            raise ModelError(
                f"{name} has NaN or infinite values: the training has diverged, and nothing is exported; continue from "
                "an earlier checkpoint with a smaller optim.lr"
            )
        largest = state[name].abs().max().item()
        raise ModelError(
            f"{name} has values up to {largest:.3g}, beyond the range of model.export_dtype = '{dtype}': export as "
            "bfloat16 or float32, and check that the training has not diverged"
        )
    return cast


def frozen_state(source: ModelSource, part: str) -> dict[str, Tensor]:
    """The weights of a part that is not trained, in float32, by the names that every version of the libraries reads."""
    found = classic_names(part, load_part(source, part, torch.float32).state_dict())
    return {name: value for name, value in found.items() if not name.endswith("position_ids")}


def _write_part(source: ModelSource, part: str, there: Path, dtype: str) -> None:
    """Write a part that is not the file that it was loaded from, with its configuration."""
    there.mkdir()
    shutil.copyfile(source.place(part) / "config.json", there / "config.json")
    state = {name: value.contiguous() for name, value in to_export_dtype(frozen_state(source, part), dtype).items()}
    save_file(state, there / WEIGHTS[part], {"format": "pt"})
    check_written(there, state)


def _copy_part(here: Path, there: Path, variant: str | None) -> None:
    """Copy a part's configuration and weights; the chosen variant's weights get the plain name."""
    there.mkdir()
    weights = [f for f in here.glob("*.safetensors") if not _variant_of(f)]
    if variant and (chosen := [f for f in here.glob("*.safetensors") if _variant_of(f) == variant]):
        weights = chosen
    for file in [*here.glob("*.json"), *here.glob("*.txt"), *weights]:
        shutil.copyfile(file, there / file.name.replace(f".{_variant_of(file)}.", "."))


def _variant_of(file: Path) -> str:
    """'fp16' of ``model.fp16.safetensors``, '' of ``model.safetensors`` and of files other than weights."""
    return "".join(file.name.split(".")[1:-1]) if file.suffix == ".safetensors" else ""
