"""Verifying a cache: every file's hash, the index against the shards, and every stored number."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from smpo_fast.common import programs
from smpo_fast.common.console import printable
from smpo_fast.common.storage import sha256
from smpo_fast.config.schema import Config
from smpo_fast.data.cache.format import (
    INFO,
    LATENTS_PART,
    PAIRS,
    PROMPTS,
    PROMPTS_PART,
    CacheError,
    brief,
    shard_name,
    size_suffix,
)
from smpo_fast.data.cache.identity import open_cache
from smpo_fast.data.cache.reader import CachedPairs
from smpo_fast.models.identity import encoders_identity
from smpo_fast.models.locate import find

_SCAN_BYTES = 64 << 20  # of an array that is checked at a time


def run(folder: Path, settings: Config | None) -> int:
    """Program ``smpo verify``: print every problem of a cache, or that it has none; returns the exit status.

    With ``settings``, a cache that was not made for them has a problem. Raises CacheError for a folder without a
    readable cache.
    """
    cached = CachedPairs(folder, check=False)
    problems = verify(cached)
    if problems:
        problems.append(f"put back a good copy of these files, or remove {folder} and run 'smpo prepare' again")
    if settings is not None:
        source = find(settings.model)
        try:
            open_cache(settings, folder, encoders=encoders_identity(source), kind=source.kind)
        except CacheError as error:
            problems.append(str(error))
    whole = f"{folder}: {len(cached)} pairs, every file is as it was written, every number finite"
    print("\n".join(problems) if problems else whole)
    return programs.UNMET if problems else programs.DONE


def verify(cached: CachedPairs) -> list[str]:
    """Read a whole cache and check it; returns the problems, one line each, or nothing."""
    problems: list[str] = []
    for check in (_changed_files, _index_problems, _bad_numbers):
        try:
            problems += check(cached)
        except CacheError as error:  # a file that cannot be read at all
            problems.append(str(error))
    return list(dict.fromkeys(problems))


def _changed_files(cached: CachedPairs) -> Iterator[str]:
    for name, facts in cached.info.files.items():
        if sha256(cached.file(name)) != facts["sha256"]:
            problem = "its content has changed since it was written (sha256 differs)"
            yield f"{cached.root / name}: {problem}{_what_it_holds(cached, name)}"


def _what_it_holds(cached: CachedPairs, name: str) -> str:
    """Which pairs or prompts a shard holds, in words."""
    kind, _, number = name.partition(".")[0].rpartition("-")
    if kind == LATENTS_PART:
        rows = cached.rows[cached.places[:, 0] == int(number)]
        return f"; it holds {len(rows)} pairs, rows {rows.min()} to {rows.max()}" if len(rows) else ""
    if kind == PROMPTS_PART:
        texts = cached.texts[cached.prompt_places[:, 0] == int(number)]
        return f"; it holds {len(texts)} prompts, the first is {brief(texts[0])}" if len(texts) else ""
    return ""


def _index_problems(cached: CachedPairs) -> Iterator[str]:
    """Counts, rows and prompts of the index that contradict each other."""
    rejected = [row for row, _, _ in cached.rejections()]
    found = {
        "pairs": len(cached), "encoded": int(cached.encoded.sum()),
        "prompts": len(cached.texts), "rejected": len(rejected),
    }  # fmt: skip
    for what, count in found.items():
        if count != cached.info.counts[what]:
            yield f"{cached.root}: the index has {count} {what}, {INFO} says {cached.info.counts[what]}"
    if (np.diff(cached.rows) <= 0).any():
        yield f"{cached.root / PAIRS}: rows are not in ascending order: a pair occurs twice or has moved"
    both = sorted(set(rejected) & set(cached.rows.tolist()))
    if both:
        yield f"{cached.root}: rows {both[:5]} are both used and rejected"
    if not ((0 <= cached.prompt_index) & (cached.prompt_index < len(cached.texts))).all():
        yield f"{cached.root / PAIRS}: the prompt of a pair is not in {PROMPTS}"
    yield from _wrong_places(cached)


def _wrong_places(cached: CachedPairs) -> Iterator[str]:
    """Shards that do not hold exactly the pairs that the index places there."""
    for shard in np.unique(cached.places[cached.encoded, 0]):
        name = shard_name(LATENTS_PART, shard)
        stored, here = cached.shard(name), cached.places[:, 0] == shard
        for kind in np.unique(cached.shapes[here]):
            positions = np.sort(cached.places[here & (cached.shapes == kind), 1])
            mean = stored.get(f"mean{cached.info.suffix(kind)}")
            count = 0 if mean is None else len(mean)
            if not np.array_equal(positions, np.arange(count)):
                problem = f"it holds {count} pairs where the index has {len(positions)}"
                yield f"{cached.root / name}: {problem}{_what_it_holds(cached, name)}"


def _bad_numbers(cached: CachedPairs) -> Iterator[str]:
    """Pairs and prompts with numbers that are NaN or infinite, or standard deviations below 0."""
    sizes = np.array([size_suffix(size)[1:] for size in cached.info.pixels])[cached.shapes]
    for shard in np.unique(cached.places[cached.encoded, 0]):
        name = shard_name(LATENTS_PART, shard)
        for key, array in cached.shard(name).items():
            what, _, size = key.partition(".")
            for position in _bad_rows(array, least=0.0 if what == "std" else -np.inf):
                here = (cached.places == (shard, position)).all(axis=1)
                for pair in np.flatnonzero(here & (not size or sizes == size)):
                    row = f"row {cached.rows[pair]} ({printable(cached.uids[pair])})"
                    problem = "contains a number that is not finite or is below 0"
                    yield f"{cached.root / name}: {row}: the latents' {what} {problem}"
    for shard in np.unique(cached.prompt_places[:, 0]):
        name = shard_name(PROMPTS_PART, shard)
        for array in cached.shard(name).values():
            for position in _bad_rows(array):
                for i in np.flatnonzero((cached.prompt_places == (shard, position)).all(axis=1)):
                    yield f"{cached.root / name}: the embedding of prompt {i}, {brief(cached.texts[i])}, is not finite"


def _bad_rows(array: np.ndarray, least: float = -np.inf) -> Iterator[int]:
    """Rows of a float16 array [n, ..] with numbers that are not finite or below ``least``."""
    step = max(1, _SCAN_BYTES // max(1, array[:1].nbytes))
    for first in range(0, len(array), step):
        block = array[first : first + step].reshape(len(array[first : first + step]), -1)
        yield from (int(first + i) for i in np.flatnonzero(~(np.isfinite(block) & (block >= least)).all(axis=1)))
