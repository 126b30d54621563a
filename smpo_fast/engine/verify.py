"""Verifying checkpoints: a folder ``step-N``, or all those of a run."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from safetensors import safe_open

from smpo_fast.common.errors import CheckpointError
from smpo_fast.common.verification import (
    GOOD,
    Finding,
    bad,
    check_files,
    check_tensors,
    check_unlisted,
    good,
    leftover_advice,
    note,
)
from smpo_fast.engine.checkpoint import MANIFEST, read_manifest
from smpo_fast.engine.ema import AVERAGE
from smpo_fast.engine.shards import parse_key

_ADVICE = "put back a good copy, or remove this checkpoint and resume from an earlier one"
_UNLISTED = "nothing reads it; remove it if it is not yours"


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is one checkpoint, even one that has lost a file."""
    return re.fullmatch(r"step-\d+", folder.absolute().name) is not None or (
        (folder / MANIFEST).is_file() and (folder / "engine").is_dir()
    )


def is_checkpoints_folder(folder: Path) -> bool:
    """Whether a folder holds the checkpoints of a run."""
    return any(is_checkpoint(path) for path in folder.glob("step-*"))


def verify_checkpoints(folder: Path) -> Iterator[Finding]:
    """Verify every checkpoint of a folder, and name what else is in it."""
    for path in sorted(folder.iterdir(), key=lambda p: (len(p.name), p.name)):
        if path.is_dir() and is_checkpoint(path):
            yield from verify_checkpoint(path)
        elif leftover := leftover_advice(path.name):
            yield note(path, leftover)
        else:
            yield bad(path, f"is no checkpoint: {_UNLISTED}")


def verify_checkpoint(folder: Path) -> Iterator[Finding]:
    """Verify one checkpoint: manifest, size and hash of every file, finite numbers, and parameters without gaps."""
    try:
        manifest = read_manifest(folder)
        files, step = manifest["files"], manifest["progress"]["step"]
    except (CheckpointError, KeyError, TypeError) as error:
        yield bad(folder / MANIFEST, f"{error}: {_ADVICE}")
        return
    yield from _check_manifest(folder, manifest, step)
    whole = []
    for finding in check_files(folder, files, _ADVICE):
        yield finding
        if finding.grade == GOOD and finding.place.suffix == ".safetensors":
            whole.append(finding.place)
    for file in whole:
        yield check_tensors(file, _ADVICE)
    if len(whole) == len(files):
        yield _check_slices(folder, whole)
    yield from check_unlisted(folder, {*files, MANIFEST}, _UNLISTED)


def _check_manifest(folder: Path, manifest: Mapping[str, Any], step: int) -> Iterator[Finding]:
    name = folder.absolute().name
    if name.startswith("step-") and name != f"step-{step:06d}":
        yield bad(folder, f"its manifest is of step {step}: rename the folder to step-{step:06d}")
    elif manifest.get("sha256") is None:
        yield note(folder / MANIFEST, f"of step {step}; an earlier version wrote it without a hash of its own values")
    else:
        yield good(folder / MANIFEST, f"of step {step}, and its values are as they were written")


def _check_slices(folder: Path, files: list[Path]) -> Finding:
    """The slices of every parameter, and of its average, must follow each other, from its first element on."""
    found, averages = defaultdict(list), defaultdict(list)
    for file in files:
        with safe_open(file, "pt") as stored:
            for param_slice, kind in map(parse_key, stored.keys()):
                if kind in ("weight", "buffer"):
                    found[param_slice.name].append(param_slice)
                elif kind == AVERAGE:
                    averages[param_slice.name].append(param_slice)
    for name, slices in (*found.items(), *averages.items()):
        slices.sort(key=lambda s: s.offset)
        if slices[0].offset or any(a.end != b.offset for a, b in pairwise(slices)):
            return bad(folder, f"{name}: its slices leave a gap or overlap: {_ADVICE}")
    numbers = sum(s.numel for slices in found.values() for s in slices)
    averaged = f", {len(averages)} of them with their averages" if averages else ""
    return good(folder, f"{len(found)} parameters and buffers of {numbers} numbers{averaged}, without gaps")
