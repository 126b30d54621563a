"""Writing a trained pipeline as a diffusers folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from smpo_fast.models.load import empty_unet
from smpo_fast.models.locate import OPTIONAL_PARTS, PARTS, ModelSource


def export_pipeline(source: ModelSource, state: Mapping[str, Tensor], folder: Path, dtype: str) -> None:
    """Write the pipeline with the trained UNet as a folder that diffusers can load.

    state: all parameters of the UNet by name, with the shapes of the UNet's own; they are written as ``dtype``. The
    other parts are copied rather than loaded and saved: they are exactly the files used in training, and library
    versions that could read those can read the export.
    Raises RuntimeError when names or shapes differ from the UNet's.
    """
    unet = empty_unet(source)
    unet.load_state_dict({name: value.to(getattr(torch, dtype)) for name, value in state.items()}, assign=True)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source.folder / "model_index.json", folder / "model_index.json")
    for part in (*PARTS[2:], *OPTIONAL_PARTS):
        if (source.folder / part).is_dir():
            _copy_part(source.folder / part, folder / part, source.variant)
    _copy_part(source.vae_folder, folder / "vae", source.variant)
    unet.save_pretrained(folder / "unet", safe_serialization=True)


def _copy_part(here: Path, there: Path, variant: str | None) -> None:
    """Copy a part's configuration and weights; the chosen variant's weights get the plain name."""
    shutil.rmtree(there, ignore_errors=True)
    there.mkdir()
    weights = [f for f in here.glob("*.safetensors") if not _variant_of(f)]
    if variant and (chosen := [f for f in here.glob("*.safetensors") if _variant_of(f) == variant]):
        weights = chosen
    for file in [*here.glob("*.json"), *here.glob("*.txt"), *weights]:
        shutil.copyfile(file, there / file.name.replace(f".{_variant_of(file)}.", "."))


def _variant_of(file: Path) -> str:
    """'fp16' of ``model.fp16.safetensors``, '' of ``model.safetensors`` and of files other than weights."""
    return "".join(file.name.split(".")[1:-1]) if file.suffix == ".safetensors" else ""
