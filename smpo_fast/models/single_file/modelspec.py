"""The metadata by which image programs describe a file (Stability AI's modelspec 1.0.0), and files that carry it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from smpo_fast.models.locate import ModelSource
from smpo_fast.models.pipeline_folder import check_written
from smpo_fast.models.single_file.header import set_metadata

_ARCHITECTURES = {"sdxl": "stable-diffusion-xl-v1-base", "sd15": "stable-diffusion-v1"}
_STABILITY = "https://github.com/Stability-AI/generative-models"
_IMPLEMENTATIONS = {
    "sdxl": _STABILITY,
    "sd15": "https://github.com/CompVis/stable-diffusion",
    "sdxl/lora": _STABILITY,
    "sd15/lora": "diffusers",  # whose names kohya's scripts give to a LoRA's layers
}
_HASH = "modelspec.hash_sha256"


def modelspec(source: ModelSource, title: str, resolution: int, *, lora: bool = False) -> dict[str, str]:
    """The metadata of a checkpoint of a source's kind, or of a LoRA for one. resolution: in px."""
    kind = "/lora" if lora else ""
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": _ARCHITECTURES[source.kind] + kind,
        "modelspec.implementation": _IMPLEMENTATIONS[source.kind + kind],
        "modelspec.title": title,
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.prediction_type": "v" if source.prediction_type == "v_prediction" else "epsilon",
    }


def write_described(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors of any shape with metadata and the hash of their bytes; equal ones give equal files.

    The file is read again: raises EnvironmentProblem where the disk does not give back what was written.
    """
    said = {"format": "pt", **metadata, _HASH: "0x" + 64 * "0"}  # known once the tensors are written
    save_file(dict(tensors), file, said)
    set_metadata(file, said | {_HASH: f"0x{_content_hash(file)}"})
    check_written(file, tensors)


def _content_hash(file: Path) -> str:
    """SHA-256 of everything after the header, as modelspec defines it."""
    with file.open("rb") as stream:
        stream.seek(8 + int.from_bytes(stream.read(8), "little"))
        return hashlib.file_digest(stream, "sha256").hexdigest()
