"""Verifying exports: a pipeline (``export/``, ``merged/``, or any diffusers folder), and LoRA adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from smpo_fast.common.verification import (
    BAD,
    Finding,
    bad,
    caught,
    check_file,
    check_leftovers_of,
    check_tensors,
    check_unlisted,
    good,
    note,
    read_description,
)
from smpo_fast.config.schema import Model
from smpo_fast.models.load import TEXT_ENCODERS, load_network, load_tokenizer
from smpo_fast.models.locate import ModelSource, find
from smpo_fast.models.pipeline_folder import EXPORT_INFO, LORA_FILE, OPTIONAL_PARTS, PARTS, TEXT_PARTS

_ADVICE = "export again (start the finished run again, or smpo merge), or put back a good copy"
_UNLISTED = "a loader might read it; remove it if it is not yours"
_INDEX = "model_index.json"
_LOADED = {".json", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".py"}  # suffixes of files that loaders look for


def is_export(folder: Path) -> bool:
    """Whether a folder is a pipeline or has LoRA adapters, even one that has lost a file."""
    marks = (EXPORT_INFO, LORA_FILE, _INDEX, "unet/config.json")
    return any((folder / mark).is_file() for mark in marks)


def is_exports(folder: Path) -> bool:
    """Whether a folder is what ``smpo export`` makes of a checkpoint: exports, folders of them, and nothing else."""
    return (
        folder.is_dir() and any(map(is_export, folder.iterdir())) and all(map(_is_export_or_hidden, folder.iterdir()))
    )


def _is_export_or_hidden(path: Path) -> bool:
    return is_export(path) or path.name.startswith(".") or is_exports(path)


def verify_exports(folder: Path) -> Iterator[Finding]:
    """Verify all exports in a folder."""
    for path in sorted(folder.iterdir()):
        if is_export(path):
            yield from verify_export(path)
        elif is_exports(path):
            yield from verify_exports(path)
    yield from check_leftovers_of(folder)


def verify_export(folder: Path) -> Iterator[Finding]:
    """Verify an export: hashes of all files, finite numbers, every network complete, configuration readable.

    A pipeline without export.json, of an earlier version or another program, is verified without hashes.
    """
    files: Mapping[str, Mapping[str, Any]] = {}
    if (folder / EXPORT_INFO).is_file():
        values, found = read_description(folder / EXPORT_INFO, _ADVICE)
        yield from found
        if isinstance(values.get("files"), dict):
            files = values["files"]
        elif values:  # otherwise it could not be read, which has been said
            yield bad(folder / EXPORT_INFO, f"lists no files: {_ADVICE}")
    else:
        yield note(folder / EXPORT_INFO, "is missing: an earlier version or another program made this, without hashes")
    listed = set(files) or _files_of_pipeline(folder)
    damaged = False
    for name in sorted(listed):
        finding = _check(folder, name, files)
        damaged |= finding.grade == BAD
        yield finding
    if (folder / _INDEX).is_file() and not damaged:
        yield from caught(folder, lambda: _check_networks(folder))
    yield from _check_others(folder, listed)
    yield from check_leftovers_of(folder)


def _files_of_pipeline(folder: Path) -> set[str]:
    parts = [folder / part for part in (*PARTS, *OPTIONAL_PARTS)]
    found = [file for part in parts if part.is_dir() for file in part.rglob("*") if file.is_file()]
    names = {file.relative_to(folder).as_posix() for file in found}
    return names | {name for name in (_INDEX, LORA_FILE) if (folder / name).is_file()}


def _check(folder: Path, name: str, files: Mapping[str, Mapping[str, Any]]) -> Finding:
    """Hash and numbers of one file."""
    file = folder / name
    finding = check_file(file, files[name], _ADVICE) if name in files else note(file, "no hash was recorded")
    if finding.grade == BAD or file.suffix != ".safetensors":
        return finding
    numbers = check_tensors(file, _ADVICE)
    return numbers if numbers.grade == BAD else Finding(finding.grade, file, f"{finding.text}; {numbers.text}")


def _check_networks(folder: Path) -> Iterator[Finding]:
    """Every network has all of its tensors: each is loaded as training loads it, one at a time."""
    source = find(Model(path=str(folder)))
    yield good(folder / _INDEX, f"a pipeline of the kind {source.kind}, its configuration is readable")
    for part, cls in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        yield from caught(folder / part, lambda part=part, cls=cls: _check_network(source, part, cls))  # type: ignore[misc]
    for (tokenizer, part), cls in zip(TEXT_PARTS[source.kind], TEXT_ENCODERS, strict=False):
        yield from caught(
            folder / part,
            lambda part=part, cls=cls, tokenizer=tokenizer: _check_network(source, part, cls, tokenizer),  # type: ignore[misc]
        )


def _check_network(source: ModelSource, part: str, cls: Any, tokenizer: str = "") -> Iterator[Finding]:
    network = load_network(cls, source.folder / part, None, torch.float16)
    yield good(source.folder / part, f"a complete {cls.__name__}")
    if tokenizer:
        load_tokenizer(source.folder / tokenizer, network)
        yield good(source.folder / tokenizer, "its tokenizer can be used")


def _check_others(folder: Path, listed: set[str]) -> Iterator[Finding]:
    """Files that no export wrote. Those that a loader would not read, such as a README, are kept by every export."""
    parts = {*PARTS, *OPTIONAL_PARTS}
    for finding in check_unlisted(folder, {*listed, EXPORT_INFO}, _UNLISTED):
        inside = finding.place.relative_to(folder).parts
        harmless = inside[0] not in parts and finding.place.suffix not in _LOADED
        yield note(finding.place, "no export wrote it; kept") if finding.grade == BAD and harmless else finding
