"""The stages of preparing a cache: read, decode, score, encode, write."""

from __future__ import annotations

import os
import shutil
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from smpo_fast.common.errors import UserError
from smpo_fast.common.runtime import World, print0, warn0
from smpo_fast.config.schema import Config
from smpo_fast.data import aspect_buckets, images
from smpo_fast.data.aspect_buckets import Frame, Size
from smpo_fast.data.cache.format import LATENTS_PART, SURVEY_PART, Entry, Unstorable
from smpo_fast.data.cache.identity import visited
from smpo_fast.data.cache.writer import CacheWriter, PairsPart
from smpo_fast.data.images import BadImage
from smpo_fast.data.pairs import reader, rules
from smpo_fast.data.pairs.pair import RawPair, Rejected
from smpo_fast.data.rewards.score_table import Sidecar
from smpo_fast.data.rewards.scorers import Scorer

if TYPE_CHECKING:
    from PIL.Image import Image


SHARD_BYTES = 128 << 20
PART_ROWS = 1024  # in a part of the work, at most
_SKIP_ROWS = 256  # so many rows are read over; beyond that the table is opened anew further down


class Encoders(Protocol):
    """What is asked of the networks (smpo_fast.model.Encoders)."""

    kind: str  # "sdxl" | "sd15"
    identity: str
    channels: int  # of a latent
    factor: int  # px of a picture to one of its latent

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]: ...

    def encode_prompts(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]: ...

    def truncated(self, prompts: Sequence[str]) -> int: ...


def _chunks(rows: Sequence[int], size: int) -> list[Sequence[int]]:
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def _encode(
    writer: CacheWriter, kitchen: _Kitchen, path: Path, chunks: Sequence[Sequence[int]],
    known: Mapping[int, Entry] | None = None,
) -> None:  # fmt: skip
    """Latents of some rows, a part a chunk. known: what a survey said of them."""
    _forecast_size(writer, kitchen, chunks)
    with kitchen.serving(path, "pairs", chunks, lambda: writer.done(LATENTS_PART, len(chunks))) as table:
        writer.share(
            LATENTS_PART, len(chunks), lambda i: kitchen.cook(table, writer.pairs(i), i, encode=True, known=known)
        )


def _survey_and_encode(config: Config, writer: CacheWriter, kitchen: _Kitchen, path: Path, rows: range) -> None:
    """Look at all rows, then encode those that the run will visit: it sees what it would see with a whole cache.

    A pair that turns out not to be encodable leaves the order, which changes the pairs that are visited: once more.
    """
    looks = _chunks(rows, PART_ROWS)
    with kitchen.serving(path, "survey", looks, lambda: writer.done(SURVEY_PART, len(looks))) as table:
        writer.share(
            SURVEY_PART, len(looks), lambda i: kitchen.cook(table, writer.pairs(i, SURVEY_PART), i, encode=False)
        )
    chunks: list[Sequence[int]] = []
    while True:
        entries = [entry for entry, *_ in writer.entries()]
        if not entries:
            return
        tried = {row for chunk in chunks for row in chunk}
        wanted = [row for row in _visited_rows(config, entries) if row not in tried]
        if not wanted:
            return
        print0(f"the run visits {len(wanted) + len(tried)} of {len(entries)} usable pairs")
        chunks += _chunks(wanted, kitchen.pairs_per_shard)
        _encode(writer, kitchen, path, chunks, {entry.row: entry for entry in entries})


def _visited_rows(config: Config, entries: Sequence[Entry]) -> list[int]:
    kinds = {size: i for i, size in enumerate(sorted({entry.pixels for entry in entries}))}
    rewards = np.array([entry.rewards or (np.nan, np.nan) for entry in entries])
    labels = np.array([np.nan if entry.label is None else entry.label for entry in entries])
    shapes = np.array([kinds[entry.pixels] for entry in entries])
    return [entries[i].row for i in visited(config, rewards, labels, shapes)]


@dataclass(frozen=True)
class _Decoded:
    pair: RawPair
    size: Size  # of the pixels
    pixels: np.ndarray  # uint8 [2, H, W, 3]
    frames: tuple[Frame, Frame]
    pictures: tuple[Image, Image] | None  # whole, where they must be scored
    scored: bool = False


class _Table:
    """Rows of the pair table in ascending chunks; neighbouring ones are read in one go."""

    def __init__(self, path: Path, scores: Sidecar | None) -> None:
        self._path, self._scores, self._next = path, scores, -1
        self._rows: Iterator[RawPair | Rejected] = iter(())

    def read(self, rows: Sequence[int]) -> Iterator[RawPair | Rejected]:
        """The rows of a chunk."""
        if not rows:
            return
        if not 0 <= rows[0] - self._next <= _SKIP_ROWS or self._next < 0:
            found = reader.read_pairs(self._path, start=rows[0])
            self._rows, self._next = self._scores.rewarded(found) if self._scores else found, rows[0]
        wanted = rows if isinstance(rows, range) else set(rows)
        for item in self._rows:
            self._next = item.row + 1
            if item.row in wanted:
                yield item
            if item.row >= rows[-1]:
                return


class _Kitchen:
    """What happens to rows: read, decoded, scored, encoded, written. One process's share of the work."""

    def __init__(self, config: Config, encoders: Encoders, scorer: Scorer | None, batch: int, world: World) -> None:
        self.encoders, self.scorer, self.batch, self.world = encoders, scorer, batch, world
        self.scores = Sidecar(Path(config.data.scores)) if config.data.scores else None
        side = config.data.resolution
        self.flip, self.square = config.data.flip, (side, side)
        self.shapes = aspect_buckets.buckets(side) if config.data.buckets else (self.square,)
        self.strict = config.data.strict
        self._workers = min(8, os.cpu_count() or 1)
        self._known: Mapping[int, Entry] = {}

    @property
    def pair_bytes(self) -> int:
        """Size of a pair's latents on disk; with buckets at most so much."""
        height, width = (side // self.encoders.factor for side in self.square)
        return 2 * 2 * (1 + self.flip) * self.encoders.channels * height * width * 2  # mean and std, two bytes a number

    @property
    def pairs_per_shard(self) -> int:
        return max(1, min(PART_ROWS, SHARD_BYTES // self.pair_bytes))

    @contextmanager
    def serving(
        self, path: Path, what: str, chunks: Sequence[Sequence[int]], done: Callable[[], list[bool]]
    ) -> Iterator[_Table]:
        """A bar over the rows of all processes and a pool of decoders, for as long as a kind of parts is done."""
        self._chunks, self._done, self._forecast = chunks, done, _Forecast(self.world.size)
        total = sum(map(len, chunks))
        with (
            ThreadPoolExecutor(self._workers) as self._pool,
            tqdm(total=total, unit="pair", desc=what, mininterval=0.5, disable=self.world.rank != 0) as self._bar,
        ):
            yield _Table(path, self.scores)
            self._move_bar(total)

    def cook(
        self, table: _Table, part: PairsPart, number: int, *, encode: bool, known: Mapping[int, Entry] | None = None
    ) -> dict[str, Any]:
        """Do a part, from where it was left; returns its note."""
        self._known = known or {}
        rows = self._chunks[number]
        todo = rows[bisect_left(rows, part.next_row) :]
        finished = sum(len(rows) for rows, done in zip(self._chunks, self._done(), strict=True) if done)
        self._move_bar(finished + len(rows) - len(todo))
        group: list[_Decoded | Rejected] = []
        for item in self._decoded(table.read(todo)):
            group.append(item)
            self._bar.update()
            if sum(isinstance(item, _Decoded) for item in group) == self.batch:
                self._take(part, group, encode)
                group = []
        if group:
            self._take(part, group, encode)
        return part.close()

    def _move_bar(self, rows: int) -> None:
        self._bar.update(max(0, rows - self._bar.n))

    def _take(self, part: PairsPart, items: list[_Decoded | Rejected], encode: bool) -> None:
        for item in items:
            if isinstance(item, Rejected):
                self._reject(part, item.row, item.uid, item.reason)
        group = self._with_scores(part, [item for item in items if isinstance(item, _Decoded)])
        for item, found in zip(group, self._encode(group) if encode else [()] * len(group), strict=True):
            pair = item.pair
            try:
                if found is None:
                    raise Unstorable("the VAE gave NaN or infinity")
                part.add(self._entry(item), *found)
            except Unstorable as error:
                self._reject(part, pair.row, pair.uid, f"latents: {error}")
        last = items[-1]
        part.commit((last.row if isinstance(last, Rejected) else last.pair.row) + 1)
        if encode:
            self._forecast.note(len(items), self._bar)

    def _reject(self, part: PairsPart, row: int, uid: str, reason: str) -> None:
        if self.strict:
            raise _strictly([(row, uid, reason)])
        part.reject(row, uid, reason)

    def _entry(self, item: _Decoded) -> Entry:
        pair = item.pair
        if pair.row in self._known:
            return self._known[pair.row]
        return Entry(pair.row, pair.uid, pair.prompt, pair.rewards, pair.label, item.scored, item.size, item.frames)

    def _with_scores(self, part: PairsPart, group: list[_Decoded]) -> list[_Decoded]:
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
            elif reason := rules.no_finite_score(*found):
                self._reject(part, pair.row, pair.uid, reason)
            else:
                kept.append(replace(item, pair=replace(pair, rewards=(found[0], found[1])), pictures=None, scored=True))
        return kept

    def _encode(self, group: list[_Decoded]) -> list[tuple[Tensor, Tensor] | None]:
        """Mean and std [2, F, C, H, W] of each pair; None where the VAE cannot encode it."""
        found: dict[int, tuple[Tensor, Tensor] | None] = {}
        for _, same in groupby(sorted(group, key=lambda item: item.size), key=lambda item: item.size):
            items = list(same)
            found |= zip((item.pair.row for item in items), self._encode_alike(items), strict=True)
        return [found[item.pair.row] for item in group]

    def _encode_alike(self, group: list[_Decoded]) -> list[tuple[Tensor, Tensor] | None]:
        squares = torch.from_numpy(np.stack([item.pixels for item in group]))  # [n, 2, H, W, 3]
        views = [squares, squares.flip(3)] if self.flip else [squares]
        pixels = torch.stack(views, dim=2).permute(0, 1, 2, 5, 3, 4).float() / 127.5 - 1  # [n, 2, F, 3, H, W]
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
        pieces = [self.encoders.encode_images(part) for part in pixels.flatten(0, 2).split(self.batch)]
        mean, std = (torch.cat([p.float().cpu() for p in both]) for both in zip(*pieces, strict=True))
        shape = (*pixels.shape[:3], *mean.shape[1:])
        return zip(mean.reshape(shape), std.reshape(shape), strict=True)

    def _decoded(self, rows: Iterator[RawPair | Rejected]) -> Iterator[_Decoded | Rejected]:
        """Decode in threads (Pillow lets go of the interpreter), a bounded number ahead, in order."""
        waiting: deque[Future[_Decoded | Rejected]] = deque()
        try:
            for item in rows:
                waiting.append(self._pool.submit(self._decode, item))
                if len(waiting) > 4 * self._workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def _decode(self, item: RawPair | Rejected) -> _Decoded | Rejected:
        if isinstance(item, Rejected):
            return item
        if self.scorer is None and (reason := rules.no_preference(item.label, item.rewards)):
            return Rejected(item.row, item.uid, reason)
        both = []
        for name, raw in zip(("jpg_0", "jpg_1"), item.images, strict=True):
            try:
                both.append(images.decode(raw))
            except BadImage as error:
                return Rejected(item.row, item.uid, f"{name} {error}")
        size = aspect_buckets.choose(self.shapes, [(picture.height, picture.width) for picture in both])
        (zero, frame_0), (one, frame_1) = (aspect_buckets.fit(picture, size) for picture in both)
        if reason := rules.same_image(zero, one):
            return Rejected(item.row, item.uid, reason)
        unscored = self.scorer is not None and item.rewards is None and item.row not in self._known
        kept = (both[0], both[1]) if unscored else None
        return _Decoded(item, size, np.stack([zero, one]), (frame_0, frame_1), kept)


class _Forecast:
    """Says once how long the work will take, from its second group of pairs on: the first one warms up."""

    def __init__(self, processes: int) -> None:
        self._processes, self._began, self._said = processes, 0.0, False

    def note(self, rows: int, bar: tqdm) -> None:
        """So many rows have been done since the last call."""
        now = time.monotonic()
        if self._began and not self._said:
            rate, left = rows / max(1e-9, now - self._began), (bar.total or 0) - bar.n
            if left > 0:
                print0(
                    f"time: about {_duration(left / rate / self._processes)} for the remaining {left} rows, at "
                    f"{rate:.2f} a second in each of {self._processes} processes (measured)"
                )
            self._said = True
        self._began = now


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"


def _forecast_size(writer: CacheWriter, kitchen: _Kitchen, chunks: Sequence[Sequence[int]]) -> None:
    """Say what the latents will take, before the first is made, and when the disk will not hold them.

    Room can be made and the preparation taken up, so that is no error.
    """
    total = sum(map(len, chunks))
    left = sum(len(rows) for rows, done in zip(chunks, writer.done(LATENTS_PART, len(chunks)), strict=True) if not done)
    if left < total:
        print0(f"{writer.root}: going on with an interrupted preparation: {total - left} of {total} rows are done")
    most = " at most" if len(kitchen.shapes) > 1 else ""
    print0(
        f"size: {total} rows x {kitchen.pair_bytes} bytes = {total * kitchen.pair_bytes / 1e9:.3f} GB of latents{most}"
        ", less what is rejected"
    )
    need, free = kitchen.pair_bytes * left, shutil.disk_usage(writer.folder).free
    if need > free:
        warn0(f"about {need / 1e9:.1f} GB are needed at {writer.folder.parent}, where {free / 1e9:.1f} GB are free")


def _strictly(rejected: Sequence[tuple[int, str, str]]) -> UserError:
    row, uid, reason = rejected[0]
    return UserError(
        f"data.strict: row {row} of data.pairs ({uid}) cannot be used: {reason}. Mend it; without data.strict "
        "such rows are left out, counted and listed in rejected.parquet"
    )


def _listed(rejected: Sequence[tuple[int, str, str]]) -> str:
    """Reasons with their counts and first rows."""
    kinds = Counter(rules.reason_kind(reason) for _, _, reason in rejected)
    rows = {kind: [str(row) for row, _, reason in rejected if rules.reason_kind(reason) == kind][:5] for kind in kinds}
    return "; ".join(
        f"{count} x {kind} (row {', '.join(rows[kind])}{', ..' if count > 5 else ''})"
        for kind, count in kinds.most_common()
    )
