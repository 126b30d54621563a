"""The files of an evaluation: scores.csv, evaluation.json and grid.png; and its lines of text."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from smpo_fast.common import plots, storage
from smpo_fast.common.storage import atomic_write
from smpo_fast.config.schema import Config
from smpo_fast.evaluation.image_store import ImageStore
from smpo_fast.evaluation.statistics import Comparison

REPORT, SCORES, GRID = "evaluation.json", "scores.csv", "grid.png"  # the report has the hashes of the others
GRID_ROWS = 12
_NOISE = {
    "index": "image n from noise of seed {seed} + n",
    "same": "every image from the same noise, of seed {seed}",
    "running": "noise of one generator for all images in their order, of seed {seed}",
}

Values = dict[str, dict[str, np.ndarray]]
"""By the name of a score or measure, and the model's: a value per prompt, [n]."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found. comparisons: of every model with the base by every score; drifts: by every measure.

    keys: of each model's images in the store, those of a prompt after another.
    """

    comparisons: Sequence[Comparison]
    drifts: Sequence[Comparison]
    scores: Values
    measures: Values
    keys: Mapping[str, Sequence[str]]

    def text(self, config: Config) -> str:
        """The protocol, a line for each comparison, and one for each measure that differs from the base's."""
        drifts = [drift.drift_line() for drift in self.drifts if drift.gain]
        return "\n".join([describe_protocol(config), *map(str, self.comparisons), *drifts])


def describe_protocol(config: Config) -> str:
    """How the images were drawn, in one line: without it no number can be compared with another's."""
    e = config.eval
    sampler = "the pipeline's sampler" if e.sampler == "pipeline" else e.sampler
    return (
        f"protocol '{e.protocol}': {e.count} prompts ({Path(e.prompts).name}), {e.per_prompt} image(s) each, "
        f"{sampler}, {e.steps} steps, guidance {e.guidance:g}; "
        f"{_NOISE[e.noise].format(seed=e.seed)}; scored by {e.scorer or 'nothing'}; means over prompts"
    )


def write_report(out: Path, config: Config, prompts: Sequence[str], store: ImageStore, done: Evaluation) -> None:
    """Write all files of an evaluation, the report last."""
    each = config.eval.per_prompt
    write_scores(out / SCORES, prompts, {**done.scores, **done.measures})
    shown = next(iter(done.scores.values())) if done.scores else None
    first = range(0, each * min(GRID_ROWS, len(prompts)), each)
    images = {model: [store.image(keys[i]) for i in first] for model, keys in done.keys.items()}
    plots.draw_grid(images, prompts[:GRID_ROWS], shown, out / GRID, rows=GRID_ROWS)
    facts = {
        "eval": config.eval.model_dump(),
        "protocol": describe_protocol(config),
        "comparisons": [asdict(c) for c in done.comparisons],
        "drifts": [asdict(c) for c in done.drifts],
        "prompts": list(prompts),
        "images": {model: list(keys) for model, keys in done.keys.items()},
    }
    files = {name: storage.file_facts(out / name) for name in (SCORES, GRID)}
    storage.write_json(out / REPORT, storage.sealed({**facts, "files": files}), indent=1)


def write_scores(file: Path, prompts: Sequence[str], scores: Values) -> None:
    """A row per prompt with all scores and measures of its images."""
    columns = [(f"{name}_{which}", values) for name, found in scores.items() for which, values in found.items()]
    with atomic_write(file) as draft, draft.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["prompt", *(name for name, _ in columns)])
        writer.writerows([prompt, *(f"{values[i]:.6g}" for _, values in columns)] for i, prompt in enumerate(prompts))


def read_scores(file: Path) -> dict[str, np.ndarray]:
    """The columns of scores.csv but the prompts, [n] each; none where there is no such file."""
    if not file.is_file():
        return {}
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    names = [name for name in (rows[0] if rows else {}) if name != "prompt"]
    return {name: np.array([float(row[name]) for row in rows]) for name in names}
