"""The files of an evaluation: scores.csv, evaluation.json and grid.png."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from smpo_fast.common import plots, storage
from smpo_fast.common.storage import atomic_write
from smpo_fast.config.schema import Config
from smpo_fast.evaluation.statistics import Comparison

REPORT, SCORES, GRID = "evaluation.json", "scores.csv", "grid.png"  # the report has the hashes of the others
GRID_ROWS = 12

Scores = Mapping[str, Mapping[str, np.ndarray]]
"""By the score's name and the model's ('base', 'aligned', and perhaps 'lora'): a value per prompt, [n]."""


def write_report(
    out: Path,
    config: Config,
    prompts: Sequence[str],
    images: Mapping[str, list[Image.Image]],
    scores: Scores,
    comparisons: Sequence[Comparison],
) -> None:
    """Write all files of an evaluation, the report last; images by the model's name, as the scores."""
    write_scores(out / SCORES, prompts, scores)
    shown = next(iter(scores.values())) if scores else None
    plots.draw_grid(images, prompts, shown, out / GRID, rows=GRID_ROWS)
    facts = {"eval": config.eval.model_dump(), "comparisons": [asdict(c) for c in comparisons]}
    files = {name: storage.file_facts(out / name) for name in (SCORES, GRID)}
    storage.write_json(out / REPORT, storage.sealed({**facts, "files": files}), indent=2)


def write_scores(file: Path, prompts: Sequence[str], scores: Scores) -> None:
    """A row per prompt with all scores of its images."""
    columns = [(f"{name}_{which}", values) for name, found in scores.items() for which, values in found.items()]
    with atomic_write(file) as draft, draft.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["prompt", *(name for name, _ in columns)])
        writer.writerows([prompt, *(f"{values[i]:.6g}" for _, values in columns)] for i, prompt in enumerate(prompts))
