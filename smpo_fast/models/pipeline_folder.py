"""Pipeline folders that are written here: what they consist of, and how one appears complete or not at all.

Beside the files that loaders read, such a folder has ``export.json``: size and SHA-256 of each of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from smpo_fast.common import storage
from smpo_fast.common.errors import EnvironmentProblem

TEXT_PARTS = {
    "sdxl": (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")),
    "sd15": (("tokenizer", "text_encoder"),),
}
PARTS = ("unet", "vae", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
OPTIONAL_PARTS = ("feature_extractor", "safety_checker")
LORA_FILE = "pytorch_lora_weights.safetensors"
LORA_SETTINGS = "lora_adapter_metadata"  # of such a file: peft's settings as JSON, each name behind "unet."
PEFT_FILE, PEFT_SETTINGS = "adapter_model.safetensors", "adapter_config.json"
EXPORT_INFO = "export.json"


def write_scheduler(folder: Path, index: Mapping[str, Any], scheduler: Mapping[str, Any]) -> None:
    """Write a pipeline's scheduler, and ``model_index.json`` with the values ``index`` and the scheduler's class."""
    (folder / "scheduler").mkdir(exist_ok=True)
    storage.write_json(folder / "scheduler" / "scheduler_config.json", dict(scheduler), indent=2)
    found = {**index, "scheduler": ["diffusers", scheduler["_class_name"]]}
    storage.write_json(folder / "model_index.json", found, indent=2)


def begin_export(folder: Path) -> Path:
    """An empty folder next to ``folder``, to write its new content to; what a killed export left there is removed."""
    building = folder.resolve().with_name(f".{folder.resolve().name}.tmp")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    return building


def check_written(place: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read a safetensors file again, or all of a folder, and compare with the ``tensors``, of any shapes, in them.

    Raises EnvironmentProblem where the disk does not give back what was written.
    """
    left = set(tensors)
    for file in [place] if place.is_file() else sorted(place.glob("*.safetensors")):
        with safe_open(file, framework="pt") as written:
            names = set(written.keys())
            left ^= {n for n in names if n not in tensors or torch.equal(written.get_tensor(n), tensors[n])}
    if left:
        raise EnvironmentProblem(f"{place} does not read back as it was written: check the disk, and export again")


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
        if file.name not in ours and not (folder / file.name).exists():
            copy = shutil.copytree if file.is_dir() else shutil.copy2
            copy(file, folder / file.name)
