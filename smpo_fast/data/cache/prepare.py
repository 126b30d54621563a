"""Program: from a table of raw pairs to the cache that training reads.

A row that cannot be used is left out, and its number and the reason are recorded; it stops nothing and shifts no
other pair. Any number of processes prepare one cache together, and a preparation that was killed at any point is
resumed by the next one.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from smpo_fast.common import remote, shared_work
from smpo_fast.common.errors import DataError
from smpo_fast.common.runtime import World, print0, warn0
from smpo_fast.common.shared_work import AlreadyFinished
from smpo_fast.config.schema import Config
from smpo_fast.data.cache import location
from smpo_fast.data.cache.format import CacheInfo
from smpo_fast.data.cache.identity import cache_identity, describe_source, open_cache
from smpo_fast.data.cache.pipeline import Pipeline, plan, strict_error
from smpo_fast.data.cache.progress import list_reasons
from smpo_fast.data.cache.reader import CachedPairs
from smpo_fast.data.cache.stages import Encoders
from smpo_fast.data.cache.writer import CacheWriter
from smpo_fast.data.pairs import reader as pairs_reader
from smpo_fast.data.pairs import rules
from smpo_fast.data.rewards.scorers import Scorer, load_scorer


def prepare(
    config: Config,
    encoders: Encoders,
    device: torch.device,
    out: Path,
    *,
    scorer: Scorer | None = None,
    batch: int = 8,
    world: World | None = None,
) -> CacheInfo:
    """Turn the pairs of ``data.pairs`` into a cache at ``out``, or return the one there if it serves these settings.

    Every process that calls this with the same settings, on any machine that shares the folder, does parts of the
    work. All return when the cache is complete, and its bytes do not depend on how many they were.

    scorer: computes rewards for pairs without stored ones (default: the one that data.scorer names, on ``device``).
    batch: pairs handled, and at most so many images in a call of the VAE, at a time.  world: rank 0 shows a progress
    bar and uploads the cache to a ``data.cache`` that is a URL; the size is used for the forecast of the time that
    remains.
    Raises DataError for unreadable data, an ``out`` that holds something else, and when no pair is usable; CacheError
    if ``out`` is a cache that was made with other settings.
    """
    world, began = world or World(), time.monotonic()
    location.publish(out)
    existed = location.exists(out)
    while not location.exists(out):  # again, if the process that this one joined was stopped and removed the folder
        _prepare(config, encoders, device, out, scorer, batch, world)
    cached = open_cache(config, out, encoders=encoders.identity, kind=encoders.kind)
    if existed:
        print0(f"{out}: already prepared, {len(cached)} pairs")
    elif world.rank == 0:
        _summarize(cached, encoders, time.monotonic() - began)
    if remote.is_url(config.data.cache) and world.rank == 0 and (sent := location.send(out, config.data.cache)):
        print0(f"{config.data.cache}: {sent} files uploaded")
    return cached.info


def _prepare(
    config: Config, encoders: Encoders, device: torch.device, out: Path, scorer: Scorer | None, batch: int, world: World
) -> None:
    path = pairs_reader.source_path(config.data.pairs)
    if config.data.scorer and scorer is None:
        scorer = load_scorer(config.data.scorer, device)
    if not config.data.scores:
        _check_has_preferences(pairs_reader.columns(path), path, scorer)
    location.check_target(out)
    try:
        building = location.partial(out)
        source = shared_work.agreed_values(building, lambda known: describe_source(config.data.pairs, known))
        identity = cache_identity(config, source, encoders.identity, encoders.kind)
        with CacheWriter(out, identity, source, plan(config, batch)) as writer:
            pipeline = Pipeline(config, path, encoders, scorer, batch, world)
            rows = range(pairs_reader.count_rows(path, max_pairs=config.data.max_pairs))
            if config.data.only_visited:
                pipeline.survey_and_encode(writer, rows)
            else:
                pipeline.encode_all(writer, rows)
            if not any(True for _ in writer.entries()):
                reasons = list_reasons(writer.rejected())
                writer.discard()
                raise DataError(f"data.pairs: no usable pair in {path}: {reasons}")
            if config.data.strict and (rejected := writer.rejected()):  # by a process that ran without data.strict
                raise strict_error(*rejected[0])
            pipeline.encode_prompts(writer)
            writer.finish((rules.NO_PREFERENCE, rules.NO_FINITE_SCORE))
    except AlreadyFinished:
        location.publish(out)


def _check_has_preferences(columns: set[str], path: Path, scorer: Scorer | None) -> None:
    wanted = {*rules.LABEL_COLUMNS, *(name for names in rules.REWARD_COLUMNS for name in names)}
    if scorer is None and not columns & wanted:
        raise DataError(
            f"data.pairs: {path} has neither labels (label_0) nor rewards (reward_0, reward_1), and data.scorer is "
            "empty: set data.scorer to have the images scored"
        )


def _summarize(cached: CachedPairs, encoders: Encoders, seconds: float) -> None:
    info, rejected = cached.info, cached.rejections()
    counts = info.counts
    total = counts["pairs"] + counts["rejected"]
    print0(f"{info.root}: {counts['pairs']} of {total} pairs, {info.bytes / 1e6:.1f} MB, {seconds:.0f} s")
    if counts["encoded"] < counts["pairs"]:
        print0(f"  latents of the {counts['encoded']} pairs that the run visits (data.only_visited)")
    if len(info.pixels) > 1:
        sizes = Counter(info.pixels[kind] for kind in cached.shapes)
        listed = ", ".join(f"{height}x{width}: {count}" for (height, width), count in sizes.most_common(8))
        more = ", .." if len(sizes) > 8 else ""
        print0(f"  {len(sizes)} aspect-ratio buckets (height x width: pairs): {listed}{more}")
    if rejected:
        print0(f"  rejected {counts['rejected']}: {list_reasons(rejected)}")
    longer = encoders.truncated(cached.texts.tolist())
    cut = f", {longer} longer than the text encoders read (cut)" if longer else ""
    print0(f"  prompts: {counts['prompts'] - 1} distinct and the empty one{cut}")
    labelled = int(np.isfinite(cached.labels).sum())
    scale = "" if info.rewards is None else f", {info.rewards[0]:.6g} .. {info.rewards[1]:.6g}"
    print0(
        f"  rewards: {counts['stored']} pairs stored, {counts['scored']} scored{scale}; human labels: {labelled} pairs"
    )
    if counts["stored"] and counts["scored"]:
        warn0("stored rewards and those of data.scorer are normalized together: are they from the same reward model?")
