"""Program ``smpo verify``: verify what lies at a path, print a line for each thing checked, and a total."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from smpo_fast.common import console, programs
from smpo_fast.common.console import printable
from smpo_fast.common.json_report import json_report
from smpo_fast.common.verification import BAD, GOOD, NOTE
from smpo_fast.config.schema import Config
from smpo_fast.verification.artifacts import Request, recognise

_COLOURS = {GOOD: console.GOOD, NOTE: console.DOUBTFUL, BAD: console.BAD}


def run(path: Path, settings: Config | None, device: torch.device, *, deep: bool, as_json: bool = False) -> int:
    """Verify what lies at ``path``; returns the exit status: DONE, or UNMET if something is not as it should be.

    settings: with which artefacts that depend on settings are compared; None where none were given.  deep: recompute
    samples, on ``device``.  as_json: the facts on standard output, the text on standard error.  Raises DataError for a
    path that is nothing of this program's.
    """
    grades = Counter[str]()
    with json_report(as_json) as facts:
        artifact = recognise(path)
        facts |= {"path": path, "artifact": artifact.name, "findings": (found := [])}
        print(f"{path}: {artifact.name}")
        for finding in artifact.verify(path, Request(settings, device, deep)):
            grades[finding.grade] += 1
            found.append(finding._asdict())
            grade = console.coloured(f"{finding.grade:<5}", _COLOURS[finding.grade])
            print(f"{grade}{printable(f'{finding.place}: {finding.text}')}", flush=True)
        checked, notes = grades.total() - grades[NOTE], f", {grades[NOTE]} notes" if grades[NOTE] else ""
        facts |= {"checked": checked, "bad": grades[BAD], "notes": grades[NOTE]}
        print(f"{checked} things checked, {grades[BAD] or 'none'} not as they should be{notes}")
    return programs.UNMET if grades[BAD] else programs.DONE
