"""Reporting what training weights the scores of a folder give: as text, labels.json and labels.png."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from smpo_fast.common import plots, storage
from smpo_fast.common.runtime import print0
from smpo_fast.config.schema import Labels
from smpo_fast.data.rewards import score_table
from smpo_fast.method import label_report, labels

REPORT, PLOT = "labels.json", "labels.png"  # the report names the plot's hash, so it is written after it


def read_report(out: Path) -> dict[str, Any]:
    """What labels.json in the folder ``out`` says of the pairs' weights: the values of a LabelReport."""
    return storage.unsealed(json.loads((out / REPORT).read_text()))["report"]


def report_labels(out: Path, settings: Labels) -> None:
    """Print a summary of the pairs' weights, and write labels.json and labels.png into the folder ``out``."""
    found = score_table.read_pairs(out)
    weighted = labels.weigh(settings, found["rewards"], found["label"])
    bins = label_report.calibration(weighted.preference, found["label"])
    facts = {
        "labels": settings.model_dump(),
        "report": {key: None if value != value else value for key, value in asdict(weighted.report).items()},
        "calibration": [asdict(b) for b in bins],
    }
    plots.draw_labels(weighted.weight[weighted.used], [(b.predicted, b.human, b.error) for b in bins], out / PLOT)
    files = {PLOT: storage.file_facts(out / PLOT)}
    storage.write_json(out / REPORT, storage.sealed({**facts, "files": files}), indent=2)
    print0(weighted.report)
