"""Program ``smpo verify``: verify what lies at a path, print a line for each thing checked, and a total."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from smpo_fast.common import programs
from smpo_fast.common.console import printable
from smpo_fast.common.verification import BAD, NOTE
from smpo_fast.config.schema import Config
from smpo_fast.verification.artifacts import Request, recognise


def run(path: Path, settings: Config | None, device: torch.device, *, deep: bool) -> int:
    """Verify what lies at ``path``; returns the exit status: DONE, or UNMET if something is not as it should be.

    settings: with which artefacts that depend on settings are compared; None where none were given.  deep: recompute
    samples, on ``device``.  Raises DataError for a path that is nothing of this program's.
    """
    artifact = recognise(path)
    print(f"{path}: {artifact.name}")
    grades = Counter[str]()
    for finding in artifact.verify(path, Request(settings, device, deep)):
        grades[finding.grade] += 1
        print(printable(f"{finding.grade:<5}{finding.place}: {finding.text}"), flush=True)
    notes = f", {grades[NOTE]} notes" if grades[NOTE] else ""
    print(f"{grades.total() - grades[NOTE]} things checked, {grades[BAD] or 'none'} not as they should be{notes}")
    return programs.UNMET if grades[BAD] else programs.DONE
