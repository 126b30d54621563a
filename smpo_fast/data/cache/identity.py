"""Where a cache lies, and which settings and sources it must have been made with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from smpo_fast.common import remote
from smpo_fast.common.errors import UserError
from smpo_fast.common.runtime import print0
from smpo_fast.config.schema import Config
from smpo_fast.data.cache import format as cache_format
from smpo_fast.data.cache import reader
from smpo_fast.data.cache.format import CacheError, CacheInfo
from smpo_fast.data.cache.reader import CachedPairs
from smpo_fast.data.pairs import reader as pairs_reader
from smpo_fast.data.pairs.order import Order
from smpo_fast.data.rewards import score_table
from smpo_fast.data.rewards.scorers import scorer_identity
from smpo_fast.method.labels import weigh


def locate(config: Config) -> Path:
    """The folder on this machine of the cache that ``data.cache`` names, which need not be there yet.

    Of a cache at a URL it is ``<run.dir>/cache``, to which the index is fetched; shards follow when they are read.
    """
    named, own = config.data.cache, Path(config.run.dir) / "cache"
    if not remote.is_url(named):
        return Path(named) if named else own
    if not cache_format.exists(own):
        reader.fetch_index(own, named)
    return own


def wanted_identity(config: Config, *, encoders: str, kind: str, known: CacheInfo | None = None) -> dict[str, Any]:
    """The identity of the cache that these settings ask for, without loading networks.

    encoders, kind: identity and kind of the pipeline's encoders.  known: an existing cache, whose record of the
    source saves hashing files that still have the same size and time; it also stands in for the source when
    ``data.pairs`` is the path it was made from and is not on this machine (which is said).
    """
    return _identity(config, _source(config.data.pairs, known.source if known else {}), encoders, kind)


def open_cache(config: Config, root: Path, *, encoders: str, kind: str) -> CachedPairs:
    """The cache at ``root``, after checking that it is whole and serves these settings; raises CacheError."""
    cached = CachedPairs(root, config.data.cache if remote.is_url(config.data.cache) else "")
    source = _source(config.data.pairs, cached.info.source)
    details = {"source": _source_differences(cached.info.source, source)}
    cached.expect(_identity(config, source, encoders, kind), details)
    if not cached.encoded.all():
        _check_visited(config, cached)
    return cached


def visited(config: Config, rewards: np.ndarray, labels: np.ndarray, shapes: np.ndarray) -> np.ndarray:
    """Which of N pairs the run visits, ascending. rewards [N, 2] and labels [N] as in the cache, shapes int [N]."""
    used = np.flatnonzero(weigh(config.labels, rewards, labels).used)
    order = Order(config.run.seed, shapes[used], config.drawn_per_step)
    return used[order.visited(config.run.steps * config.drawn_per_step)]


def _check_visited(config: Config, cached: CachedPairs) -> None:
    wanted = visited(config, cached.rewards, cached.labels, cached.shapes)
    missing = wanted[~cached.encoded[wanted]]
    if len(missing):
        raise CacheError(
            f"{cached.root}: this cache holds the {int(cached.encoded.sum())} pairs that another run visits "
            f"(data.only_visited); of the {len(wanted)} that this one visits (run.seed = {config.run.seed}, "
            f"run.steps = {config.run.steps}, batch.pairs_per_step = {config.batch.pairs_per_step}) {len(missing)} are "
            f"missing, the first is row {cached.rows[missing[0]]}: give data.cache another folder, or remove this one"
        )


def _identity(config: Config, source: Mapping[str, Any], encoders: str, kind: str) -> dict[str, Any]:
    return {
        "source": source["sha256"],
        "max_pairs": config.data.max_pairs,
        "kind": kind,
        "encoders": encoders,
        "resolution": config.data.resolution,
        "buckets": config.data.buckets,
        "flip": config.data.flip,
        "scores": score_table.identity(Path(config.data.scores)) if config.data.scores else "",
        "scorer": scorer_identity(config.data.scorer),
    }


def _source(pairs: str, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """What identifies the source: ``pairs`` as given, and size, time and sha256 of its files.

    recorded: the same from earlier, to spare hashing.
    """
    try:
        path = pairs_reader.source_path(pairs)
    except UserError:
        if recorded.get("pairs") != pairs:
            raise
        print0(f"data.pairs: {pairs} is not here; the cache was made from a file of that name and is used as it is")
        return dict(recorded)
    before = {file["name"]: file for file in recorded.get("files", [])}
    facts = [_file_facts(file, before.get(file.name, {})) for file in pairs_reader.files(path)]
    hashes = [file["sha256"] for file in facts]
    whole = hashes[0] if len(hashes) == 1 else cache_format.combined(hashes)
    return {"pairs": pairs, "sha256": whole, "files": facts}


def _source_differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Which files of the source are not what they were."""
    old, new = ({file["name"]: file for file in facts.get("files", [])} for facts in (recorded, now))
    said = [f"{name} is gone" for name in old.keys() - new.keys()]
    said += [f"{name} is new" for name in new.keys() - old.keys()]
    said += [
        f"{name} has {new[name]['bytes']} bytes, had {old[name]['bytes']}"
        if new[name]["bytes"] != old[name]["bytes"]
        else f"{name} has the same size but another content"
        for name in old.keys() & new.keys()
        if new[name]["sha256"] != old[name]["sha256"]
    ]
    return ", ".join(sorted(said)[:5]) + (f" and {len(said) - 5} more" if len(said) > 5 else "")


def _file_facts(file: Path, before: Mapping[str, Any]) -> dict[str, Any]:
    stat = file.stat()
    if before.get("bytes") == stat.st_size and before.get("mtime_ns") == stat.st_mtime_ns:
        return dict(before)
    return {"name": file.name, "mtime_ns": stat.st_mtime_ns, **cache_format.file_facts(file)}
