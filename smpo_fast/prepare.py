"""Program: raw pairs to the cache that training reads: decode, score, encode, write.

A row that cannot be used is left out with its number and the reason; it stops nothing and shifts no other pair.
An interrupted preparation goes on after its last finished shard when it is started again.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from smpo_fast import cache, data
from smpo_fast.cache import CachedPairs, CacheInfo, CacheWriter, Entry, Unstorable
from smpo_fast.config import Config, SettingsError
from smpo_fast.data import RawPair, Rejected
from smpo_fast.runtime import print0, warn0
from smpo_fast.scorers import Scorer, load_scorer, scorer_identity

if TYPE_CHECKING:
    from PIL.Image import Image

NO_PREFERENCE = "no preference"
BAD_SCORE = "the scorer gave no finite score"
_PROMPT_BATCH = 32
_PROMPT_SHARD = 512  # prompts; 160 MB of SDXL embeddings


class Encoders(Protocol):
    """What is asked of the networks (smpo_fast.model.Encoders)."""

    kind: str  # "sdxl" | "sd15"
    identity: str

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]: ...

    def encode_prompts(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]: ...

    def truncated(self, prompts: Sequence[str]) -> int: ...


@dataclass(frozen=True)
class _Decoded:
    pair: RawPair
    squares: np.ndarray  # uint8 [2, R, R, 3]
    pictures: tuple[Image, Image] | None  # whole, where they must be scored
    scored: bool = False


def wanted_identity(config: Config, *, encoders: str, kind: str, known: CacheInfo | None = None) -> dict[str, Any]:
    """The identity of the cache that these settings ask for, without loading networks.

    encoders, kind: identity and kind of the pipeline's encoders.  known: an existing cache, whose record of the
    source saves hashing files that still have the same size and time; it also stands in for the source when
    ``data.pairs`` is the path it was made from and is not on this machine (which is said).
    """
    return _identity(config, _source(config.data.pairs, known), encoders, kind)


def open_cache(config: Config, root: Path, *, encoders: str, kind: str) -> CachedPairs:
    """The cache at ``root``, after checking that it is whole and serves these settings; raises CacheError."""
    cached = CachedPairs(root)
    cached.expect(wanted_identity(config, encoders=encoders, kind=kind, known=cached.info))
    return cached


def prepare(
    config: Config,
    encoders: Encoders,
    device: torch.device,
    out: Path,
    *,
    scorer: Scorer | None = None,
    batch: int = 8,
) -> CacheInfo:
    """Turn the pairs of ``data.pairs`` into a cache at ``out``; where there is one that serves, that is returned.

    scorer: scores the pairs without stored rewards (default: the one that data.scorer names, on ``device``).
    batch: pairs handled, and pictures in a call of the VAE, at a time.
    Raises SettingsError for unreadable data, an ``out`` that holds something else, and when no pair is usable.
    """
    if cache.exists(out):
        cached = open_cache(config, out, encoders=encoders.identity, kind=encoders.kind)
        print0(f"{out}: prepared already, {len(cached)} pairs")
        return cached.info
    path = data.source_path(config.data.pairs)
    if config.data.scorer and scorer is None:
        scorer = load_scorer(config.data.scorer, device)
    _check_preference(data.columns(path), path, scorer)

    began = time.monotonic()
    source = _source(config.data.pairs, None)
    identity = _identity(config, source, encoders.identity, encoders.kind)
    with CacheWriter(out, identity, source, shard_bytes=cache.SHARD_BYTES) as writer:
        done = writer.next_row
        if done:
            print0(f"{out}: going on with an interrupted preparation after row {done - 1}")
        _store_pairs(config, path, _Kitchen(encoders, scorer, writer, config.data.flip, batch))
        if not writer.entries:
            raise SettingsError(f"data.pairs: no usable pair in {path}: {_listed(writer.rejected)}")
        _store_prompts(encoders, writer)
        info = writer.finish(_counts(writer))
        _summarise(info, writer, encoders, done, time.monotonic() - began)
    return info


class _Kitchen:
    """What happens to decoded pairs: scored, encoded, written."""

    def __init__(self, encoders: Encoders, scorer: Scorer | None, writer: CacheWriter, flip: bool, batch: int) -> None:
        self.encoders, self.scorer, self.writer, self.flip, self.batch = encoders, scorer, writer, flip, batch

    def take(self, group: list[_Decoded]) -> None:
        group = self._with_scores(group)
        moments = self._encode(group)
        for item, found in zip(group, moments, strict=True):
            pair = item.pair
            try:
                if found is None:
                    raise Unstorable("the VAE gave NaN or infinity")
                entry = Entry(pair.row, pair.uid, pair.prompt, pair.rewards, pair.label, item.scored)
                self.writer.add(entry, *found)
            except Unstorable as error:
                self.writer.reject(pair.row, pair.uid, f"latents: {error}")
        self.writer.commit()

    def _with_scores(self, group: list[_Decoded]) -> list[_Decoded]:
        """The pairs, with rewards for those that had none and whose pictures were kept for it."""
        todo = [item for item in group if item.pictures is not None]
        if self.scorer is None or not todo:
            return group
        scores = self.scorer(
            [picture for item in todo for picture in item.pictures or ()],
            [item.pair.prompt for item in todo for _ in range(2)],
        ).reshape(-1, 2)
        rewards = dict(zip((item.pair.row for item in todo), scores.tolist(), strict=True))
        kept = []
        for item in group:
            pair = item.pair
            found = rewards.get(pair.row)
            if found is None:
                kept.append(item)
            elif np.isfinite(found).all():
                kept.append(replace(item, pair=replace(pair, rewards=(found[0], found[1])), pictures=None, scored=True))
            else:
                self.writer.reject(pair.row, pair.uid, f"{BAD_SCORE}: {found[0]:g}, {found[1]:g}")
        return kept

    def _encode(self, group: list[_Decoded]) -> list[tuple[Tensor, Tensor] | None]:
        """Mean and std [2, F, C, H, W] of each pair; None where the VAE cannot encode it."""
        if not group:
            return []
        squares = torch.from_numpy(np.stack([item.squares for item in group]))  # [n, 2, R, R, 3]
        views = [squares, squares.flip(3)] if self.flip else [squares]
        pixels = torch.stack(views, dim=2).permute(0, 1, 2, 5, 3, 4).float() / 127.5 - 1  # [n, 2, F, 3, R, R]
        try:
            return list(self._encode_pixels(pixels))
        except FloatingPointError:  # some picture of the group: find out which
            return [self._encode_alone(one) for one in pixels]

    def _encode_alone(self, pixels: Tensor) -> tuple[Tensor, Tensor] | None:
        try:
            return next(self._encode_pixels(pixels[None]))
        except FloatingPointError:
            return None

    def _encode_pixels(self, pixels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        parts = [self.encoders.encode_images(part) for part in pixels.flatten(0, 2).split(self.batch)]
        mean, std = (torch.cat([p.float().cpu() for p in both]) for both in zip(*parts, strict=True))
        shape = (*pixels.shape[:3], *mean.shape[1:])
        return zip(mean.reshape(shape), std.reshape(shape), strict=True)


def _store_pairs(config: Config, path: Path, kitchen: _Kitchen) -> None:
    writer, limit = kitchen.writer, config.data.max_pairs
    rows = data.read_pairs(path, max_pairs=limit, start=writer.next_row)
    total = data.count_rows(path, max_pairs=limit)
    group: list[_Decoded] = []
    with tqdm(total=total, initial=writer.next_row, unit="pair", desc="pairs", mininterval=0.5) as bar:
        for item in _decoded(rows, config.data.resolution, kitchen.scorer is not None):
            if isinstance(item, Rejected):
                writer.reject(item.row, item.uid, item.reason)
                bar.update()
                continue
            group.append(item)
            if len(group) == kitchen.batch:
                first = not writer.entries
                kitchen.take(group)
                bar.update(len(group))
                group = []
                if first:
                    _check_space(writer, total)
        kitchen.take(group)
        bar.update(len(group))
    writer.flush()


def _decoded(rows: Iterator[RawPair | Rejected], resolution: int, scoring: bool) -> Iterator[_Decoded | Rejected]:
    """Decode in threads (Pillow lets go of the interpreter), a bounded number ahead, in order."""
    workers = min(8, os.cpu_count() or 1)
    waiting: deque[Future[_Decoded | Rejected]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in rows:
                waiting.append(pool.submit(_decode, item, resolution, scoring))
                if len(waiting) > 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _decode(item: RawPair | Rejected, resolution: int, scoring: bool) -> _Decoded | Rejected:
    if isinstance(item, Rejected):
        return item
    scored_later = scoring and item.rewards is None
    if item.rewards is None and item.label is None and not scoring:
        return Rejected(item.row, item.uid, f"{NO_PREFERENCE}: neither rewards nor a human label (null or NaN)")
    pictures = []
    for name, raw in zip(("jpg_0", "jpg_1"), item.images, strict=True):
        try:
            pictures.append(data.decode(raw))
        except data.BadPicture as error:
            return Rejected(item.row, item.uid, f"{name} {error}")
    squares = np.stack([data.to_square(picture, resolution) for picture in pictures])
    if np.array_equal(squares[0], squares[1]):
        return Rejected(item.row, item.uid, "the same picture twice: there is nothing to prefer")
    return _Decoded(item, squares, (pictures[0], pictures[1]) if scored_later else None)


def _store_prompts(encoders: Encoders, writer: CacheWriter) -> None:
    prompts = writer.prompts()
    with tqdm(total=len(prompts), unit="prompt", desc="prompts", mininterval=0.5) as bar:
        for start in range(0, len(prompts), _PROMPT_SHARD):
            shard = prompts[start : start + _PROMPT_SHARD]
            parts = []
            for i in range(0, len(shard), _PROMPT_BATCH):
                embeds, pooled = encoders.encode_prompts(shard[i : i + _PROMPT_BATCH])
                parts.append((embeds.cpu(), None if pooled is None else pooled.cpu()))
                bar.update(len(embeds))
            vectors = [p for _, p in parts if p is not None]
            writer.add_prompts(torch.cat([e for e, _ in parts]), torch.cat(vectors) if vectors else None)


def _identity(config: Config, source: Mapping[str, Any], encoders: str, kind: str) -> dict[str, Any]:
    return {
        "source": source["sha256"],
        "max_pairs": config.data.max_pairs,
        "kind": kind,
        "encoders": encoders,
        "resolution": config.data.resolution,
        "flip": config.data.flip,
        "scorer": scorer_identity(config.data.scorer),
    }


def _source(pairs: str, known: CacheInfo | None) -> dict[str, Any]:
    """What identifies the source: ``pairs`` as given, and size, time and sha256 of its files."""
    recorded = known.source if known is not None else {}
    try:
        path = data.source_path(pairs)
    except SettingsError:
        if recorded.get("pairs") != pairs:
            raise
        print0(f"data.pairs: {pairs} is not here; the cache was made from a file of that name and is used as it is")
        return dict(recorded)
    before = {file["name"]: file for file in recorded.get("files", [])}
    facts = [_file_facts(file, before.get(file.name, {})) for file in data.files(path)]
    hashes = [file["sha256"] for file in facts]
    whole = hashes[0] if len(hashes) == 1 else cache.combined(hashes)
    return {"pairs": pairs, "sha256": whole, "files": facts}


def _file_facts(file: Path, before: Mapping[str, Any]) -> dict[str, Any]:
    stat = file.stat()
    if before.get("bytes") == stat.st_size and before.get("mtime_ns") == stat.st_mtime_ns:
        return dict(before)
    return {"name": file.name, "mtime_ns": stat.st_mtime_ns, **cache.file_facts(file)}


def _check_preference(columns: set[str], path: Path, scorer: Scorer | None) -> None:
    wanted = {*data.LABEL_COLUMNS, *(name for names in data.REWARD_COLUMNS for name in names)}
    if scorer is None and not columns & wanted:
        raise SettingsError(
            f"data.pairs: {path} has neither labels (label_0) nor rewards (reward_0, reward_1), and data.scorer is "
            "empty: give data.scorer to have the pictures scored"
        )


def _check_space(writer: CacheWriter, total: int) -> None:
    """Say early when the disk will not hold the cache. It can be made room on, and the preparation taken up."""
    need, free = writer.pair_bytes * (total - writer.next_row), shutil.disk_usage(writer.folder).free
    if need > free:
        warn0(f"about {need / 1e9:.1f} GB are needed at {writer.folder.parent}, where {free / 1e9:.1f} GB are free")


def _counts(writer: CacheWriter) -> dict[str, int]:
    scored = sum(entry.scored for entry in writer.entries)
    stored = sum(entry.rewards is not None for entry in writer.entries) - scored
    hanging = sum(reason.startswith((NO_PREFERENCE, BAD_SCORE)) for _, _, reason in writer.rejected)
    return {"stored": stored, "scored": scored, "unrewarded": len(writer.entries) - stored + hanging}


def _listed(rejected: Sequence[tuple[int, str, str]]) -> str:
    """Reasons with their counts and first rows."""
    kinds = Counter(reason.partition(":")[0] for _, _, reason in rejected)
    rows = {kind: [str(row) for row, _, reason in rejected if reason.partition(":")[0] == kind][:5] for kind in kinds}
    return "; ".join(
        f"{count} x {kind} (row {', '.join(rows[kind])}{', ..' if count > 5 else ''})"
        for kind, count in kinds.most_common()
    )


def _summarise(info: CacheInfo, writer: CacheWriter, encoders: Encoders, done: int, seconds: float) -> None:
    counts = info.counts
    total = counts["pairs"] + counts["rejected"]
    print0(f"{info.root}: {counts['pairs']} of {total} pairs, {info.bytes / 1e6:.1f} MB, {seconds:.0f} s")
    if writer.rejected:
        print0(f"  rejected {counts['rejected']}: {_listed(writer.rejected)}")
    longer = encoders.truncated(writer.prompts())
    cut = f", {longer} longer than the text encoders read (cut)" if longer else ""
    print0(f"  prompts: {counts['prompts'] - 1} distinct and the empty one{cut}")
    labelled = sum(entry.label is not None for entry in writer.entries)
    scale = "" if info.rewards is None else f", {info.rewards[0]:.6g} .. {info.rewards[1]:.6g}"
    print0(
        f"  rewards: {counts['stored']} pairs stored, {counts['scored']} scored{scale}; human labels: {labelled} pairs"
    )
    if counts["stored"] and counts["scored"]:
        warn0("stored rewards and those of data.scorer are normalised together: are they of one reward model?")
