"""Program: raw pairs to the cache that training reads: decode, score, encode, write.

A row that cannot be used is left out with its number and the reason; it stops nothing and shifts no other pair. Any
number of processes prepare one cache together, and what they were doing is taken up after a kill at any point.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from smpo_fast.common import remote, shared_work
from smpo_fast.common.errors import UserError
from smpo_fast.common.runtime import World, print0, warn0
from smpo_fast.common.shared_work import AlreadyFinished
from smpo_fast.config.schema import Config
from smpo_fast.data.cache import format as cache_format
from smpo_fast.data.cache import reader
from smpo_fast.data.cache.encode import (
    SHARD_BYTES,
    Encoders,
    _chunks,
    _encode,
    _Kitchen,
    _listed,
    _strictly,
    _survey_and_encode,
)
from smpo_fast.data.cache.format import PROMPTS_PART, CacheInfo
from smpo_fast.data.cache.identity import _identity, _source, open_cache
from smpo_fast.data.cache.reader import CachedPairs
from smpo_fast.data.cache.writer import CacheWriter
from smpo_fast.data.pairs import reader as pairs_reader
from smpo_fast.data.pairs import rules
from smpo_fast.data.rewards.scorers import Scorer, load_scorer

PROMPT_SHARD = 512  # prompts; 160 MB of SDXL embeddings
_PROMPT_BATCH = 32


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
    """Turn the pairs of ``data.pairs`` into a cache at ``out``; where there is one that serves, that is returned.

    Every process that calls this with the same settings, on any machine that shares the folder, takes parts of the
    work; all return when the cache is complete, and its bytes do not depend on how many they were.

    scorer: scores the pairs without stored rewards (default: the one that data.scorer names, on ``device``).
    batch: pairs handled, and pictures in a call of the VAE, at a time.  world: which of the processes shows a bar and
    sends the cache to a ``data.cache`` that is a URL (rank 0), and how many there are, for the forecast.
    Raises SettingsError for unreadable data, an ``out`` that holds something else, and when no pair is usable.
    """
    world, began = world or World(), time.monotonic()
    cache_format.settle(out)
    there = cache_format.exists(out)
    if not there:
        _prepare(config, encoders, device, out, scorer, batch, world)
    cached = open_cache(config, out, encoders=encoders.identity, kind=encoders.kind)
    if there:
        print0(f"{out}: prepared already, {len(cached)} pairs")
    elif world.rank == 0:
        _summarise(cached, encoders, time.monotonic() - began)
    if remote.is_url(config.data.cache) and world.rank == 0 and (sent := reader.send(out, config.data.cache)):
        print0(f"{config.data.cache}: {sent} files sent")
    return cached.info


def _prepare(
    config: Config, encoders: Encoders, device: torch.device, out: Path, scorer: Scorer | None, batch: int, world: World
) -> None:
    path = pairs_reader.source_path(config.data.pairs)
    if config.data.scorer and scorer is None:
        scorer = load_scorer(config.data.scorer, device)
    if not config.data.scores:
        _check_preference(pairs_reader.columns(path), path, scorer)
    cache_format.check_target(out)
    try:
        source = shared_work.agreed_values(cache_format.partial(out), lambda known: _source(config.data.pairs, known))
        identity = _identity(config, source, encoders.identity, encoders.kind)
        with CacheWriter(out, identity, source, _plan(config, batch)) as writer:
            kitchen = _Kitchen(config, encoders, scorer, batch, world)
            rows = range(pairs_reader.count_rows(path, max_pairs=config.data.max_pairs))
            if config.data.only_visited:
                _survey_and_encode(config, writer, kitchen, path, rows)
            else:
                _encode(writer, kitchen, path, _chunks(rows, kitchen.pairs_per_shard))
            if not any(True for _ in writer.entries()):
                reasons = _listed(writer.rejected())
                writer.discard()
                raise UserError(f"data.pairs: no usable pair in {path}: {reasons}")
            if config.data.strict and (rejected := writer.rejected()):  # by an earlier process that was not strict
                raise _strictly(rejected)
            _store_prompts(writer, encoders, world)
            writer.finish((rules.NO_PREFERENCE, rules.NO_FINITE_SCORE))
    except AlreadyFinished:
        cache_format.settle(out)


def _plan(config: Config, batch: int) -> dict[str, Any]:
    """How the work is divided, on which all processes must agree."""
    plan: dict[str, Any] = {"shard_bytes": SHARD_BYTES, "batch": batch}
    if config.data.only_visited:
        plan |= {"seed": config.run.seed, "steps": config.run.steps, "pairs": config.drawn_per_step}
        plan |= {"labels": config.labels.model_dump()}
    return plan


def _store_prompts(writer: CacheWriter, encoders: Encoders, world: World) -> None:
    texts = writer.texts()
    shards = [texts[first : first + PROMPT_SHARD] for first in range(0, len(texts), PROMPT_SHARD)]

    def encode(number: int) -> dict[str, Any]:
        shard, part = shards[number], writer.prompts(number)
        for first in range(part.done, len(shard), _PROMPT_BATCH):
            embeds, pooled = encoders.encode_prompts(shard[first : first + _PROMPT_BATCH])
            part.add(embeds.cpu(), None if pooled is None else pooled.cpu())
            bar.update(len(embeds))
        return part.close()

    with tqdm(total=len(texts), unit="prompt", desc="prompts", mininterval=0.5, disable=world.rank != 0) as bar:
        writer.share(PROMPTS_PART, len(shards), encode)
        bar.update(len(texts) - bar.n)


def _check_preference(columns: set[str], path: Path, scorer: Scorer | None) -> None:
    wanted = {*rules.LABEL_COLUMNS, *(name for names in rules.REWARD_COLUMNS for name in names)}
    if scorer is None and not columns & wanted:
        raise UserError(
            f"data.pairs: {path} has neither labels (label_0) nor rewards (reward_0, reward_1), and data.scorer is "
            "empty: give data.scorer to have the pictures scored"
        )


def _summarise(cached: CachedPairs, encoders: Encoders, seconds: float) -> None:
    info, rejected = cached.info, cached.rejections()
    counts = info.counts
    total = counts["pairs"] + counts["rejected"]
    print0(f"{info.root}: {counts['pairs']} of {total} pairs, {info.bytes / 1e6:.1f} MB, {seconds:.0f} s")
    if counts["encoded"] < counts["pairs"]:
        print0(f"  latents of the {counts['encoded']} pairs that the run visits (data.only_visited)")
    if len(info.pixels) > 1:
        sizes = Counter(info.pixels[kind] for kind in cached.shapes)
        listed = ", ".join(f"{height}x{width}: {count}" for (height, width), count in sizes.most_common(8))
        print0(f"  {len(sizes)} buckets (height x width: pairs): {listed}{', ..' if len(sizes) > 8 else ''}")
    if rejected:
        print0(f"  rejected {counts['rejected']}: {_listed(rejected)}")
    longer = encoders.truncated(cached.texts.tolist())
    cut = f", {longer} longer than the text encoders read (cut)" if longer else ""
    print0(f"  prompts: {counts['prompts'] - 1} distinct and the empty one{cut}")
    labelled = int(np.isfinite(cached.labels).sum())
    scale = "" if info.rewards is None else f", {info.rewards[0]:.6g} .. {info.rewards[1]:.6g}"
    print0(
        f"  rewards: {counts['stored']} pairs stored, {counts['scored']} scored{scale}; human labels: {labelled} pairs"
    )
    if counts["stored"] and counts["scored"]:
        warn0("stored rewards and those of data.scorer are normalised together: are they of one reward model?")
