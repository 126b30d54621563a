"""What ``--dry-run`` finds out by reading files but loading no network: the pairs, their labels, the run's state."""

from __future__ import annotations

from collections.abc import Mapping
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
from smpo_fast.method.labels import weigh
from smpo_fast.training.facts import fact_defaults
from smpo_fast.training.job import Job


def survey(job: Job) -> str:
    """The pairs of a run, the weights that their labels give, its epochs, and where it starts.

    Raises DataError for pairs without a preference to learn, ConfigError for fewer pairs than a step draws, and
    CheckpointError for a newest checkpoint that is damaged or was made with other settings.
    """
    return "\n".join([*_pairs(job), f"state      {_state(job)}"])


def _pairs(job: Job) -> list[str]:
    """Lines on the pairs, exact if the cache exists. Otherwise images that cannot be decoded are still among them."""
    c = job.config
    if location.exists(job.cache_dir):
        cache = job.open_cache()
        line = f"pairs      {len(cache)} in the cache {job.cache_dir}"
        return [line, *_labels(c, cache.rewards, cache.labels, cache.shapes)]
    path = reader.source_path(c.data.pairs)
    rejected: Mapping[str, int] = {}
    if c.data.scores:
        scored = score_table.read_pairs(Path(c.data.scores))
        rewards, labels = scored["rewards"], scored["label"]
        line = f"pairs      {len(labels)} with scores in {c.data.scores}; the cache {job.cache_dir} will be prepared"
    else:
        rewards, labels, rejected = reader.read_preferences(path, max_pairs=c.data.max_pairs)
        line = f"pairs      {len(labels)} rows of {path}; the cache {job.cache_dir} will be prepared"
    unusable = [f"           cannot be used: {summary.list_counts(rejected)}"] if rejected else []
    if not len(labels):
        raise DataError(printable(f"data.pairs: {path} has no rows"))
    unscored = ~np.isfinite(rewards).all(axis=1)
    if c.data.scorer and unscored.any():
        return [line, *unusable, f"           data.scorer will score {int(unscored.sum())} of them"]
    return [line, *unusable, *_labels(c, rewards, labels, np.zeros(len(labels), int))]


def _labels(c: Config, rewards: np.ndarray, labels: np.ndarray, shapes: np.ndarray) -> list[str]:
    """What training will make of N pairs. rewards: [N, 2]; labels, shapes: [N]."""
    weighted = weigh(c.labels, rewards, labels)
    order = Order(c.run.seed, shapes[weighted.used], c.drawn_per_step)
    visits = c.run.steps * c.drawn_per_step
    epochs = f"{c.run.steps} steps draw {visits} pairs: {visits / len(order):.2f} epochs of {len(order)}"
    return [f"           {line}" for line in [*str(weighted.report).splitlines(), epochs]]


def _state(job: Job) -> str:
    steps = job.config.run.steps
    facts: Mapping[str, object] | None = job.facts if location.exists(job.cache_dir) else None
    found = checkpoint.inspect(job.run_dir, facts, fact_defaults(facts) if facts else {})
    if found is None:
        return f"the run will start from the base model, at step 0 of {steps}"
    folder, progress = found
    if progress.step == steps:
        return f"finished: all {steps} steps are done ({folder}); the export and the evaluation would be written again"
    return f"the run will continue from step {progress.step} of {steps} ({folder}, verified by hash)"
