"""Verifying an evaluation: the report against its own hash, and against the files that were written with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from smpo_fast.common.verification import Finding, check_files, check_unlisted, note, read_description
from smpo_fast.evaluation.image_store import IMAGES, verify_images
from smpo_fast.evaluation.report import GRID, REPORT, SCORES

_ADVICE = "run smpo evaluate again, which writes it anew"


def is_evaluation(folder: Path) -> bool:
    """Whether a folder holds an evaluation, even one that has lost a file."""
    return (folder / REPORT).is_file() or ((folder / SCORES).is_file() and (folder / GRID).is_file())


def verify_evaluation(folder: Path) -> Iterator[Finding]:
    """Verify evaluation.json, scores.csv and grid.png."""
    report, found = read_description(folder / REPORT, _ADVICE, "comparisons")
    yield from found
    files = report.get("files", {})
    if report and not files:
        yield note(folder, "an earlier version recorded no hashes of scores.csv and grid.png")
    yield from check_files(folder, files, _ADVICE)
    if (folder / IMAGES).is_dir():
        keys = [key for of_model in report.get("images", {}).values() for key in of_model]
        yield from verify_images(folder / IMAGES, keys)
    yield from check_unlisted(folder, {REPORT, SCORES, GRID, IMAGES}, "remove it if it is not yours")
