"""Writing a trained pipeline as a diffusers folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from smpo_fast.common.errors import ModelError
from smpo_fast.config.schema import Model
from smpo_fast.models.config_files import read_object
from smpo_fast.models.load import empty_unet
from smpo_fast.models.locate import ModelSource
from smpo_fast.models.pipeline_folder import (
    OPTIONAL_PARTS,
    PARTS,
    begin_export,
    check_written,
    publish_export,
    write_scheduler,
)


def export_pipeline(source: ModelSource, state: Mapping[str, Tensor], folder: Path, dtype: str) -> None:
    """Write the pipeline with the trained UNet as a folder that diffusers can load; it appears complete or not at all.

    state: all parameters of the UNet by name, of the same shapes as there; they are written as ``dtype``. The
    other parts are copied rather than loaded and saved: they are exactly the files used in training, and library
    versions that could read those can read the export. An earlier export is replaced, except for files that no export
    writes, such as a README.
    The UNet is read again and compared. Raises RuntimeError when names or shapes differ from the UNet's, ModelError for
    weights that are not finite or do not fit the dtype, and EnvironmentProblem where the disk does not give back what
    was written.
    """
    unet, cast = empty_unet(source), to_export_dtype(state, dtype)
    unet.load_state_dict(cast, assign=True)
    building = begin_export(folder)
    shutil.copyfile(source.folder / "model_index.json", building / "model_index.json")
    for part in (*PARTS[2:], *OPTIONAL_PARTS):
        if (source.folder / part).is_dir():
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
