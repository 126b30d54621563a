"""What ``--dry-run`` finds out by reading files but loading no network: the pairs, their labels, the run's state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from smpo_fast.common.console import printable
from smpo_fast.common.errors import DataError
from smpo_fast.config.schema import Config
from smpo_fast.data.cache import location
from smpo_fast.data.pairs import reader, summary
from smpo_fast.data.pairs.order import Order
from smpo_fast.data.rewards import score_table
from smpo_fast.engine import checkpoint
from smpo_fast.method.label_report import LabelReport
from smpo_fast.method.labels import weigh
from smpo_fast.training.facts import fact_defaults
from smpo_fast.training.job import Job

_PLACES = {"cache": "in the cache", "scores": "with scores in", "table": "rows of"}


@dataclass(frozen=True)
class PairsFound:
    """The pairs of a run: exact if they are cached, otherwise with those whose images cannot be decoded.

    counted_in: 'cache', 'scores' or 'table'.  path: where that is.  unusable: rows by reason.  unscored: pairs that
    ``data.scorer`` will score, in which case nothing is known of labels and draws yet.
    """

    count: int
    counted_in: str
    path: str
    unusable: dict[str, int] = field(default_factory=dict)
    unscored: int = 0


@dataclass(frozen=True)
class Draws:
    """How many pairs all steps of a run draw, and how many times that is all usable pairs."""

    pairs: int
    usable: int
    epochs: float


@dataclass(frozen=True)
class State:
    """Where a run starts: at a step, from a checkpoint; None: from the base model."""

    step: int
    steps: int
    checkpoint: str | None


@dataclass(frozen=True)
class Survey:
    """What ``--dry-run`` finds out."""

    pairs: PairsFound
    labels: LabelReport | None
    draws: Draws | None
    state: State
    cache: str  # the folder

    def __str__(self) -> str:
        return "\n".join([*self._pairs(), f"state      {self._state()}"])

    def _pairs(self) -> Iterator[str]:
        found = self.pairs
        line = f"pairs      {found.count} {_PLACES[found.counted_in]} {found.path}"
        yield line if found.counted_in == "cache" else f"{line}; the cache {self.cache} will be prepared"
        if found.unusable:
            yield f"           cannot be used: {summary.list_counts(found.unusable)}"
        if found.unscored:
            yield f"           data.scorer will score {found.unscored} of them"
        if self.labels and self.draws:
            drawn = f"{self.state.steps} steps draw {self.draws.pairs} pairs: {self.draws.epochs:.2f} epochs of "
            yield from (
                f"           {line}" for line in [*str(self.labels).splitlines(), f"{drawn}{self.draws.usable}"]
            )

    def _state(self) -> str:
        step, steps, folder = self.state.step, self.state.steps, self.state.checkpoint
        if folder is None:
            return f"the run will start from the base model, at step 0 of {steps}"
        if step == steps:
            again = "the export and the evaluation would be written again"
            return f"finished: all {steps} steps are done ({folder}); {again}"
        return f"the run will continue from step {step} of {steps} ({folder}, verified by hash)"


def survey(job: Job) -> Survey:
    """The pairs of a run, the weights that their labels give, its epochs, and where it starts.

    Raises DataError for pairs without a preference to learn, ConfigError for fewer pairs than a step draws, and
    CheckpointError for a newest checkpoint that is damaged or was made with other settings.
    """
    c = job.config
    if location.exists(job.cache_dir):
        cache = job.open_cache()
        found = PairsFound(len(cache), "cache", str(job.cache_dir))
        rewards, label, shapes = cache.rewards, cache.labels, cache.shapes
    else:
        found, rewards, label = _uncached(c)
        shapes = np.zeros(len(label), int)
    labels, draws = (None, None) if found.unscored else _labels(c, rewards, label, shapes)
    return Survey(found, labels, draws, _state(job), str(job.cache_dir))


def _uncached(c: Config) -> tuple[PairsFound, np.ndarray, np.ndarray]:
    """The pairs of a table or of scores, their rewards [N, 2] and labels [N]."""
    path = reader.source_path(c.data.pairs)
    unusable: Mapping[str, int] = {}
    if c.data.scores:
        scored = score_table.read_pairs(Path(c.data.scores))
        rewards, label = scored["rewards"], scored["label"]
        place = ("scores", c.data.scores)
    else:
        rewards, label, unusable = reader.read_preferences(path, max_pairs=c.data.max_pairs)
        place = ("table", str(path))
    if not len(label):
        raise DataError(printable(f"data.pairs: {path} has no rows"))
    unscored = int((~np.isfinite(rewards).all(axis=1)).sum()) if c.data.scorer else 0
    return PairsFound(len(label), *place, dict(unusable), unscored), rewards, label


def _labels(c: Config, rewards: np.ndarray, labels: np.ndarray, shapes: np.ndarray) -> tuple[LabelReport, Draws]:
    """What training will make of N pairs. rewards: [N, 2]; labels, shapes: [N]."""
    weighted = weigh(c.labels, rewards, labels)
    order = Order(c.run.seed, shapes[weighted.used], c.drawn_per_step)
    visits = c.run.steps * c.drawn_per_step
    return weighted.report, Draws(visits, len(order), visits / len(order))


def _state(job: Job) -> State:
    steps = job.config.run.steps
    facts: Mapping[str, object] | None = job.facts if location.exists(job.cache_dir) else None
    found = checkpoint.inspect(job.run_dir, facts, fact_defaults(facts) if facts else {})
    return State(0, steps, None) if found is None else State(found[1].step, steps, str(found[0]))
