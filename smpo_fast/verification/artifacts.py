"""The artefacts that ``smpo verify`` knows: how each is recognised, and which function verifies it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from smpo_fast.common.errors import DataError, UserError
from smpo_fast.common.verification import Finding, leftover_advice, note
from smpo_fast.config import loading
from smpo_fast.config.schema import Config
from smpo_fast.data.cache.verify import is_cache, verify_cache
from smpo_fast.data.pairs.verify import is_table, verify_table
from smpo_fast.data.rewards.verify import is_score_table, verify_scores
from smpo_fast.engine.verify import is_checkpoint, is_checkpoints_folder, verify_checkpoint, verify_checkpoints
from smpo_fast.evaluation.verify import is_evaluation, verify_evaluation
from smpo_fast.models.base_facts import CARD
from smpo_fast.models.verify import is_export, is_exports, verify_export, verify_exports
from smpo_fast.publishing.web_report import REPORT as WEB_REPORT
from smpo_fast.training.run_folder import FINISHED, OWN_FILES
from smpo_fast.training.run_lock import LOCK_FILE
from smpo_fast.training.verify import is_run, is_store, verify_own_files, verify_store


@dataclass(frozen=True)
class Request:
    """How to verify. settings: those that were given, or None; device: where --deep computes."""

    settings: Config | None
    device: torch.device
    deep: bool


class Artifact(NamedTuple):
    """A kind of thing that can be verified."""

    name: str
    recognises: Callable[[Path], bool]
    verify: Callable[[Path, Request], Iterator[Finding]]


def recognise(path: Path) -> Artifact:
    """What lies at a path. Raises DataError, which lists what can be verified, for anything else."""
    found = _recognise(path)
    if found is None:
        names = ", ".join(artifact.name for artifact in ARTIFACTS)
        there = "is nothing that can be verified" if path.exists() else "does not exist"
        raise DataError(f"{path} {there}; give the folder of one of these: {names}")
    return found


def _recognise(path: Path) -> Artifact | None:
    return next((a for a in ARTIFACTS if path.exists() and a.recognises(path)), None)


def _verify_run(folder: Path, request: Request) -> Iterator[Finding]:
    """The run's own files, then every artefact in its folder; with --deep by its own settings, if none are given."""
    yield from verify_own_files(folder)
    if request.deep and request.settings is None:
        try:
            request = replace(request, settings=loading.load(folder / "config.toml"))
        except UserError as error:
            yield note(folder, f"--deep is left out: without the run's own settings, give others ({error})")
            request = replace(request, deep=False)
    for path in sorted(folder.iterdir()):
        if path.name in (*OWN_FILES, FINISHED, LOCK_FILE):
            continue
        artifact = _recognise(path)
        if artifact is not None:
            yield from artifact.verify(path, request)
        elif path.name in ("tensorboard", CARD, WEB_REPORT):
            yield note(path, "not checked: nothing is read from it")
        else:
            yield note(path, leftover_advice(path.name) or "not checked: no run writes it")


# In the order in which they are tried: a run folder holds some of the others.
ARTIFACTS = (
    Artifact("a cache (smpo prepare)", is_cache, lambda p, r: verify_cache(p, r.settings, r.device, deep=r.deep)),
    Artifact("scores (smpo score)", is_score_table, lambda p, r: verify_scores(p, r.settings, r.device, deep=r.deep)),
    Artifact("stored trajectories (inversion.store)", is_store, lambda p, r: verify_store(p)),
    Artifact("an evaluation", is_evaluation, lambda p, r: verify_evaluation(p)),
    Artifact("a checkpoint", is_checkpoint, lambda p, r: verify_checkpoint(p)),
    Artifact("the checkpoints of a run", is_checkpoints_folder, lambda p, r: verify_checkpoints(p)),
    Artifact("a run", is_run, _verify_run),
    Artifact("an exported pipeline or adapters", is_export, lambda p, r: verify_export(p)),
    Artifact("the exports of a checkpoint (smpo export)", is_exports, lambda p, r: verify_exports(p)),
    Artifact("a pair table (smpo import, or parquet files)", is_table, lambda p, r: verify_table(p, deep=r.deep)),
)
