"""Hashes of networks on disk: by them caches and checkpoints recognise the networks they were made with."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from smpo_fast.common import storage
from smpo_fast.models.locate import FILE_PATTERNS, ModelSource
from smpo_fast.models.pipeline_folder import TEXT_PARTS


def encoders_identity(source: ModelSource) -> str:
    """A hash of all files of the VAE, the text encoders and the tokenizers, and of the LoRAs that change these.

    This is what a cache's content depends on.
    """
    digest = hashlib.sha256()
    parts = [source.vae_folder] + [source.folder / name for pair in TEXT_PARTS[source.kind] for name in pair]
    for part in parts:
        for file in sorted(f for pattern in FILE_PATTERNS for f in part.glob(pattern)):
            digest.update(f"{part.name}/{file.name}\0".encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    encoders = {encoder for _, encoder in TEXT_PARTS[source.kind]}
    for lora in source.loras:
        if encoders & set(lora.layers):
            digest.update(f"lora {lora.scale} {storage.sha256(lora.file)}".encode())
    return digest.hexdigest()[:32]


def base_identity(source: ModelSource) -> str | dict[str, Any]:
    """What identifies the weights that policy and reference start from: the UNet's, and the LoRAs that are added."""
    unet = weights_identity(source.unet_folder)
    if not source.loras:
        return unet
    return {"unet": unet, "loras": [[storage.sha256(lora.file)[:16], lora.scale] for lora in source.loras]}


def weights_identity(part: Path) -> str:
    """A quick hash of a network's folder: its configuration, and size, first and last MiB of its weight files.

    Fine-tuned weights differ at both ends; reading all 10 GB would take longer than loading them.
    """
    digest = hashlib.sha256((part / "config.json").read_bytes())
    for file in sorted(part.glob("*.safetensors")):
        with file.open("rb") as stream:
            digest.update(f"{file.name}/{file.stat().st_size}\0".encode() + stream.read(2**20))
            stream.seek(-min(2**20, file.stat().st_size), 2)
            digest.update(stream.read())
    return digest.hexdigest()[:16]
