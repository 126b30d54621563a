"""Program: score every distinct image of a pair table, into a folder of scores (smpo_fast.data.rewards.score_table)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from smpo_fast.common import shared_work
from smpo_fast.common.console import printable
from smpo_fast.common.errors import DataError
from smpo_fast.common.runtime import World, print0
from smpo_fast.common.shared_work import AlreadyFinished, SharedWork
from smpo_fast.config.commands import ScoreOptions
from smpo_fast.config.schema import Labels
from smpo_fast.data.pairs import reader
from smpo_fast.data.rewards import half_precision, score_table
from smpo_fast.data.rewards.label_report import report_labels
from smpo_fast.data.rewards.scorers import check_scorer, scorer_identity, terms
from smpo_fast.data.rewards.scoring_work import ScoringWork

FORMAT = 1


def score(pairs: str, out: Path, options: ScoreOptions, world: World, settings: Labels) -> dict[str, Any]:
    """Score the images of ``data.pairs`` = ``pairs`` into the folder ``out``; returns the content of its scores.json.

    Every process that calls this does parts of the work; all return when it is complete. Rank 0 then reports on the
    training weights that the scores give with these ``settings``. If ``out`` already holds these scores, they are
    only reported on.  Raises ConfigError for an unknown scorer, ModelError for one that cannot be loaded, and
    DataError for an unreadable table, an ``out`` that holds something else, and if no pair can be scored.
    """
    for _, name in terms(options.scorer):
        check_scorer(name, "--scorer")
    path, building = reader.source_path(pairs), out.absolute().parent / f".{out.name}.partial"
    made_from = _made_from(path, options)
    if (building / score_table.FACTS).is_file():
        shared_work.publish(building, out, score_table.FACTS)
    while not (out / score_table.FACTS).is_file():  # again, if the process that this one joined removed the folder
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise DataError(f"{out} exists and holds no scores: remove it, or choose another folder")
        try:
            with SharedWork(building, made_from) as shared:
                ScoringWork(
                    path, shared, world, scorer=options.scorer, batch=options.batch, half=options.half,
                    max_pairs=options.max_pairs, made_from=made_from,
                ).run()  # fmt: skip
        except AlreadyFinished:
            pass
        shared_work.publish(building, out, score_table.FACTS)
    shared_work.remove_locks(out)
    facts = score_table.read_facts(out)
    _check_same(out, facts["made"], made_from)
    if world.rank == 0:
        print0(_summary(out, facts))
        report_labels(out, settings)
    return facts


def _made_from(path: Path, options: ScoreOptions) -> dict[str, Any]:
    """What the scores of a folder depend on."""
    files = [{"name": file.name, "bytes": file.stat().st_size} for file in reader.files(path)]
    found = [[weight, name, scorer_identity(name)] for weight, name in terms(options.scorer)]
    if options.half:
        for _, name in terms(options.scorer):
            half_precision.check_supports_half(name)
    return {"format": FORMAT, "pairs": files, "max_pairs": options.max_pairs, "scorers": found, "half": options.half}


def _check_same(out: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    differing = [key for key in wanted if json.loads(json.dumps(wanted[key])) != found.get(key)]
    if differing:
        raise DataError(
            f"{out} holds other scores (they differ in {', '.join(differing)}): remove it, or choose another folder"
        )


def _summary(out: Path, facts: dict[str, Any]) -> str:
    counts = facts["counts"]
    reasons = ", ".join(f"{printable(reason)} ({count})" for reason, count in counts["rejected"].items()) or "none"
    lines = [f"{out}: {counts['pictures']} images of {counts['pairs']} pairs scored; rejected rows: {reasons}"]
    lines += [
        f"  {fact['name']}: mean {fact['mean']:.4g}, standard deviation {fact['std']:.4g}, weight {fact['weight']:g}"
        for fact in facts["scorers"]
    ]
    return "\n".join(lines)
