"""What a checkpoint is: a folder that is complete or not there, verified before a byte of it is believed.

    <run>/checkpoints/step-000050/manifest.json   progress, layout, facts, versions, size and sha256 of every file
                                  engine/...      what the engine wrote: weights and optimizer state, in slices

Another number of ranks, another ZeRO stage, or plain PyTorch can continue from it. It is written under a name that
starts with a dot and renamed when every file is on disk, so a run killed at any moment leaves the earlier checkpoints
as they were.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from smpo_fast.common.errors import CheckpointError
from smpo_fast.common.runtime import World, print0
from smpo_fast.common.storage import as_json, publish_folder, sha256, sync
from smpo_fast.engine.protocol import Engine

FORMAT = 2  # 1 held DeepSpeed's own files
_LIBRARIES = ("smpo_fast", "torch", "deepspeed", "bitsandbytes")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Progress:
    """How far a run is: optimizer steps, pairs seen over all ranks, seconds of training, steps skipped."""

    step: int = 0
    pairs_seen: int = 0
    seconds: float = 0.0
    skipped: int = 0


def checkpoints_dir(run_dir: str | Path) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(run_dir) / "checkpoints"


def list_checkpoints(run_dir: str | Path) -> list[Path]:
    """The run's checkpoint folders, oldest first; unfinished ones are not among them."""
    return sorted(checkpoints_dir(run_dir).glob("step-*"), key=lambda p: (len(p.name), p.name))


def save(
    run_dir: str | Path, engine: Engine, progress: Progress, world: World, facts: Mapping[str, Any], keep: int
) -> Path:
    """Write a checkpoint, then remove all but the last ``keep`` complete ones. Returns its folder.

    Collective; the gradients of an unfinished step are left out, so ``progress`` counts finished steps. ``facts``
    (JSON values) are what must be the same when the run continues. The folder must be on a disk that all ranks
    see. An error on one rank is raised on all. A complete checkpoint of this step is kept as it is: what a step does
    is a function of the settings.
    """
    root, name = checkpoints_dir(run_dir), f"step-{progress.step:06d}"
    final, building = root / name, root / f".saving-{name}"
    if _on_rank_0(world, lambda: _complete(final)):
        return final
    _on_rank_0(world, lambda: _prepare(root, building))
    # all ranks have written before any of them lists the files
    _raise_first(_gather(world, _guarded(lambda: engine.save(building / "engine"))))
    files = _gather(world, _guarded(lambda: _describe_files(building, world)))
    manifest = {
        "format": FORMAT,
        "progress": dataclasses.asdict(progress),
        "layout": engine.layout,
        "facts": dict(facts),
        "versions": _versions(),
        "files": {k: v for part in _raise_first(files) for k, v in part.items()},
    }
    _on_rank_0(world, lambda: _publish(root, building, final, manifest, keep))
    return final


def restore_latest(run_dir: str | Path, engine: Engine, world: World, facts: Mapping[str, Any]) -> Progress | None:
    """Load the newest checkpoint into a fresh ``engine`` and return where it stands; None when there is none.

    Collective. The number of ranks and the ZeRO stage may be others; on the same ones the run continues bit for bit.
    Raises CheckpointError, on every rank, for a checkpoint that is damaged, or was made with other ``facts``, in
    another precision, or with another optimizer; the message names the newest one that would do and how to take it.
    """
    found = _on_rank_0(world, lambda: [str(p) for p in list_checkpoints(run_dir)])
    if not found:
        return None
    newest = Path(found[-1])
    wanted = {"facts": _plain(facts), "layout": engine.layout}
    reasons = _gather(world, _problem(newest, wanted, world))
    if any(reasons):
        reason = next(r for r in reasons if r)
        advice = _on_rank_0(world, lambda: _advice([Path(f) for f in found], wanted))
        raise CheckpointError(f"checkpoint {newest}: {reason}. {advice}")
    engine.load(newest / "engine")
    manifest = _read_manifest(newest)
    if world.rank == 0 and manifest["layout"] != engine.layout:
        there, here = _layout_words(manifest["layout"]), _layout_words(engine.layout)
        print0(f"{newest} was written by {there}; this run is {here}: it continues but for the order of sums")
    return Progress(**manifest["progress"])


# --- writing --------------------------------------------------------------------------------------------------


def _prepare(root: Path, building: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".*-step-*"):
        shutil.rmtree(leftover)
    (building / "engine").mkdir(parents=True)


def _publish(root: Path, building: Path, final: Path, manifest: dict[str, Any], keep: int) -> None:
    path = building / "manifest.json"
    path.write_text(json.dumps(manifest, indent=1, sort_keys=True))
    sync(path)
    if final.exists():  # an incomplete one: it is in the way
        _remove(final)
    publish_folder(building, final)
    _prune(root, keep)


def _prune(root: Path, keep: int) -> None:
    folders = list_checkpoints(root.parent)
    good = [folder for folder in folders if _complete(folder)]
    for folder in folders[: folders.index(good[-keep:][0])]:
        _remove(folder)


def _remove(folder: Path) -> None:
    """Out of the listing at once, so that no half-removed checkpoint is ever found."""
    gone = folder.with_name(f".removing-{folder.name}")
    os.rename(folder, gone)
    shutil.rmtree(gone)


def _describe_files(building: Path, world: World) -> dict[str, dict[str, Any]]:
    """Path -> size in bytes and sha256, for this rank's share of the files, brought to disk."""
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


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Raises CheckpointError, without the folder's name, when it cannot be read or is of another format."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"damaged: manifest.json cannot be read ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise CheckpointError(f"of another program version: format {found}, this one reads {FORMAT}")
    return manifest


def _complete(folder: Path) -> bool:
    """Whether the manifest can be read and all files have their sizes; contents are not looked at."""
    try:
        files = _read_manifest(folder)["files"]
        return all((folder / name).stat().st_size == entry["bytes"] for name, entry in files.items())
    except (OSError, KeyError, CheckpointError):
        return False


def _problem(folder: Path, wanted: Mapping[str, Any], world: World) -> str | None:
    """Why ``folder`` cannot be used, as far as this rank's share of its files shows; None when it can."""
    try:
        manifest = _read_manifest(folder)
        return (
            _layout_problem(manifest["layout"], wanted["layout"])
            or _facts_problem(manifest["facts"], wanted["facts"])
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
        f"written by {_layout_words(found)}, and this run is {_layout_words(wanted)}: take its precision, master "
        "weights and optimizer, or give another run.dir"
    )


def _layout_words(layout: Mapping[str, Any]) -> str:
    zero = f" with ZeRO stage {layout['zero_stage']}" if layout["engine"] == "deepspeed" else " without DeepSpeed"
    ranks = "1 process" if layout["world_size"] == 1 else f"{layout['world_size']} processes"
    masters = "" if layout["master"] == "fp32" else " without master weights"
    return f"{ranks}{zero}, precision {layout['precision']}{masters}, optimizer {layout['optimizer']}"


def _facts_problem(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    there, here = dict(_flat(found)), dict(_flat(wanted))
    different = [key for key in sorted({*there, *here}) if there.get(key) != here.get(key)]
    if not different:
        return None
    words = "; ".join(f"{key} is {there.get(key)!r} there and {here.get(key)!r} here" for key in different)
    return f"made with other settings: {words}: give them their values back, or give another run.dir"


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
    """What to do about the newest of ``folders``."""
    for count, folder in enumerate(reversed(folders[:-1]), start=1):
        if _problem(folder, wanted, World()) is None:
            newer = shlex.join(str(f) for f in folders[-count:])
            return f"The last good checkpoint is {folder}: to continue from it, remove what is newer: rm -r {newer}"
    everything = shlex.quote(str(folders[0].parent))
    return f"No earlier checkpoint can be used: to start the run from its beginning: rm -r {everything}"


def _plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """``facts`` as they come back from JSON (tuples are lists there)."""
    plain: dict[str, Any] = as_json(dict(facts))
    return plain


# --- several ranks --------------------------------------------------------------------------------------------


def _gather(world: World, value: _T) -> list[_T]:
    """Every rank's value, in rank order; also a barrier."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    torch.distributed.all_gather_object(values, value)
    return values


def _guarded(action: Callable[[], _T]) -> _T | Exception:
    """An error becomes a value, so that it reaches the other ranks instead of leaving them waiting."""
    try:
        return action()
    except Exception as error:
        return error


def _raise_first(values: list[_T | Exception]) -> list[_T]:
    for value in values:
        if isinstance(value, Exception):
            raise value
    return [v for v in values if not isinstance(v, Exception)]


def _on_rank_0(world: World, action: Callable[[], _T]) -> _T:
    """What ``action`` returns on rank 0, on every rank; its error is raised on every rank."""
    value = _guarded(action) if world.rank == 0 else None
    first: Any = _gather(world, value)[0]
    return _raise_first([first])[0]
