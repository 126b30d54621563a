"""Verifying a score table: hashes, one finite score for each image, and whether the scores belong to a pair table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smpo_fast.common.errors import ConfigError
from smpo_fast.common.verification import (
    BAD,
    Finding,
    bad,
    caught,
    check_files,
    check_leftovers_of,
    check_unlisted,
    good,
    note,
    read_description,
)
from smpo_fast.config.schema import Config
from smpo_fast.data import images
from smpo_fast.data.pairs import reader
from smpo_fast.data.pairs.pair import RawPair
from smpo_fast.data.rewards import half_precision, label_report, score_table
from smpo_fast.data.rewards.combination import combined
from smpo_fast.data.rewards.score_table import FACTS, PAIRS, REJECTED, SCORES, ScoreTable
from smpo_fast.data.rewards.scorers import load_scorer, scorer_identity

_ADVICE = "put back a good copy, or remove this folder and run smpo score again"
_UNLISTED = "nothing reads it; remove it if it is not yours"
SAMPLE = 8  # pairs that --deep scores again
TOLERANCE = 1e-3  # of float32 scores, in standard deviations: sums are rounded otherwise in other batches and devices


def is_score_table(folder: Path) -> bool:
    """Whether a folder holds scores, even if it has lost a file."""
    return any((folder / name).is_file() for name in (FACTS, SCORES))


def verify_scores(folder: Path, settings: Config | None, device: torch.device, *, deep: bool) -> Iterator[Finding]:
    """Verify the scores of a folder, and with ``settings`` whether they are those of ``data.pairs``.

    deep: score a sample of the pairs again, on ``device``.  Raises ConfigError for ``deep`` without settings.
    """
    if deep and settings is None:
        raise ConfigError(f"--deep scores some images of {folder} again: give the table, data.pairs=.. (or --config)")
    facts, found = read_description(folder / FACTS, _ADVICE, *score_table.NEEDED)
    yield from found
    if facts:
        files = {SCORES: {"bytes": facts["bytes"], "sha256": facts["sha256"]}, **facts.get("files", {})}
        damaged = False
        for finding in (*check_files(folder, files, _ADVICE), *_check_report(folder)):
            damaged |= finding.grade == BAD
            yield finding
        if not damaged:
            yield from caught(folder, lambda: _check_scores(folder, facts))
            if settings is not None:
                yield from caught(folder, lambda: _check_belongs(folder, facts, settings))
            if deep and settings is not None:
                yield from caught(folder, lambda: _score_again(folder, facts, settings, device))
    known = {FACTS, SCORES, PAIRS, REJECTED, label_report.REPORT, label_report.PLOT}
    yield from check_unlisted(folder, known, _UNLISTED)
    yield from check_leftovers_of(folder)


def _check_report(folder: Path) -> Iterator[Finding]:
    """labels.json and labels.png, which every ``smpo score`` writes anew."""
    advice = "run smpo score again, which writes it anew"
    if not (folder / label_report.REPORT).is_file() and not (folder / label_report.PLOT).is_file():
        yield note(folder / label_report.REPORT, "is missing: run smpo score again for a report on the labels")
        return
    report, found = read_description(folder / label_report.REPORT, advice, "report")
    yield from found
    yield from check_files(folder, report.get("files", {}), advice)


def _check_scores(folder: Path, facts: Mapping[str, Any]) -> Iterator[Finding]:
    table = ScoreTable(folder)
    pairs, keys, scores = score_table.read_pairs(folder), table.keys, table.scores
    counts = facts["counts"]
    problems = []
    if len(keys) != counts["pictures"] or len(pairs["rewards"]) != counts["pairs"]:
        problems.append(
            f"{len(keys)} images of {len(pairs['rewards'])} pairs, but {FACTS} says {counts['pictures']} of "
            f"{counts['pairs']}"
        )
    if (keys[1:] <= keys[:-1]).any():
        problems.append(f"{SCORES} has more than one score of an image, or is not sorted")
    if not np.isfinite(pairs["rewards"]).all() or not np.isin(pairs["rewards"], scores).all():
        problems.append(f"{PAIRS} has scores that are not finite, or that {SCORES} does not have")
    if not np.isfinite(scores).all() and not counts["rejected"]:
        problems.append(f"{SCORES} has scores that are not finite, but no row was rejected for it")
    if len(facts["scorers"]) > 1:
        raw = table.column([fact["name"] for fact in facts["scorers"]])
        if not np.allclose(combined(raw, facts["scorers"]), scores, rtol=1e-9, atol=1e-9, equal_nan=True):
            problems.append(f"{SCORES}: the combined score is not that of its parts")
    yield from (bad(folder, f"{problem}: {_ADVICE}") for problem in problems)
    if not problems:
        yield good(folder, f"{len(keys)} images of {len(pairs['rewards'])} pairs, one score each, finite where used")


def _check_belongs(folder: Path, facts: Mapping[str, Any], settings: Config) -> Iterator[Finding]:
    """Whether every usable pair of ``data.pairs`` has its scores here."""
    path, table = reader.source_path(settings.data.pairs), ScoreTable(folder)
    usable, missing = 0, []
    for item in reader.read_pairs(path, max_pairs=facts["made"]["max_pairs"]):
        if isinstance(item, RawPair):
            usable += 1
            if not table.find(score_table.keys_of(item))[1].all():
                missing.append(item.row)
    if missing:
        yield bad(
            folder,
            f"{len(missing)} of {usable} pairs of {path} are not scored here, the first is row {missing[0]}: were "
            "these scores made of another table? Score this one into another folder",
        )
    else:
        yield good(folder, f"has a score of every image of the {usable} usable pairs of {path}")


def _score_again(folder: Path, facts: Mapping[str, Any], settings: Config, device: torch.device) -> Iterator[Finding]:
    """Score a sample of evenly spaced pairs, and compare."""
    path, table = reader.source_path(settings.data.pairs), ScoreTable(folder)
    rows = score_table.read_rows(folder)
    picked = [int(rows[i]) for i in sorted({*np.linspace(0, len(rows) - 1, min(SAMPLE, len(rows)), dtype=int)})]
    pairs = [next(reader.read_pairs(path, start=row)) for row in picked]
    usable = [pair for pair in pairs if isinstance(pair, RawPair)]
    decoded = [images.decode(content) for pair in usable for content in pair.images]
    prompts = [pair.prompt for pair in usable for _ in pair.images]
    raw = []
    for fact in facts["scorers"]:
        name = fact["name"]
        if scorer_identity(name) != fact["identity"]:
            yield bad(folder, f"the scorer '{name}' is another one here than these scores were made with")
            return
        raw.append(load_scorer(name, device, half=facts["half"].get(name, False))(decoded, prompts))
    found = combined(np.stack(raw, axis=1).astype(np.float64), facts["scorers"])
    stored = table.scores_of([key for pair in usable for key in score_table.keys_of(pair)])
    scale = facts["scorers"][0]["std"] if len(facts["scorers"]) == 1 else 1.0
    limit = (half_precision.TOLERANCE if any(facts["half"].values()) else TOLERANCE) * scale
    largest = float(np.abs(found - stored).max(initial=0.0))
    sample = f"rows {', '.join(str(pair.row) for pair in usable)} scored again: they differ by at most {largest:.3g}"
    if largest <= limit and len(usable) == len(picked):
        yield good(folder, f"{sample} ({limit:.3g} is allowed)")
    else:
        yield bad(folder, f"{sample}, {limit:.3g} is allowed, and {len(picked) - len(usable)} of them are unusable now")
