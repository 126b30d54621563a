"""Which settings and sources a cache was made with, and opening the one that serves a run's settings."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smpo_fast.common import remote, storage
from smpo_fast.common.errors import UserError
from smpo_fast.common.runtime import print0
from smpo_fast.config.schema import Config
from smpo_fast.data.cache.format import CacheError, CacheInfo, brief
from smpo_fast.data.cache.reader import CachedPairs
from smpo_fast.data.cache.visits import visited
from smpo_fast.data.pairs import reader as pairs_reader
from smpo_fast.data.rewards import score_table
from smpo_fast.data.rewards.scorers import scorer_identity

# The entries of an identity, and the settings that determine them.
SETTING_OF = {
    "source": "data.pairs",
    "max_pairs": "data.max_pairs",
    "kind": "model.path",
    "encoders": "model.path, model.vae or model.lora",
    "resolution": "data.resolution",
    "buckets": "data.buckets",
    "flip": "data.flip",
    "scores": "data.scores",
    "scorer": "data.scorer",
}


def open_cache(config: Config, root: Path, *, encoders: str, kind: str) -> CachedPairs:
    """Open the cache at ``root`` after checking that it serves these settings.

    encoders, kind: identity and kind of the pipeline's encoders.  Raises CacheError if the cache is damaged or was
    made with other settings, and DataError if its source cannot be identified.
    """
    cached = CachedPairs(root, config.data.cache if remote.is_url(config.data.cache) else "")
    source = describe_source(config.data.pairs, cached.info.source)
    details = {"source": _source_differences(cached.info.source, source)}
    check_identity(cached.info, cache_identity(config, source, encoders, kind), details)
    if not cached.encoded.all():
        _check_visited_are_encoded(config, cached)
    return cached


def cache_identity(config: Config, source: Mapping[str, Any], encoders: str, kind: str) -> dict[str, Any]:
    """The identity of a cache made with these settings. source: from ``describe_source``."""
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


def check_identity(info: CacheInfo, wanted: Mapping[str, Any], details: Mapping[str, str] | None = None) -> None:
    """Raise CacheError unless a cache serves the identity ``wanted`` (only the entries given are compared).

    A cache with mirrored images serves a run without them; the scorer matters only if rewards depend on it.
    details: more to report of an entry that differs.
    """
    found = info.identity
    differing = [key for key, value in wanted.items() if found.get(key) != value and _matters(info, key, value)]
    if differing:
        listed = "; ".join(
            f"{key} ({SETTING_OF.get(key, key)}): found {brief(found.get(key))}, wanted {brief(wanted[key])}"
            + (f" ({details[key]})" if details and details.get(key) else "")
            for key in differing
        )
        raise CacheError(
            f"{info.root}: this cache was prepared with other settings: {listed}. Give data.cache another folder, "
            "remove this one to have it prepared again, or change the settings back"
        )


def describe_source(pairs: str, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """What identifies the pair table: ``data.pairs`` as given, and size, time and sha256 of its files.

    recorded: an earlier description. Files that still have the same size and time are not hashed again. It is
    returned as it is if the table is not on this machine but has the same name.  Raises DataError otherwise.
    """
    try:
        path = pairs_reader.source_path(pairs)
    except UserError:
        if recorded.get("pairs") != pairs:
            raise
        print0(f"data.pairs: {pairs} is not on this machine; the cache, which was made from it, is used without it")
        return dict(recorded)
    before = {file["name"]: file for file in recorded.get("files", [])}
    facts = [_file_facts(file, before.get(file.name, {})) for file in pairs_reader.files(path)]
    return {"pairs": pairs, "sha256": _combined([file["sha256"] for file in facts]), "files": facts}


def _matters(info: CacheInfo, key: str, wanted: Any) -> bool:
    if key == "flip":
        return bool(wanted)
    return key != "scorer" or info.counts["unrewarded"] > 0


def _check_visited_are_encoded(config: Config, cached: CachedPairs) -> None:
    wanted = visited(config, cached.rewards, cached.labels, cached.shapes)
    missing = wanted[~cached.encoded[wanted]]
    if len(missing):
        raise CacheError(
            f"{cached.root}: this cache holds only the {int(cached.encoded.sum())} pairs that another run visits "
            f"(data.only_visited). Of the {len(wanted)} that this one visits (run.seed = {config.run.seed}, "
            f"run.steps = {config.run.steps}, batch.pairs_per_step = {config.batch.pairs_per_step}), {len(missing)} "
            f"are missing; the first is row {cached.rows[missing[0]]}: give data.cache another folder, or remove this "
            "one"
        )


def _combined(hashes: Sequence[str]) -> str:
    """One sha256 for the ordered hashes of a table's files; of a single file its own."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _source_differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Which files of the source have changed, in words."""
    old, new = ({file["name"]: file for file in facts.get("files", [])} for facts in (recorded, now))
    changes = [f"{name} is gone" for name in old.keys() - new.keys()]
    changes += [f"{name} is new" for name in new.keys() - old.keys()]
    changes += [
        f"{name} has {new[name]['bytes']} bytes, had {old[name]['bytes']}"
        if new[name]["bytes"] != old[name]["bytes"]
        else f"{name} has the same size but different content"
        for name in old.keys() & new.keys()
        if new[name]["sha256"] != old[name]["sha256"]
    ]
    return ", ".join(sorted(changes)[:5]) + (f" and {len(changes) - 5} more" if len(changes) > 5 else "")


def _file_facts(file: Path, before: Mapping[str, Any]) -> dict[str, Any]:
    stat = file.stat()
    if before.get("bytes") == stat.st_size and before.get("mtime_ns") == stat.st_mtime_ns:
        return dict(before)
    return {"name": file.name, "mtime_ns": stat.st_mtime_ns, **storage.file_facts(file)}
