"""Writing a trained pipeline as a diffusers folder.

Beside the files that loaders read, an export has ``export.json``: size and SHA-256 of each of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from smpo_fast.common import storage
from smpo_fast.common.errors import ModelError
from smpo_fast.models.load import empty_unet
from smpo_fast.models.locate import OPTIONAL_PARTS, PARTS, ModelSource

LORA_FILE = "pytorch_lora_weights.safetensors"
EXPORT_INFO = "export.json"


def export_pipeline(source: ModelSource, state: Mapping[str, Tensor], folder: Path, dtype: str) -> None:
    """Write the pipeline with the trained UNet as a folder that diffusers can load; it appears complete or not at all.

    state: all parameters of the UNet by name, of the same shapes as there; they are written as ``dtype``. The
    other parts are copied rather than loaded and saved: they are exactly the files used in training, and library
    versions that could read those can read the export. An earlier export is replaced, except for files that no export
    writes, such as a README.
    Raises RuntimeError when names or shapes differ from the UNet's, and ModelError for weights that are not finite or
    do not fit the dtype.
    """
    unet = empty_unet(source)
    unet.load_state_dict(to_export_dtype(state, dtype), assign=True)
    building = begin_export(folder)
    shutil.copyfile(source.folder / "model_index.json", building / "model_index.json")
    for part in (*PARTS[2:], *OPTIONAL_PARTS):
        if (source.folder / part).is_dir():
            _copy_part(source.folder / part, building / part, source.variant)
    _copy_part(source.vae_folder, building / "vae", source.variant)
    unet.save_pretrained(building / "unet", safe_serialization=True)
    publish_export(building, folder)


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


def begin_export(folder: Path) -> Path:
    """An empty folder next to ``folder``, to write its new content to; what a killed export left there is removed."""
    building = folder.resolve().with_name(f".{folder.resolve().name}.tmp")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    return building


def publish_export(building: Path, folder: Path) -> None:
    """Describe and sync the files of ``building``, and put it in the place of an earlier export, all at once.

    Files of the earlier one that no export writes, such as a README, are kept.
    """
    folder = folder.resolve()
    files = {f.relative_to(building).as_posix(): storage.file_facts(f) for f in building.rglob("*") if f.is_file()}
    storage.write_json(building / EXPORT_INFO, storage.sealed({"files": dict(sorted(files.items()))}), indent=1)
    _keep_other_files(folder, building)
    _finish_files(building)
    storage.replace_folder(building, folder)


def _finish_files(folder: Path) -> None:
    """Sync all files of a folder, and give weights the umask's permissions: safetensors makes them 0600."""
    mode = storage.default_mode(folder)
    for file in folder.rglob("*"):
        if file.suffix == ".safetensors":
            file.chmod(mode)
        if file.is_file():
            storage.sync(file)


def _keep_other_files(earlier: Path, folder: Path) -> None:
    ours = {"model_index.json", LORA_FILE, EXPORT_INFO, *PARTS, *OPTIONAL_PARTS}
    for file in earlier.iterdir() if earlier.is_dir() else ():
        if file.name not in ours:
            copy = shutil.copytree if file.is_dir() else shutil.copy2
            copy(file, folder / file.name)


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
