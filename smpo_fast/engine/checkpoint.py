"""Checkpoints: a folder is complete or absent, and verified before anything in it is used.

    <run>/checkpoints/step-000050/manifest.json   progress, layout, facts, versions, size and sha256 of every file
                                  engine/...      weights and optimizer state, in parameter slices

Another number of ranks, another ZeRO stage, or plain PyTorch can resume from it. It is written under a name that
starts with a dot and renamed once every file is on disk, so a run that is killed at any moment leaves the earlier
checkpoints intact.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from smpo_fast.common.errors import CheckpointError
from smpo_fast.common.runtime import World, print0
from smpo_fast.common.storage import as_json, json_hash, publish_folder, sha256, sync
from smpo_fast.engine.collectives import gather, on_every_rank, on_rank_0
from smpo_fast.engine.ema import AVERAGE
from smpo_fast.engine.protocol import Engine
from smpo_fast.engine.shards import ParameterSlice, ShardReader

MANIFEST = "manifest.json"
FORMAT = 2  # 1 consisted of DeepSpeed's own files
_LIBRARIES = ("smpo_fast", "torch", "deepspeed", "bitsandbytes")


@dataclass(frozen=True)
class Progress:
    """How far a run has come: optimizer steps, pairs seen over all ranks, seconds of training, skipped steps."""

    step: int = 0
    pairs_seen: int = 0
    seconds: float = 0.0
    skipped: int = 0


def checkpoints_dir(run_dir: str | Path) -> Path:
    """The folder of a run's checkpoints."""
    return Path(run_dir) / "checkpoints"


def list_checkpoints(run_dir: str | Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first, without unfinished ones."""
    return sorted(checkpoints_dir(run_dir).glob("step-*"), key=lambda p: (len(p.name), p.name))


def save(
    run_dir: str | Path, engine: Engine, progress: Progress, world: World, facts: Mapping[str, Any], keep: int
) -> Path:
    """Write a checkpoint, then remove all but the last ``keep`` complete ones. Returns its folder.

    Collective. Gradients of an unfinished step are not saved, so ``progress`` counts finished steps. ``facts`` (JSON
    values) must be the same when the run resumes. The folder must be on a disk that all ranks see. An error on one
    rank is raised on all. A complete checkpoint of this step is not written again: the result of a step is a function
    of the settings.
    """
    root, name = checkpoints_dir(run_dir), f"step-{progress.step:06d}"
    final, building = root / name, root / f".saving-{name}"
    if on_rank_0(world, lambda: _complete(final)):
        tidy(run_dir, world, keep)
        return final
    on_rank_0(world, lambda: _prepare(root, building))
    on_every_rank(world, lambda: engine.save(building / "engine"))  # all have written before any lists the files
    files = on_every_rank(world, lambda: _describe_files(building, world))
    manifest = {
        "format": FORMAT,
        "progress": dataclasses.asdict(progress),
        "layout": engine.layout,
        "facts": dict(facts),
        "versions": _versions(),
        "files": {k: v for described in files for k, v in described.items()},
    }
    on_rank_0(world, lambda: _publish(root, building, final, manifest, keep))
    return final


def newest(run_dir: str | Path) -> tuple[Path, Progress] | None:
    """The newest checkpoint and its progress, from its manifest alone; None where no checkpoint can be read."""
    for folder in list_checkpoints(run_dir)[-1:]:
        with contextlib.suppress(CheckpointError, KeyError, TypeError):
            return folder, Progress(**read_manifest(folder)["progress"])
    return None


def inspect(
    run_dir: str | Path, facts: Mapping[str, Any] | None, defaults: Mapping[str, Any]
) -> tuple[Path, Progress] | None:
    """The newest checkpoint and its progress, after the checks of ``restore_latest`` that need no engine.

    facts: None if they are not known, which leaves them unchecked. Raises CheckpointError like ``restore_latest``.
    """
    found = list_checkpoints(run_dir)
    if not found:
        return None
    wanted = {"facts": None if facts is None else as_json(dict(facts)), "defaults": as_json(dict(defaults))}
    if reason := _problem(found[-1], wanted, World()):
        raise CheckpointError(f"checkpoint {found[-1]}: {reason}. {_advice(found, wanted)}")
    return found[-1], Progress(**read_manifest(found[-1])["progress"])


def restore_latest(
    run_dir: str | Path,
    engine: Engine,
    world: World,
    facts: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
) -> Progress | None:
    """Load the newest checkpoint into a fresh ``engine`` and return its progress; None where no checkpoint exists.

    Collective. The number of ranks and the ZeRO stage may differ; with the same ones the run continues bit for bit.
    defaults: values of those facts that a checkpoint of an earlier version lacks.
    Raises CheckpointError, on every rank, for a checkpoint that is damaged, or was made with other ``facts``, in
    another precision, or with another optimizer; the message names the newest usable one and how to resume from it.
    """
    found = on_rank_0(world, lambda: [str(p) for p in list_checkpoints(run_dir)])
    if not found:
        return None
    newest = Path(found[-1])
    wanted = {"facts": as_json(dict(facts)), "defaults": as_json(dict(defaults or {})), "layout": engine.layout}
    reasons = gather(world, _problem(newest, wanted, world))
    if any(reasons):
        reason = next(r for r in reasons if r)
        advice = on_rank_0(world, lambda: _advice([Path(f) for f in found], wanted))
        raise CheckpointError(f"checkpoint {newest}: {reason}. {advice}")
    manifest = read_manifest(newest)
    engine.load([newest / name for name in sorted(manifest["files"])])
    if world.rank == 0 and manifest["layout"] != engine.layout:
        there, here = _layout_text(manifest["layout"]), _layout_text(engine.layout)
        print0(f"{newest} was written by {there}; this run has {here}: sums may be rounded differently from here on")
    return Progress(**manifest["progress"])


def read_weights(
    folder: Path, shapes: Mapping[str, Sequence[int]], *, averaged: bool = False
) -> tuple[Progress, dict[str, Any], dict[str, Tensor]]:
    """A checkpoint's progress, facts, and trained weights in float32, whatever engine and number of ranks wrote it.

    shapes: of the weights that are trained, by name; averaged: their moving average instead. No engine is needed.
    Raises CheckpointError for a checkpoint that is damaged, or has other weights or no average.
    """
    if reason := _problem(folder, {"facts": None, "defaults": {}}, World()):
        raise CheckpointError(f"checkpoint {folder}: {reason}")
    manifest = read_manifest(folder)
    saved, kind = ShardReader([folder / name for name in manifest["files"]]), AVERAGE if averaged else "weight"
    if averaged and not any(saved.slices(name, AVERAGE) for name in shapes):
        raise CheckpointError(
            f"checkpoint {folder} has no average of the weights: it was written without optim.ema; take its raw weights"
        )
    weights = {
        name: saved.elements(ParameterSlice(name, 0, math.prod(shape)), kind).float().view(*shape)
        for name, shape in shapes.items()
    }
    return Progress(**manifest["progress"]), manifest["facts"], weights


# --- writing --------------------------------------------------------------------------------------------------


def _prepare(root: Path, building: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    _remove_unfinished(root)
    (building / "engine").mkdir(parents=True)


def _publish(root: Path, building: Path, final: Path, manifest: dict[str, Any], keep: int) -> None:
    path = building / MANIFEST
    path.write_text(json.dumps(manifest | {"sha256": json_hash(manifest)}, indent=1, sort_keys=True))
    sync(path)
    if final.exists():  # it is incomplete
        _remove(final)
    publish_folder(building, final)
    _prune(root, keep)


def tidy(run_dir: str | Path, world: World, keep: int) -> None:
    """Finish what a kill during ``save`` left undone: remove unfinished checkpoints, and all but the last ``keep``.

    Collective.
    """
    root = checkpoints_dir(run_dir)

    def clean() -> None:
        _remove_unfinished(root)
        _prune(root, keep)

    on_rank_0(world, clean)


def _remove_unfinished(root: Path) -> None:
    for leftover in root.glob(".*-step-*"):
        shutil.rmtree(leftover)


def _prune(root: Path, keep: int) -> None:
    folders = list_checkpoints(root.parent)
    good = [folder for folder in folders if _complete(folder)]
    for folder in folders[: folders.index(good[-keep:][0])] if good else ():
        _remove(folder)


def _remove(folder: Path) -> None:
    """Rename first, so that a half-removed checkpoint is never listed."""
    gone = folder.with_name(f".removing-{folder.name}")
    os.rename(folder, gone)
    shutil.rmtree(gone)


def _describe_files(building: Path, world: World) -> dict[str, dict[str, Any]]:
    """Path -> size in bytes and sha256, for this rank's share of the files, which are synced to disk."""
    files = sorted(p for p in building.rglob("*") if p.is_file())
    described = {}
    for path in files[world.rank :: world.size]:
        sync(path)
        described[path.relative_to(building).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    return described


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for library in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[library] = importlib.metadata.version(library)
    return versions


# --- reading --------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, with its own hash where one was written.

    Raises CheckpointError, without the name of the folder, when it cannot be read or has another format."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"damaged: manifest.json cannot be read ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise CheckpointError(f"written by another version of the program: format {found}, this one reads {FORMAT}")
    hashed = {key: value for key, value in manifest.items() if key != "sha256"}
    if manifest.get("sha256", json_hash(hashed)) != json_hash(hashed):  # earlier versions wrote none
        raise CheckpointError("damaged: manifest.json has changed (sha256 differs)")
    return manifest


def _complete(folder: Path) -> bool:
    """Whether the manifest can be read and all files have the right size; contents are not verified."""
    try:
        files = read_manifest(folder)["files"]
        return all((folder / name).stat().st_size == entry["bytes"] for name, entry in files.items())
    except (OSError, KeyError, CheckpointError):
        return False


def _problem(folder: Path, wanted: Mapping[str, Any], world: World) -> str | None:
    """Why ``folder`` cannot be used, judging by this rank's share of its files; None when it can."""
    try:
        manifest = read_manifest(folder)
        return (
            _layout_problem(manifest["layout"], wanted.get("layout", manifest["layout"]))
            or _facts_problem(manifest["facts"], wanted["facts"], wanted["defaults"])
            or _damage(folder, manifest["files"], world)
        )
    except CheckpointError as error:
        return str(error)
    except (OSError, KeyError, TypeError, AttributeError) as error:
        return f"damaged: {type(error).__name__}: {error}"


def _layout_problem(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    if all(found[key] == wanted[key] for key in ("precision", "master", "optimizer")):
        return None
    return (
        f"written by {_layout_text(found)}, and this run has {_layout_text(wanted)}: use its precision, master "
        "weights and optimizer, or set another run.dir"
    )


def _layout_text(layout: Mapping[str, Any]) -> str:
    zero = f" with ZeRO stage {layout['zero_stage']}" if layout["engine"] == "deepspeed" else " without DeepSpeed"
    ranks = "1 process" if layout["world_size"] == 1 else f"{layout['world_size']} processes"
    masters = "" if layout["master"] == "fp32" else " without master weights"
    return f"{ranks}{zero}, precision {layout['precision']}{masters}, optimizer {layout['optimizer']}"


def different_facts(
    found: Mapping[str, Any], wanted: Mapping[str, Any], defaults: Mapping[str, Any]
) -> list[tuple[str, Any, Any]]:
    """Dotted key, value found and value wanted of the facts that differ; a fact not found has its default."""
    recorded, here = dict(_flat(found)), dict(_flat(wanted))
    there = dict(_flat(defaults)) | recorded
    keys = sorted(recorded.keys() | here.keys())
    return [(key, there.get(key), here.get(key)) for key in keys if there.get(key) != here.get(key)]


def _facts_problem(
    found: Mapping[str, Any], wanted: Mapping[str, Any] | None, defaults: Mapping[str, Any]
) -> str | None:
    different = [] if wanted is None else different_facts(found, wanted, defaults)
    if not different:
        return None
    values = "; ".join(f"{key} was {there!r} and is {here!r} now" for key, there, here in different)
    return f"made with other settings: {values}: restore these settings, or set another run.dir"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _damage(folder: Path, files: Mapping[str, Any], world: World) -> str | None:
    for name in sorted(files)[world.rank :: world.size]:
        path, entry = folder / name, files[name]
        if not path.is_file():
            return f"damaged: {name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"damaged: {name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
        if sha256(path) != entry["sha256"]:
            return f"damaged: the contents of {name} have changed (sha256 differs)"
    return None


def _advice(folders: list[Path], wanted: Mapping[str, Any]) -> str:
    """What the user can do when the newest of ``folders`` cannot be used."""
    for count, folder in enumerate(reversed(folders[:-1]), start=1):
        if _problem(folder, wanted, World()) is None:
            newer = shlex.join(str(f) for f in folders[-count:])
            return f"The last usable checkpoint is {folder}: to resume from it, remove the newer ones: rm -r {newer}"
    everything = shlex.quote(str(folders[0].parent))
    return f"No earlier checkpoint can be used: to start the run over: rm -r {everything}"
