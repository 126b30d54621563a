"""Verifying what training writes itself: stored trajectories, and a run's settings, environment and log."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from smpo_fast.common.errors import DataError
from smpo_fast.common.verification import (
    BAD,
    Finding,
    bad,
    caught,
    check_files,
    check_leftovers_of,
    check_unlisted,
    good,
    note,
    read_description,
)
from smpo_fast.config import loading
from smpo_fast.training.run_folder import FINISHED, OWN_FILES
from smpo_fast.training.run_lock import LOCK_FILE
from smpo_fast.training.run_log import log_lines, parse_row
from smpo_fast.training.trajectories import INFO, checksum

_STEP_FILE = re.compile(r"step-(\d+)\.(\d+)-of-(\d+)\.safetensors")
_STORE_ADVICE = "remove it, and the next run computes it again"
_MISSING_ADVICE = "the next run computes the step again"
_RUN_ADVICE = "put back a good copy; the weights do not depend on it"
_DTYPES = {"tau": torch.float16, "errors": torch.float32}


def is_store(folder: Path) -> bool:
    """Whether a folder holds stored trajectories, even if it has lost a file."""
    return (folder / INFO).is_file() or any(map(_STEP_FILE.fullmatch, (f.name for f in folder.glob("step-*"))))


def verify_store(folder: Path) -> Iterator[Finding]:
    """Verify stored trajectories: facts, the checksum of every tensor, finite numbers, files of all ranks, no gaps.

    A store does not say how many steps it should have, so that nothing is missed after its last one.
    """
    yield from read_description(folder / INFO, f"remove {folder}, and the next run computes everything again")[1]
    ranks: dict[int, dict[int, set[int]]] = {}
    for file in sorted(folder.glob("step-*")):
        if name := _STEP_FILE.fullmatch(file.name):
            step, rank, size = map(int, name.groups())
            ranks.setdefault(step, {}).setdefault(size, set()).add(rank)
            yield _check_step_file(file)
    yield from (bad(folder / name, f"is missing: {_MISSING_ADVICE}") for name in _missing(ranks))
    yield good(folder, f"{len(ranks)} steps are stored" + (f", the last is {max(ranks)}" if ranks else ""))
    known = {INFO, *(file.name for file in folder.glob("step-*") if _STEP_FILE.fullmatch(file.name))}
    yield from check_unlisted(folder, known, "no run reads it; remove it if it is not yours")
    yield from check_leftovers_of(folder)


def _missing(ranks: Mapping[int, Mapping[int, set[int]]]) -> Iterator[str]:
    """Files without which a step, up to the last one, is not whole. ranks: step -> number of ranks -> those found."""
    for step in range(max(ranks, default=-1) + 1):
        sizes = ranks.get(step, {})
        if any(len(found) == size for size, found in sizes.items()):
            continue
        for size, found in sizes.items():
            yield from (f"step-{step:06d}.{rank}-of-{size}.safetensors" for rank in range(size) if rank not in found)
        if not sizes:
            yield f"step-{step:06d}.0-of-*.safetensors"


def _check_step_file(file: Path) -> Finding:
    """Checksums, types and numbers of a file, and that each pair has both of its tensors."""
    try:
        with safe_open(file, "pt") as stored:
            names, sums = set(stored.keys()), stored.metadata() or {}
            problem = _names_problem(names, set(sums)) or next(
                (p for name in sorted(names) if (p := _tensor_problem(name, stored.get_tensor(name), sums))), ""
            )
    except Exception as error:  # safetensors raises its own errors and the system's
        return bad(file, f"cannot be read ({error}): {_STORE_ADVICE}")
    if problem:
        return bad(file, f"{problem}: {_STORE_ADVICE}")
    if not sums:
        return note(file, f"{len(names)} tensors, all finite; an earlier version wrote them without checksums")
    return good(file, f"{len(names)} tensors with their checksums, all finite")


def _names_problem(names: set[str], sums: set[str]) -> str:
    positions = {name.partition(".")[0] for name in names}
    expected = {f"{position}.{what}" for position in positions for what in _DTYPES}
    if names != expected or not all(position.isdigit() for position in positions):
        return f"a pair has not both of its tensors: {', '.join(sorted(names ^ expected)[:3])}"
    if sums and sums != names:
        return f"tensors and checksums differ: {', '.join(sorted(sums ^ names)[:3])}"
    return ""


def _tensor_problem(name: str, tensor: torch.Tensor, sums: dict[str, str]) -> str:
    if tensor.dtype != _DTYPES[name.partition(".")[2]]:
        return f"{name} has the type {tensor.dtype}"
    if name in sums and sums[name] != f"{checksum(tensor):08x}":
        return f"the checksum of {name} differs"
    return "" if tensor.isfinite().all() else f"{name} has NaN or infinite values"


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a training run, even one that has lost a file."""
    return sum((folder / name).exists() for name in (*OWN_FILES[:4], FINISHED, "checkpoints", "export")) >= 2


def verify_own_files(folder: Path) -> Iterator[Finding]:
    """Verify what a run says about itself: hashes if it has finished; readable settings and a log of finite numbers."""
    damaged: set[Path] = set()
    if (folder / FINISHED).is_file():
        values, found = read_description(folder / FINISHED, "start the run again: it writes it anew", "files")
        for finding in (*found, *check_files(folder, values.get("files", {}), _RUN_ADVICE)):
            damaged |= {finding.place} if finding.grade == BAD else set()
            yield finding
    else:
        yield note(folder / FINISHED, "is missing: the run has not finished, or an earlier version made it")
    config, log = folder / "config.toml", folder / "metrics.jsonl"
    if config not in damaged:
        yield from caught(config, lambda: _check_settings(config))
    for file in (folder / "environment.json", folder / "ds_config.json"):
        if file.is_file() and file not in damaged:
            yield _check_json(file)
    if log not in damaged and log.is_file():
        yield _check_log(log)
    if (folder / LOCK_FILE).is_file():
        yield note(folder / LOCK_FILE, "a training is running here, or was killed: the next one takes its place")


def _check_settings(file: Path) -> Iterator[Finding]:
    if not file.is_file():
        raise DataError(f"is missing: {_RUN_ADVICE}")
    loading.load(file)
    yield good(file, "the settings can be read")


def _check_json(file: Path) -> Finding:
    try:
        json.loads(file.read_text())
    except ValueError as error:
        return bad(file, f"cannot be read ({error}): {_RUN_ADVICE}")
    return good(file, "can be read")


def _check_log(file: Path) -> Finding:
    rows = [parse_row(line) for line in log_lines(file)]
    if None in rows:
        return bad(file, f"line {rows.index(None) + 1} is no row of the log: the next start keeps and ignores it")
    steps = [row["step"] for row in rows if row is not None]
    if steps != list(range(1, len(steps) + 1)):
        return bad(file, f"its steps are not 1 to {len(steps)}, one row each: {_RUN_ADVICE}")
    numbers = [
        (row["step"], name) for row in rows if row is not None for name, value in row.items()
        if isinstance(value, float) and not math.isfinite(value) and row.get("applied", True)
    ]  # fmt: skip
    if numbers:
        return bad(file, f"step {numbers[0][0]}: {numbers[0][1]} is not finite, in a step that was applied")
    return good(file, f"{len(steps)} steps, every number of an applied step finite")
