"""Writing a pipeline as one file in the original layout of SDXL and SD1.5, which ComfyUI, A1111 and InvokeAI read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from smpo_fast.models.config_files import read_object
from smpo_fast.models.export import frozen_state, to_export_dtype
from smpo_fast.models.locate import ModelSource
from smpo_fast.models.pipeline_folder import begin_export, publish_export
from smpo_fast.models.single_file import layout
from smpo_fast.models.single_file.modelspec import write_described
from smpo_fast.models.single_file.recognise import V_PRED, ZTSNR


def write_single_file(
    source: ModelSource,
    unet: Mapping[str, Tensor],
    folder: Path,
    metadata: Mapping[str, str],
    *,
    title: str,
    dtype: str,
) -> Path:
    """Write ``<folder>/<title>.safetensors`` with all weights of a pipeline as ``dtype``; returns its path.

    unet: the UNet's weights by name, of any shapes; VAE and text encoders are the source's. The folder appears complete
    or not at all, after the file has been read again and compared. The same pipeline gives the same bytes. Raises
    ModelError for weights that are not finite or do not fit the dtype, and EnvironmentProblem where the disk does not
    give back what was written.
    """
    tensors = _tensors(source, unet, dtype)
    building = begin_export(folder)
    file = building / f"{title}.safetensors"
    write_described(file, tensors, metadata)
    publish_export(building, folder)
    return folder / file.name


def _tensors(source: ModelSource, unet: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Everything that the file holds, by its names there."""
    found: dict[str, Tensor] = {}
    for part, prefix in layout.PREFIXES[source.kind].items():
        state = to_export_dtype(unet if part == "unet" else frozen_state(source, part), dtype)
        for name, value in _as_original(part, state, source.place(part)).items():
            found[prefix + name] = value.contiguous()
        del state
    positions = found[layout.PREFIXES[source.kind]["text_encoder"] + "text_model.embeddings.position_embedding.weight"]
    found[layout.PREFIXES[source.kind]["text_encoder"] + layout.POSITION_IDS] = torch.arange(len(positions))[None]
    if source.prediction_type == "v_prediction":
        found[V_PRED] = torch.empty(0)
    if source.scheduler.get("rescale_betas_zero_snr"):
        found[ZTSNR] = torch.empty(0)
    return found


def _as_original(part: str, state: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """A part's tensors by their original names, in their original shapes."""
    config = read_object(folder / "config.json")
    thirds: dict[str, dict[int, Tensor]] = {}
    for name, original in layout.original_names(part, state, config).items():
        value = state[name].T if original.name == layout.TEXT_PROJECTION else state[name]
        if part == "vae" and layout.is_vae_attention(original.name):
            value = value[:, :, None, None]  # linear layers are convolutions of one pixel there
        thirds.setdefault(original.name, {})[original.third or 0] = value
    return {
        name: torch.cat([found[i] for i in sorted(found)]) if len(found) > 1 else found[0]
        for name, found in thirds.items()
    }
