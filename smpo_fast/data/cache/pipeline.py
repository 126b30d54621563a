"""One process's share of preparing a cache: running rows through the stages, and encoding prompts, part by part."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from smpo_fast.common.console import printable
from smpo_fast.common.errors import DataError
from smpo_fast.common.pools import map_ahead
from smpo_fast.common.runtime import World, print0
from smpo_fast.config.schema import Config
from smpo_fast.data import aspect_buckets
from smpo_fast.data.cache import stages
from smpo_fast.data.cache.format import LATENTS_PART, PROMPTS_PART, SURVEY_PART, Entry
from smpo_fast.data.cache.progress import Progress, announce_size
from smpo_fast.data.cache.stages import DecodedPair, Decoder, Encoders, Reader
from smpo_fast.data.cache.visits import visited
from smpo_fast.data.cache.writer import CacheWriter
from smpo_fast.data.pairs.pair import Rejected
from smpo_fast.data.rewards.score_table import ScoreTable
from smpo_fast.data.rewards.scorers import Scorer

SHARD_BYTES = 128 << 20  # of latents, about
PART_ROWS = 1024  # at most
PROMPT_SHARD = 512  # prompts; 160 MB of SDXL embeddings
PROMPT_BATCH = 32

Chunks = Sequence[Sequence[int]]  # the rows of each part


class Pipeline:
    """Runs the rows of a pair table through the stages of ``smpo_fast.data.cache.stages``.

    path: of the pair table.  batch: pairs handled, and at most so many images in a call of the VAE, at a time.
    """

    def __init__(
        self, config: Config, path: Path, encoders: Encoders, scorer: Scorer | None, batch: int, world: World
    ) -> None:
        self.config, self.encoders, self.scorer, self.batch, self.world = config, encoders, scorer, batch, world
        side = config.data.resolution
        self.sizes = aspect_buckets.buckets(side) if config.data.buckets else ((side, side),)
        self._workers = min(8, os.cpu_count() or 1)
        scores = ScoreTable(Path(config.data.scores)) if config.data.scores else None
        self._reader = Reader(path, scores)

    @property
    def pair_bytes(self) -> int:
        """Size of a pair's latents on disk; with aspect-ratio buckets an upper bound."""
        side = self.config.data.resolution // self.encoders.factor
        numbers = 2 * (1 + self.config.data.flip) * self.encoders.channels * side * side
        return 2 * numbers * 2  # mean and std, two bytes a number

    def encode_all(self, writer: CacheWriter, rows: range) -> None:
        """Encode all rows. Raises DataError for a rejected row with ``data.strict``."""
        self._encode(writer, chunked(rows, self._pairs_per_shard()), ())

    def survey_and_encode(self, writer: CacheWriter, rows: range) -> None:
        """Decode and score all rows, then encode those that the run will visit. Raises DataError with ``data.strict``.

        The run thus visits the same pairs as with a whole cache. A pair that turns out not to be encodable is
        rejected, which changes the order of visits, so this is repeated until all visited pairs are encoded.
        """
        self._do_parts(writer, SURVEY_PART, chunked(rows, PART_ROWS), ())
        chunks: list[Sequence[int]] = []
        while True:
            entries = [entry for entry, *_ in writer.entries()]
            if not entries:
                return
            tried = {row for chunk in chunks for row in chunk}
            wanted = [row for row in self._visited_rows(entries) if row not in tried]
            if not wanted:
                return
            print0(f"the run visits {len(wanted) + len(tried)} of {len(entries)} usable pairs")
            chunks += chunked(wanted, self._pairs_per_shard())
            self._encode(writer, chunks, {entry.row for entry in entries})

    def encode_prompts(self, writer: CacheWriter) -> None:
        """Encode the distinct prompts of the pairs."""
        texts = writer.texts()
        shards = chunked(texts, PROMPT_SHARD)

        def do(number: int) -> dict[str, Any]:
            prompts, part = shards[number], writer.prompts(number)
            for group in chunked(prompts[part.done :], PROMPT_BATCH):
                embeds, pooled = self.encoders.encode_prompts(group)
                part.add(embeds.cpu(), None if pooled is None else pooled.cpu())
                bar.update(len(embeds))
            return part.close()

        hide = self.world.rank != 0
        with tqdm(total=len(texts), unit="prompt", desc="prompts", mininterval=0.5, disable=hide) as bar:
            writer.do_parts(PROMPTS_PART, len(shards), do)
            bar.update(len(texts) - bar.n)

    def _encode(self, writer: CacheWriter, chunks: Chunks, surveyed: Collection[int]) -> None:
        finished = writer.finished(LATENTS_PART, len(chunks))
        left = sum(len(rows) for rows, done in zip(chunks, finished, strict=True) if not done)
        total, bound = sum(map(len, chunks)), len(self.sizes) > 1
        announce_size(writer.root, writer.folder, total=total, left=left, pair_bytes=self.pair_bytes, at_most=bound)
        self._do_parts(writer, LATENTS_PART, chunks, surveyed)

    def _do_parts(self, writer: CacheWriter, kind: str, chunks: Chunks, surveyed: Collection[int]) -> None:
        """Do parts of one kind, one per chunk. surveyed: rows that a survey has scored."""
        encode, total = kind == LATENTS_PART, sum(map(len, chunks))
        decoder = Decoder(self.sizes, self.scorer is not None, surveyed)

        def do(number: int) -> dict[str, Any]:
            rows, part = chunks[number], writer.pairs(number, kind)
            todo = rows[bisect_left(rows, part.next_row) :]
            finished = writer.finished(kind, len(chunks))
            elsewhere = sum(len(rows) for rows, done in zip(chunks, finished, strict=True) if done)
            progress.move_to(elsewhere + len(rows) - len(todo))
            with closing(
                map_ahead(decoder, self._reader.read(todo), self._workers, ahead=4 * self._workers)
            ) as decoded:
                for group in _groups(decoded, self.batch):
                    scored = stages.score(group, self.scorer)
                    done = self._encode_group(scored) if encode else stages.without_latents(scored)
                    for rejected in stages.write(done, part):
                        if self.config.data.strict:
                            raise strict_error(rejected.row, rejected.uid, rejected.reason)
                    part.commit(group[-1].row + 1)
                    progress.advance(len(group))
            return part.close()

        with Progress("pairs" if encode else "survey", total, self.world, forecast=encode) as progress:
            writer.do_parts(kind, len(chunks), do)
            progress.move_to(total)

    def _encode_group(self, rows: Sequence[DecodedPair | Rejected]) -> list[stages.EncodedPair | Rejected]:
        return stages.encode(rows, self.encoders, flip=self.config.data.flip, batch=self.batch)

    def _pairs_per_shard(self) -> int:
        return max(1, min(PART_ROWS, SHARD_BYTES // self.pair_bytes))

    def _visited_rows(self, entries: Sequence[Entry]) -> list[int]:
        kinds = {size: i for i, size in enumerate(sorted({entry.pixels for entry in entries}))}
        rewards = np.array([entry.rewards or (np.nan, np.nan) for entry in entries])
        labels = np.array([np.nan if entry.label is None else entry.label for entry in entries])
        shapes = np.array([kinds[entry.pixels] for entry in entries])
        return [entries[i].row for i in visited(self.config, rewards, labels, shapes)]


def plan(config: Config, batch: int) -> dict[str, Any]:
    """How the work is divided into parts, on which all processes must agree."""
    division: dict[str, Any] = {"shard_bytes": SHARD_BYTES, "batch": batch}
    if config.data.only_visited:
        division |= {"seed": config.run.seed, "steps": config.run.steps, "pairs": config.drawn_per_step}
        division |= {"labels": config.labels.model_dump()}
    return division


def strict_error(row: int, uid: str, reason: str) -> DataError:
    """The error for a row that cannot be used, with ``data.strict``."""
    return DataError(
        f"data.strict: row {row} of data.pairs ({printable(uid)}) cannot be used: {printable(reason)}. Correct it; "
        "without data.strict, such rows are left out, counted, and listed in rejected.parquet"
    )


def chunked(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """The items in chunks of ``size``; the last one may be shorter."""
    return [items[first : first + size] for first in range(0, len(items), size)]


def _groups(rows: Iterable[DecodedPair | Rejected], size: int) -> Iterator[list[DecodedPair | Rejected]]:
    """Rows in groups of ``size`` decoded pairs, with the rejected rows between them."""
    group: list[DecodedPair | Rejected] = []
    for row in rows:
        group.append(row)
        if sum(isinstance(member, DecodedPair) for member in group) == size:
            yield group
            group = []
    if group:
        yield group
