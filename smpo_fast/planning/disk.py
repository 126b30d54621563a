"""Disk space of a run, and the number of its pairs."""

from __future__ import annotations

import math

import torch

from smpo_fast.common.errors import UserError
from smpo_fast.common.runtime import COMPUTE_DTYPES
from smpo_fast.config.schema import Config
from smpo_fast.data.pairs import reader
from smpo_fast.models import footprint
from smpo_fast.models.config_files import read_object
from smpo_fast.models.locate import ModelSource
from smpo_fast.models.network_spec import IMAGES_PER_PAIR
from smpo_fast.models.single_file.parts import empty_state
from smpo_fast.planning.memory import average_bytes, state_bytes
from smpo_fast.planning.planned_run import PlannedRun

FILE_BYTES = 2  # per number in the cache and in the trajectories: float16


def disk_bytes(run: PlannedRun, source: ModelSource) -> dict[str, float]:
    """Bytes of the files that a run writes, as if no two pairs shared a prompt."""
    settings, (trained, frozen), variant = run.config, run.counts, run.variant()
    latent, prompt = math.prod(run.network.latent), math.prod(run.network.prompt)
    pooled = run.network.pooled if run.network.kind == "sdxl" else 0
    pairs, _ = count_pairs(settings)
    flips, moments = 1 + settings.data.flip, 2
    stepped = 4 if variant.master == "fp32" else COMPUTE_DTYPES[variant.precision].itemsize
    checkpoint = stepped * trained + state_bytes(variant.optimizer, run.network) + average_bytes(run)
    parts = ("vae", "text_encoder", "text_encoder_2")
    if source.file is None:
        others = sum(f.stat().st_size for part in parts for f in (source.folder / part).glob("*.safetensors"))
    else:
        others = sum(source.file.bytes_of(part) for part in parts if part in source.file.parts)
    number = getattr(torch, settings.model.export_dtype).itemsize
    pipeline = (trained + frozen) * number + others
    if settings.lora.rank:  # trained are the adapters, which are merged into the frozen weights
        pipeline = frozen * number + others
    values = trained if settings.lora.rank else _extracted_values(run)
    kinds = len(settings.exported)
    loras = sum(name.startswith("lora-") for name in settings.export.formats)
    examples = settings.batch.pairs_per_step * FILE_BYTES * IMAGES_PER_PAIR * latent
    return {
        "cache": pairs * FILE_BYTES * (IMAGES_PER_PAIR * flips * moments * latent + prompt + pooled),
        "checkpoints": (settings.run.keep + 1) * checkpoint,  # one more while the next is written
        "export": kinds * (trained * number if settings.lora.rank else pipeline),
        "merged pipeline": kinds * pipeline if settings.lora.merge else 0.0,
        "single file": kinds * (_values(source) + (frozen or trained)) * number
        if "single-file" in settings.export.formats
        else 0.0,
        "LoRA files": kinds * loras * values * number,
        "converted model": 0.0 if source.file is None else others + source.file.bytes_of("unet"),
        "evaluation": _evaluation_bytes(settings),
        "trajectories": examples * settings.run.steps if settings.inversion.store else 0.0,
    }


def _evaluation_bytes(settings: Config) -> float:
    """Of the images, as if PNG saved nothing: those of the base, the export and every contender."""
    e, pixels = settings.eval, settings.data.resolution**2
    return 3.0 * pixels * e.count * e.per_prompt * (2 + len(e.contenders)) if e.prompts else 0.0


def _extracted_values(run: PlannedRun) -> int:
    """How many numbers a LoRA has that is extracted from the change of all weights, at its largest rank."""
    shapes = [shape for shape in footprint.parameter_shapes(run.network).trained if len(shape) > 1]
    sides = [(shape[0], math.prod(shape[1:])) for shape in shapes]
    return sum(min(run.config.export.lora_rank, *both) * sum(both) for both in sides)


def _values(source: ModelSource) -> int:
    """How many numbers the VAE and the text encoders have."""
    folders = {"vae": source.vae_folder, "text_encoder": source.folder / "text_encoder"}
    if source.kind == "sdxl":
        folders["text_encoder_2"] = source.folder / "text_encoder_2"
    states = [empty_state(part, read_object(folder / "config.json")) for part, folder in folders.items()]
    return sum(value.numel() for state in states for value in state.values())


def count_pairs(settings: Config) -> tuple[int, str]:
    """How many pairs a cache will have, and on what basis."""
    try:
        rows = reader.count_rows(reader.source_path(settings.data.pairs), max_pairs=settings.data.max_pairs)
        return rows, "rows of data.pairs"
    except UserError:
        visited = settings.run.steps * settings.drawn_per_step
        return min(visited, settings.data.max_pairs or visited), "pairs that the run visits: data.pairs is not here"
