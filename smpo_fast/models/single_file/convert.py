"""A single-file checkpoint as a diffusers folder: converted once, kept in the user's cache, shared by all processes.

The tensors are those of the file, in its own dtype; the configurations are those of the public pipelines. diffusers
converts the names, without any access to the network.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from diffusers.utils import logging
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from smpo_fast.common import storage
from smpo_fast.common.console import printable
from smpo_fast.common.errors import ModelError
from smpo_fast.common.runtime import print0, warn0
from smpo_fast.models import public_pipelines
from smpo_fast.models.config_files import read_object, some
from smpo_fast.models.pipeline_folder import EXPORT_INFO, TEXT_PARTS, begin_export, publish_export, write_scheduler
from smpo_fast.models.single_file import layout
from smpo_fast.models.single_file.parts import CLASSES, WEIGHTS, classic_names, empty_state
from smpo_fast.models.single_file.recognise import SingleFile

_FORMAT = 1  # of the converted folder: a change of it converts every file again
# In many files, but not used by the pipelines: positions 0, 1, 2, ..., and what CLIP compares texts and images with.
_UNUSED = {layout.POSITION_IDS, "text_projection.weight", "logit_scale", "attn_mask"}


def converted(found: SingleFile, wanted: Iterable[str]) -> Path:
    """A diffusers folder with the ``wanted`` parts of a checkpoint, and its scheduler, from the cache or made now.

    Raises ModelError where a part has not all tensors of its network.
    """
    parts = sorted(wanted)
    key = {"file": found.header.identity, "kind": found.kind, "parts": parts, "format": _FORMAT}
    folder = storage.user_cache() / "models" / storage.json_hash(key)[:16]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        storage.take_lock(lock, wait=True)
        if not (folder / EXPORT_INFO).is_file():
            print0(f"{found.header.file}: converting {', '.join(parts)}, once, to {folder}")
            _convert(found, parts, folder)
    return folder


def _convert(found: SingleFile, parts: Iterable[str], folder: Path) -> None:
    building, public = begin_export(folder), public_pipelines.folder(found.kind)
    for part in parts:
        _copy_configuration(public / part, building / part)
        state = {name: value.contiguous() for name, value in _state(found, part, public).items()}
        save_file(state, building / part / WEIGHTS[part], {"format": "pt"})
    if "text_encoder" in parts:
        for tokenizer, _ in TEXT_PARTS[found.kind]:
            _copy_configuration(public / tokenizer, building / tokenizer)
            public_pipelines.write_vocabulary(building / tokenizer)
        scheduler = read_object(public / "scheduler" / "scheduler_config.json")
        write_scheduler(
            building,
            read_object(public / "model_index.json"),
            public_pipelines.adapted_scheduler(scheduler, found.prediction_type, found.zero_terminal_snr),
        )
    publish_export(building, folder)


def _copy_configuration(here: Path, there: Path) -> None:
    there.mkdir()
    for file in here.glob("*.json"):
        shutil.copyfile(file, there / file.name)


def _state(found: SingleFile, part: str, public: Path) -> dict[str, Tensor]:
    """A part's tensors by diffusers' names. Raises ModelError where the file lacks some, or they have other shapes."""
    config, place = read_object(public / part / "config.json"), found.parts[part]
    names = empty_state(part, config)
    originals = {original.name for original in layout.original_names(part, names, config).values()}
    needed = originals if place.original else set(names)
    tensors = _read(found, part)
    missing = sorted(needed - set(tensors))
    if missing:
        raise ModelError(f"{found.header.file} has no complete {part} of {found.kind}: {some(missing)} missing")
    if others := sorted(set(tensors) - needed - _UNUSED):
        warn0(f"{found.header.file}: {some(others)} not used: the {part} of {found.kind} has no such tensors")
    prefix = layout.PREFIXES[found.kind][part] if place.original else ""
    dtypes = {value.dtype for value in tensors.values() if value.is_floating_point()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    try:
        network = _network(part, {prefix + name: tensors[name] for name in needed}, public, dtype)
    except Exception as error:  # other shapes make the libraries raise anything
        raise ModelError(f"{found.header.file} has no {part} of {found.kind}: {printable(error)}") from error
    return classic_names(part, network.state_dict())


def _read(found: SingleFile, part: str) -> dict[str, Tensor]:
    """The tensors of a part by their names without prefix."""
    place = found.parts[part]
    try:
        with safe_open(found.header.file, framework="pt") as file:
            return {place.lost + name.removeprefix(place.prefix): file.get_tensor(name)
                    for name in found.header.tensors if name.startswith(place.prefix)}  # fmt: skip
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{found.header.file} cannot be read: {error}") from error


def _network(part: str, tensors: dict[str, Tensor], public: Path, dtype: torch.dtype) -> Any:
    cls, options = CLASSES[part], {"config": str(public), "subfolder": part, "torch_dtype": dtype}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # diffusers warns of modules to be kept in float32 where there are none
    try:
        if part in ("unet", "vae"):
            return cls.from_single_file(tensors, **options, local_files_only=True)
        return create_diffusers_clip_model_from_ldm(cls, tensors, **options, local_files_only=True)
    finally:
        logging.set_verbosity(verbosity)
