"""LoRA files for other programs: diffusers, peft, and those that read the names of kohya's scripts (ComfyUI, A1111)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from smpo_fast.common import storage
from smpo_fast.common.errors import ModelError
from smpo_fast.models.config_files import read_object
from smpo_fast.models.load import pipeline_class
from smpo_fast.models.locate import ModelSource
from smpo_fast.models.lora import Adapters
from smpo_fast.models.pipeline_folder import (
    LORA_FILE,
    PEFT_FILE,
    PEFT_SETTINGS,
    begin_export,
    check_written,
    publish_export,
)
from smpo_fast.models.single_file import layout
from smpo_fast.models.single_file.header import sort_header
from smpo_fast.models.single_file.modelspec import write_described
from smpo_fast.models.single_file.parts import empty_state

# Each writer makes a folder that appears complete or not at all, after its tensors have been read again and compared:
# it raises EnvironmentProblem where the disk does not give back what was written.


def write_diffusers(adapters: Adapters, source: ModelSource, folder: Path) -> None:
    """Write adapters for ``pipe.load_lora_weights(folder)``.

    The file's metadata has peft's settings, from which loaders take a scale other than 1, and DoRA.
    """
    building = begin_export(folder)
    pipeline_class(source).save_lora_weights(
        building, unet_lora_layers=dict(adapters.tensors), unet_lora_adapter_metadata=dict(adapters.settings)
    )
    sort_header(building / LORA_FILE)
    check_written(building / LORA_FILE, {f"unet.{name}": value for name, value in adapters.tensors.items()})
    publish_export(building, folder)


def write_peft(adapters: Adapters, folder: Path) -> None:
    """Write adapters for ``PeftModel.from_pretrained(unet, folder)``."""
    building = begin_export(folder)
    tensors = {f"base_model.model.{name}": value for name, value in adapters.tensors.items()}
    save_file(tensors, building / PEFT_FILE, {"format": "pt"})
    check_written(building / PEFT_FILE, tensors)
    storage.write_json(building / PEFT_SETTINGS, dict(adapters.settings), indent=2)
    publish_export(building, folder)


def write_kohya(
    adapters: Adapters, source: ModelSource, folder: Path, metadata: Mapping[str, str], *, title: str, resolution: int
) -> None:
    """Write ``<folder>/<title>.safetensors`` with the names that kohya's sd-scripts give to layers.

    These are the original names for SDXL and diffusers' for SD1.5. metadata: beside what the scripts write themselves;
    resolution: in px. Raises ModelError for DoRA.
    """
    tensors = kohya_tensors(adapters, source)
    building = begin_export(folder)
    said = {**metadata, **_kohya_metadata(tensors, source, title, resolution)}
    write_described(building / f"{title}.safetensors", tensors, said)
    publish_export(building, folder)


def kohya_tensors(adapters: Adapters, source: ModelSource) -> dict[str, Tensor]:
    """The tensors of a file of kohya's scripts, where alpha / rank is a layer's scale. Raises ModelError for DoRA."""
    if adapters.settings["use_dora"]:
        raise ModelError("readers of kohya's names do not agree on what a DoRA is: use another format")
    names, found = _kohya_names(source), {}
    root = bool(adapters.settings["use_rslora"])
    for name, down in adapters.tensors.items():
        layer, which, _ = name.rpartition(".lora_A.")
        if not which:
            continue
        scale = math.sqrt(len(down)) if root else 1.0  # rsLoRA's alpha / sqrt(rank), as an alpha that the rank divides
        found[f"{names[layer]}.lora_down.weight"] = down
        found[f"{names[layer]}.lora_up.weight"] = adapters.tensors[f"{layer}.lora_B.weight"]
        found[f"{names[layer]}.alpha"] = torch.tensor(adapters.alpha(layer) * scale)
    return found


def _kohya_names(source: ModelSource) -> dict[str, str]:
    """What kohya's scripts call each layer of a UNet."""
    config = read_object(source.unet_folder / "config.json")
    weights = empty_state("unet", config)
    names = {name: name for name in weights}
    if source.kind == "sdxl":
        names = {name: original.name for name, original in layout.original_names("unet", weights, config).items()}
    return {
        here.removesuffix(".weight"): f"lora_unet_{there.removesuffix('.weight').replace('.', '_')}"
        for here, there in names.items()
    }


def _kohya_metadata(tensors: Mapping[str, Tensor], source: ModelSource, title: str, resolution: int) -> dict[str, str]:
    ranks = {len(value) for name, value in tensors.items() if name.endswith(".lora_down.weight")}
    alphas = {float(value) for name, value in tensors.items() if name.endswith(".alpha")}
    convolutions = any(value.ndim == 4 and value.shape[-1] > 1 for value in tensors.values())
    rank, alpha = (f"{found.pop():g}" if len(found) == 1 else "Dynamic" for found in (ranks, alphas))
    words: dict[str, Any] = {"conv_dim": rank, "conv_alpha": alpha} if convolutions else {}
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": alpha,
        "ss_network_args": json.dumps(words),
        "ss_base_model_version": {"sdxl": "sdxl_base_v1-0", "sd15": "sd_v1"}[source.kind],
        "ss_v2": "False",
        "ss_resolution": f"({resolution}, {resolution})",
        "ss_output_name": title,
        "ss_v_parameterization": str(source.prediction_type == "v_prediction"),
        "ss_zero_terminal_snr": str(bool(source.scheduler.get("rescale_betas_zero_snr"))),
    }
