"""One process's share of scoring a pair table: hash all rows, score the distinct images, write the score table.

The work is divided into parts of PART_ROWS rows, which any number of processes share. First all rows are hashed, so
that an image that occurs in several pairs with the same prompt is scored once; then the distinct images are scored.
What a process has finished survives a kill (smpo_fast.common.shared_work).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from tqdm import tqdm

from smpo_fast.common.console import printable
from smpo_fast.common.errors import DataError
from smpo_fast.common.pools import map_ahead
from smpo_fast.common.runtime import World
from smpo_fast.common.shared_work import AlreadyFinished, SharedWork
from smpo_fast.data import images
from smpo_fast.data.images import BadImage
from smpo_fast.data.pairs import reader
from smpo_fast.data.pairs.pair import RawPair, Rejected
from smpo_fast.data.pairs.rules import no_finite_score, reason_kind
from smpo_fast.data.rewards import half_precision, score_table
from smpo_fast.data.rewards.combination import combine
from smpo_fast.data.rewards.score_table import KEY
from smpo_fast.data.rewards.scorers import Scorer, load_scorer, terms

if TYPE_CHECKING:
    from PIL.Image import Image

PART_ROWS = 1024
_INDEX, _SCORES, _HALF, _FINISH = "index", "scores", "half-00000", "finish-00000"  # parts
_ROW = np.dtype([("row", "<i8"), ("label", "<f8"), ("keys", KEY, 2)])
_T = TypeVar("_T")


@dataclass(frozen=True)
class _Task:
    """An image to be scored: its place in the table, and its key."""

    row: int
    side: int
    key: bytes


class ScoringWork:
    """The share of one process. See ``scoring.score`` for the options."""

    def __init__(
        self, path: Path, shared: SharedWork, world: World, *,
        scorer: str, batch: int, half: bool, max_pairs: int, made_from: dict[str, Any],
    ) -> None:  # fmt: skip
        self.path, self.shared, self.world, self.made_from = path, shared, world, made_from
        self.scorer, self.batch, self.half = scorer, batch, half
        self.names = [name for _, name in terms(scorer)]
        self.rows = reader.count_rows(path, max_pairs=max_pairs)
        self.parts = -(-self.rows // PART_ROWS)

    def run(self) -> None:
        """Do parts of the work until all of it is complete, here or in other processes.

        Raises DataError if no pair can be scored or the table changes meanwhile, AlreadyFinished if another process
        has published the scores.
        """
        try:
            if not self.shared.is_finished(_FINISH):
                self._do_parts(_INDEX, self._index_part)
                if self.half:
                    self.shared.do_parts([_HALF], self._compare_half)
                    half_precision.report(self.shared.manifest(_HALF))
                with self._progress_bar() as self._progress:
                    self._do_parts(_SCORES, self._score_part)
            self.shared.do_parts([_FINISH], self._finish)
        except FileNotFoundError as error:
            if self.shared.folder.is_dir() and not self.shared.is_finished(_FINISH):
                raise
            raise AlreadyFinished from error

    def _do_parts(self, kind: str, do: Callable[[str], dict[str, Any]]) -> None:
        """Do all parts of a kind. Each process begins at another part, so that they rarely wait for each other."""
        names = [_part_name(kind, i) for i in range(self.parts)]
        first = self.world.rank * self.parts // self.world.size
        self.shared.do_parts([*names[first:], *names[:first]], do)

    def _progress_bar(self) -> tqdm:
        """Counts this process's own images; the total is known only if it works alone."""
        total = len(self._tasks) if self.world.size == 1 else None
        return tqdm(total=total, unit="image", desc="score", mininterval=0.5, disable=self.world.rank != 0)

    # --- the distinct images --------------------------------------------------------------------------------------

    def _index_part(self, name: str) -> dict[str, Any]:
        """Hash the images of a part's rows."""
        found, rejected = [], []
        for item in self._rows_of(name):
            if isinstance(item, Rejected):
                rejected.append([item.row, item.uid, item.reason])
            else:
                label = np.nan if item.label is None else item.label
                found.append((item.row, label, score_table.keys_of(item)))
        return {**self.shared.keep(name, np.array(found, _ROW).tobytes()), "rejected": rejected}

    def _rows_of(self, name: str) -> Iterator[RawPair | Rejected]:
        first = _first_row(name)
        return reader.read_pairs(self.path, start=first, max_pairs=min(first + PART_ROWS, self.rows))

    @cached_property
    def _index(self) -> np.ndarray:
        """The usable rows of the table: _ROW [N]."""
        kept = [np.fromfile(self.shared.kept(_part_name(_INDEX, i)), _ROW) for i in range(self.parts)]
        return np.concatenate([np.zeros(0, _ROW), *kept])

    @cached_property
    def _distinct(self) -> tuple[np.ndarray, np.ndarray]:
        """Where each distinct image first occurs in the flat keys [2N], ascending; and each key's image [2N]."""
        _, first, number = np.unique(self._index["keys"].reshape(-1), return_index=True, return_inverse=True)
        order = np.argsort(first)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        return first[order], rank[number]

    @cached_property
    def _tasks(self) -> np.ndarray:
        """The images to score, as positions in the flat keys."""
        if not len(self._distinct[0]):
            raise DataError(f"data.pairs: no usable pair in {self.path}: {_counted(self._unusable())}")
        return self._distinct[0]

    def _tasks_of(self, name: str) -> list[_Task]:
        first = _first_row(name)
        rows, keys = self._index["row"], self._index["keys"]
        begin, end = np.searchsorted(rows[self._tasks // 2], [first, first + PART_ROWS])
        return [
            _Task(int(rows[place // 2]), place % 2, keys[place // 2, place % 2].ljust(KEY.itemsize, b"\0"))
            for place in self._tasks[begin:end].tolist()
        ]

    def _unusable(self) -> list[tuple[int, str, str]]:
        """Row, uid and reason of the rows that cannot be read."""
        manifests = (self.shared.manifest(_part_name(_INDEX, i)) for i in range(self.parts))
        return [tuple(item) for manifest in manifests for item in manifest["rejected"]]

    # --- scoring --------------------------------------------------------------------------------------------------

    @cached_property
    def _scorers(self) -> list[Scorer]:
        half = self.shared.manifest(_HALF)["half"] if self.half else {}
        return [load_scorer(name, self.world.device, half=half.get(name, False)) for name in self.names]

    def _score_part(self, name: str) -> dict[str, Any]:
        tasks, draft = self._tasks_of(name), self.shared.draft(name)
        done = sum(record["count"] for record in draft.records)
        self._progress.update(done)
        for batch in _batches(self._decoded_images(name, tasks[done:]), self.batch):
            scores, problems = self._score_batch(batch)
            draft.append({"count": len(batch), "problems": problems}, [scores.tobytes()])
            self._progress.update(len(batch))
        problems = [problem for record in draft.records for problem in record["problems"]]
        return {**self.shared.keep(name, draft.data()), "problems": problems}

    def _score_batch(self, batch: Sequence[tuple[Image | BadImage, str]]) -> tuple[np.ndarray, list[str]]:
        """Scores float32 [n, scorers], NaN for an image that cannot be decoded; and the problem with each, or ''."""
        good = [i for i, (image, _) in enumerate(batch) if not isinstance(image, BadImage)]
        scores = np.full((len(batch), len(self.names)), np.nan, np.float32)
        decoded: Any = [batch[i][0] for i in good]
        if good:
            prompts = [batch[i][1] for i in good]
            scores[good] = np.stack([scorer(decoded, prompts) for scorer in self._scorers], axis=1)
        problems = [str(image) if isinstance(image, BadImage) else "" for image, _ in batch]
        for i in good:
            problems[i] = no_finite_score(*scores[i].tolist()) or ""
        return scores, problems

    def _decoded_images(self, name: str, tasks: Sequence[_Task]) -> Iterator[tuple[Image | BadImage, str]]:
        """The tasks' images and prompts in order; images are decoded in threads, a bounded number ahead."""
        workers = min(8, os.cpu_count() or 1)
        return map_ahead(
            lambda item: (_decode(item[0]), item[1]), self._encoded_images(name, tasks), workers, ahead=4 * workers
        )

    def _encoded_images(self, name: str, tasks: Sequence[_Task]) -> Iterator[tuple[bytes, str]]:
        wanted: dict[int, list[_Task]] = {}
        for task in tasks:
            wanted.setdefault(task.row, []).append(task)
        for item in self._rows_of(name) if wanted else ():
            for task in wanted.pop(item.row, ()):
                if isinstance(item, Rejected) or score_table.keys_of(item)[task.side] != task.key:
                    raise DataError(f"data.pairs: row {item.row} of {self.path} changed while it was scored")
                yield item.images[task.side], item.prompt
            if not wanted:
                return

    def _compare_half(self, name: str) -> dict[str, Any]:
        """Compare float16 with float32 on the first images that can be decoded."""
        sample: list[tuple[Image, str]] = []
        for part in (_part_name(_SCORES, i) for i in range(self.parts)):
            for image, prompt in self._decoded_images(part, self._tasks_of(part)[: half_precision.SAMPLE]):
                if not isinstance(image, BadImage):
                    sample.append((image, prompt))
            if len(sample) >= half_precision.SAMPLE:
                break
        sample = sample[: half_precision.SAMPLE]
        return half_precision.compare(
            self.names, [image for image, _ in sample], [prompt for _, prompt in sample], self.world.device
        )

    # --- the score table ------------------------------------------------------------------------------------------

    def _finish(self, name: str) -> dict[str, Any]:
        """Write the score table into the shared folder."""
        raw = np.concatenate([
            np.fromfile(self.shared.kept(_part_name(_SCORES, i)), np.float32).reshape(-1, len(self.names))
            for i in range(self.parts)
        ])  # fmt: skip
        combined, constants = combine(self.scorer, raw)
        number = self._distinct[1].reshape(-1, 2)
        rewards = combined[number]
        good = np.isfinite(rewards).all(axis=1)
        rejected = sorted([*self._unusable(), *self._without_score(rewards, number)])
        if not good.any():
            raise DataError(f"{self.scorer}: no pair could be scored; the first: {printable(rejected[0])}")
        single = {name: raw[:, i] for i, name in enumerate(self.names)} if len(self.names) > 1 else {}
        score_table.write(
            self.shared.folder,
            keys=self._index["keys"].reshape(-1)[self._tasks],
            scores={"score": combined, **single},
            pairs={
                "row": self._index["row"][good],
                "label_0": self._index["label"][good],
                "score_0": rewards[good, 0],
                "score_1": rewards[good, 1],
            },
            rejected=rejected,
            facts={
                "made": self.made_from,
                "scorers": constants,
                "counts": {"pairs": int(good.sum()), "pictures": len(self._tasks), "rejected": _counted(rejected)},
                "half": self.shared.manifest(_HALF)["half"] if self.half else {},
                "versions": {name: version(name) for name in ("torch", "transformers", "pillow")},
            },
        )
        return {"kept": {}}

    def _without_score(self, rewards: np.ndarray, number: np.ndarray) -> Iterator[tuple[int, str, str]]:
        """Row, uid and reason of pairs with an image that has no score."""
        manifests = (self.shared.manifest(_part_name(_SCORES, i)) for i in range(self.parts))
        problems = [problem for manifest in manifests for problem in manifest["problems"]]
        for i in np.flatnonzero(~np.isfinite(rewards).all(axis=1)).tolist():
            side = int(np.isfinite(rewards[i, 0]))
            row = int(self._index["row"][i])
            yield row, f"row-{row}", f"jpg_{side} {problems[number[i, side]]}"


def _part_name(kind: str, number: int) -> str:
    return f"{kind}-{number:05d}"


def _first_row(name: str) -> int:
    """The first row of a part."""
    return int(name.rpartition("-")[2]) * PART_ROWS


def _counted(rejected: Sequence[tuple[int, str, str]]) -> dict[str, int]:
    return dict(Counter(reason_kind(reason) for _, _, reason in rejected).most_common())


def _decode(content: bytes) -> Image | BadImage:
    try:
        return images.decode(content)
    except BadImage as error:
        return error


def _batches(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    batch: list[_T] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
