"""The files of a run's repository on the hub: weights that load by the repository's name, pictures, the model card."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from smpo_fast.common.errors import DataError
from smpo_fast.common.verification import BAD
from smpo_fast.evaluation import report
from smpo_fast.models.base_facts import CARD
from smpo_fast.models.pipeline_folder import EXPORT_INFO
from smpo_fast.models.verify import verify_export

GRID, CURVES = f"images/{report.GRID}", "images/curves.png"
# Folders of a run with weights, and where in the repository their files go.
_WEIGHTS = {"export": "", "single-file": "", "lora-kohya": "", "lora-diffusers": "", "lora-peft": "peft"}


def _weight_folders(run_dir: Path) -> list[Path]:
    """The folders of a run whose weights are published."""
    return [run_dir / name for name in _WEIGHTS if (run_dir / name).is_dir()]


def _pictures(run_dir: Path) -> dict[str, Path]:
    """The pictures of a run, by their name in the repository."""
    found = {GRID: run_dir / "evaluation" / report.GRID, CURVES: run_dir / "curves.png"}
    return {name: file for name, file in found.items() if file.is_file()}


def repository_files(run_dir: Path) -> dict[str, Path]:
    """All files of the repository but the card, by their name in it. Raises DataError for a run without an export."""
    found: dict[str, Path] = {}
    for folder in _weight_folders(run_dir):
        for file in sorted(f for f in folder.rglob("*") if f.is_file()):
            name = file.relative_to(folder).as_posix()
            if name not in (EXPORT_INFO, CARD) and not any(part.startswith(".") for part in Path(name).parts):
                found[str(Path(_WEIGHTS[folder.name]) / name)] = file
    if not found:
        raise DataError(f"{run_dir} has no export: start the run again, which writes it")
    return found | _pictures(run_dir)


def damages(run_dir: Path) -> Iterator[str]:
    """What ``smpo verify`` finds wrong with the weights that would be published."""
    for folder in _weight_folders(run_dir):
        yield from (f"{finding.place}: {finding.text}" for finding in verify_export(folder) if finding.grade == BAD)
