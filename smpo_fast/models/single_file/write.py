"""Writing a pipeline as one file in the original layout of SDXL and SD1.5, which ComfyUI, A1111 and InvokeAI read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from smpo_fast.common.errors import EnvironmentProblem
from smpo_fast.models.config_files import read_object
from smpo_fast.models.export import to_export_dtype
from smpo_fast.models.load import load_network
from smpo_fast.models.locate import ModelSource
from smpo_fast.models.pipeline_folder import begin_export, publish_export
from smpo_fast.models.single_file import layout
from smpo_fast.models.single_file.header import set_metadata
from smpo_fast.models.single_file.parts import CLASSES, classic_names
from smpo_fast.models.single_file.recognise import V_PRED, ZTSNR

_ARCHITECTURES = {"sdxl": "stable-diffusion-xl-v1-base", "sd15": "stable-diffusion-v1"}
_IMPLEMENTATIONS = {
    "sdxl": "https://github.com/Stability-AI/generative-models",
    "sd15": "https://github.com/CompVis/stable-diffusion",
}
_HASH = "modelspec.hash_sha256"


def write_single_file(source: ModelSource, folder: Path, *, title: str, resolution: int, dtype: str) -> Path:
    """Write ``<folder>/<title>.safetensors`` with all weights of a pipeline as ``dtype``; returns its path.

    The folder appears complete or not at all, after the file has been read again and compared. The same pipeline gives
    the same bytes. resolution: in px, for the metadata. Raises ModelError for weights that are not finite or do not fit
    the dtype, and EnvironmentProblem where the disk does not give back what was written.
    """
    tensors = _tensors(source, dtype)
    building = begin_export(folder)
    file = building / f"{title}.safetensors"
    metadata = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": _ARCHITECTURES[source.kind],
        "modelspec.implementation": _IMPLEMENTATIONS[source.kind],
        "modelspec.title": title,
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.prediction_type": "v" if source.prediction_type == "v_prediction" else "epsilon",
        _HASH: "0x" + 64 * "0",  # of all that follows the header: known once it is written
    }
    save_file(tensors, file, metadata)
    set_metadata(file, metadata | {_HASH: f"0x{_content_hash(file)}"})
    _check_written(file, tensors)
    publish_export(building, folder)
    return folder / file.name


def _tensors(source: ModelSource, dtype: str) -> dict[str, Tensor]:
    """Everything that the file holds, by its names there."""
    places = {"unet": source.unet_folder, "vae": source.vae_folder}
    found: dict[str, Tensor] = {}
    for part, prefix in layout.PREFIXES[source.kind].items():
        place = places.get(part, source.folder / part)
        # a run's UNet has been checked in the export's dtype, and in float32 it would take 10 GB
        loaded = getattr(torch, dtype) if part == "unet" else torch.float32
        network = load_network(CLASSES[part], place, source.variant, loaded)
        state = to_export_dtype(classic_names(part, network.state_dict()), dtype)
        for name, value in _as_original(part, state, place).items():
            found[prefix + name] = value.contiguous()
        del network, state
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


def _content_hash(file: Path) -> str:
    """SHA-256 of everything after the header, as modelspec defines it."""
    with file.open("rb") as stream:
        stream.seek(8 + int.from_bytes(stream.read(8), "little"))
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_written(file: Path, tensors: Mapping[str, Tensor]) -> None:
    with safe_open(file, framework="pt") as written:
        same = set(written.keys()) == set(tensors)
        for name, value in tensors.items() if same else ():
            same = same and torch.equal(written.get_tensor(name), value)
    if not same:
        raise EnvironmentProblem(f"{file} does not read back as it was written: check the disk, and export again")
