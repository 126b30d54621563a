"""Verifying a cache: every file's hash, the index against the shards, and every stored number."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from smpo_fast.common import remote
from smpo_fast.common.console import printable
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
    read_description,
)
from smpo_fast.config.schema import Config
from smpo_fast.data.cache import reencode
from smpo_fast.data.cache.format import (
    INFO,
    LATENTS_PART,
    PAIRS,
    PROMPTS,
    PROMPTS_PART,
    CacheError,
    brief,
    read_info,
    shard_name,
    size_suffix,
)
from smpo_fast.data.cache.identity import open_cache
from smpo_fast.data.cache.reader import CachedPairs
from smpo_fast.models.identity import encoders_identity
from smpo_fast.models.locate import find

_ADVICE = "put back a good copy, or remove the folder and run 'smpo prepare' again"
_UNLISTED = "training does not read it; remove it if it is not yours"
_SCAN_BYTES = 64 << 20  # of an array that is checked at a time


def is_cache(folder: Path) -> bool:
    """Whether a folder holds a prepared cache, even one that has lost a file."""
    return (folder / INFO).is_file() or any(folder.glob(f"{LATENTS_PART}-*.safetensors"))


def verify_cache(folder: Path, settings: Config | None, device: torch.device, *, deep: bool) -> Iterator[Finding]:
    """Verify a cache: the hash of every file, the index against the shards, and every stored number.

    With ``settings`` also whether the cache was made for them.  deep: encode a sample of the pairs again, on
    ``device`` (smpo_fast.data.cache.reencode).  Raises ConfigError for ``deep`` without settings.
    """
    if deep and settings is None:
        raise ConfigError(
            f"--deep encodes some pairs of {folder} again: give the settings that name their table and networks "
            "(--config FILE, or data.pairs=.. model.path=..)"
        )
    damaged = False
    for finding in _check_files(folder, settings):
        damaged |= finding.grade == BAD
        yield finding
    cached = _open(folder)
    if cached is not None:
        yield from caught(folder, lambda: _check_content(cached))
    if cached is not None and not damaged:
        if settings is not None:
            yield from caught(folder, lambda: _check_against(cached, settings, device, deep=deep))
    yield from check_leftovers_of(folder)


def _check_files(folder: Path, settings: Config | None) -> Iterator[Finding]:
    values, found = read_description(folder / INFO, _ADVICE)
    yield from found
    if not values:
        return
    try:
        files = read_info(folder).files
    except CacheError as error:
        yield bad(folder / INFO, str(error))
        return
    remote_shards = settings is not None and remote.is_url(settings.data.cache)
    may_lack = {name for name in files if name.endswith(".safetensors")} if remote_shards else set()
    indexed = all((folder / name).is_file() for name in (PAIRS, PROMPTS))
    for finding in check_files(folder, files, _ADVICE, may_lack=may_lack):
        if finding.grade == BAD and indexed:
            finding = bad(finding.place, f"{finding.text}{_lost(folder, finding.place.name)}")
        yield finding
    yield from check_unlisted(folder, {*files, INFO}, _UNLISTED)


def _open(folder: Path) -> CachedPairs | None:
    """The cache, where its files have their full length; what is wrong with them otherwise has been said already."""
    try:
        whole = all((folder / name).stat().st_size == f["bytes"] for name, f in read_info(folder).files.items())
        return CachedPairs(folder, check=False) if whole else None
    except (OSError, CacheError):
        return None


def _lost(folder: Path, name: str) -> str:
    """Which pairs or prompts a damaged shard held, in words; nothing where the index cannot say."""
    try:
        return _what_it_holds(CachedPairs(folder, check=False), name)
    except (CacheError, KeyError, ValueError):
        return ""


def _check_content(cached: CachedPairs) -> Iterator[Finding]:
    problems = [*_index_problems(cached), *_bad_numbers(cached)]
    yield from (bad(cached.root, f"{problem}: {_ADVICE}") for problem in problems)
    if not problems:
        yield good(cached.root, f"{len(cached)} pairs, each where the index says, every number finite")


def _check_against(cached: CachedPairs, settings: Config, device: torch.device, *, deep: bool) -> Iterator[Finding]:
    source = find(settings.model)
    open_cache(settings, cached.root, encoders=encoders_identity(source), kind=source.kind)
    yield good(cached.root, "was made with these settings, this table and these networks")
    if deep:
        yield from reencode.check_sample(cached, settings, device)


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
