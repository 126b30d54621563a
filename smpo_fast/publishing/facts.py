"""What a finished run has recorded about itself, read from its folder alone: the base or the pairs may be elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smpo_fast.common.errors import DataError
from smpo_fast.common.storage import unsealed
from smpo_fast.config import loading
from smpo_fast.config.schema import Config
from smpo_fast.evaluation.report import REPORT
from smpo_fast.training.run_folder import FINISHED
from smpo_fast.training.run_log import read_metrics


@dataclass(frozen=True)
class RunFacts:
    """environment: versions, device, base and labels; evaluation: empty where none was made; rows: of the log."""

    folder: Path
    config: Config
    environment: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    rows: list[dict[str, Any]]

    @property
    def title(self) -> str:
        """The name of the run's folder."""
        return self.folder.resolve().name

    @property
    def adapters(self) -> bool:
        """Whether LoRA adapters were trained, instead of all weights."""
        return self.config.lora.rank > 0


def read_facts(run_dir: Path) -> RunFacts:
    """The facts of a finished run. Raises DataError for a folder that is none, or whose records cannot be read."""
    if not (run_dir / FINISHED).is_file():
        there = "it has not finished: start it again" if (run_dir / "config.toml").is_file() else "no run wrote it"
        raise DataError(f"{run_dir} is not the folder of a finished run ({there})")
    environment = _object(run_dir / "environment.json")
    evaluation = run_dir / "evaluation" / REPORT
    return RunFacts(
        run_dir,
        loading.load(run_dir / "config.toml"),
        environment,
        _object(evaluation) if evaluation.is_file() else {},
        read_metrics(run_dir),
    )


def _object(file: Path) -> dict[str, Any]:
    try:
        return unsealed(json.loads(file.read_text()))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read ({error}): start the run again, which writes it anew") from error
