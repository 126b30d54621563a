"""Program: scores of every distinct picture of a pair table, into a folder beside it (smpo_fast.sidecar).

Any number of processes share the work through that folder.  First all rows are hashed, so that a picture that is in
several pairs is scored once, then pictures are scored in parts, and what a process had finished outlives its kill.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from tqdm import tqdm

from smpo_fast.common import plots, shared_work, storage
from smpo_fast.common.errors import UserError
from smpo_fast.common.pools import map_ahead
from smpo_fast.common.runtime import World, print0, warn0
from smpo_fast.common.shared_work import AlreadyFinished, SharedWork
from smpo_fast.config.schema import Labels
from smpo_fast.data import images
from smpo_fast.data.images import BadImage
from smpo_fast.data.pairs import reader
from smpo_fast.data.pairs.pair import RawPair, Rejected
from smpo_fast.data.pairs.rules import no_finite_score, reason_kind
from smpo_fast.data.rewards import score_table
from smpo_fast.data.rewards.score_table import KEY
from smpo_fast.data.rewards.scorers import KINDS, Scorer, check_scorer, load_scorer, scorer_identity, terms
from smpo_fast.method import label_report, labels

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT = 1
PART_ROWS = 1024
HALF_SAMPLE, HALF_TOLERANCE = 64, 0.05  # pictures; largest error in standard deviations of their scores
_ROW = np.dtype([("row", "<i8"), ("label", "<f8"), ("keys", KEY, 2)])
_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True)
class ScoreOptions:
    """How to score. scorer: a name, or a combination such as ``0.7*pickscore + 0.3*aesthetic``."""

    scorer: str
    batch: int = 32
    half: bool = False
    max_pairs: int = 0


@dataclass(frozen=True)
class _Task:
    """A picture to be scored: its place in the table and its key."""

    row: int
    side: int
    key: bytes


def score(pairs: str, out: Path, options: ScoreOptions, world: World, settings: Labels) -> dict[str, Any]:
    """Score the pictures of ``data.pairs`` = ``pairs`` into the folder ``out``; returns what its scores.json says.

    Every process that calls this takes parts of the work; all return when it is done.  Rank 0 then reports on the
    labels that follow with these ``settings``: as text, labels.json and labels.png.  Scores that are there already
    are only reported on.  Raises SettingsError for scorers and tables that cannot be had.
    """
    for _, name in terms(options.scorer):
        check_scorer(name, "--scorer")
    path, folder = reader.source_path(pairs), out.absolute().parent / f".{out.name}.partial"
    made = _made(path, options)
    if (folder / score_table.FACTS).is_file():
        shared_work.publish(folder, out, score_table.FACTS)
    if not (out / score_table.FACTS).is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} exists already and holds no scores: remove it, or name another folder")
        try:
            with SharedWork(folder, made) as shared:
                _Scoring(path, options, shared, world, made).run()
        except AlreadyFinished:
            pass
        shared_work.publish(folder, out, score_table.FACTS)
    facts = score_table.read_facts(out)
    _check_same(out, facts["made"], made)
    if world.rank == 0:
        print0(_summary(out, facts))
        report_labels(out, settings)
    return facts


def report_labels(out: Path, settings: Labels) -> None:
    """Print what weights the scores of a folder give, and write labels.json and labels.png there."""
    found = score_table.read_pairs(out)
    weighted = labels.weigh(settings, found["rewards"], found["label"])
    bins = label_report.calibration(weighted.preference, found["label"])
    facts = {
        "labels": settings.model_dump(),
        "report": {key: None if value != value else value for key, value in asdict(weighted.report).items()},
        "calibration": [asdict(b) for b in bins],
    }
    storage.write_json(out / "labels.json", facts, indent=2)
    plots.draw_labels(
        weighted.weight[weighted.used], [(b.predicted, b.human, b.error) for b in bins], out / "labels.png"
    )
    print0(weighted.report)


class _Scoring:
    """The work of one process."""

    def __init__(
        self, path: Path, options: ScoreOptions, shared: SharedWork, world: World, made: dict[str, Any]
    ) -> None:
        self.path, self.options, self.shared, self.world, self.made = path, options, shared, world, made
        self.names = [name for _, name in terms(options.scorer)]
        rows = reader.count_rows(path, max_pairs=options.max_pairs)
        self.count = -(-rows // PART_ROWS)
        self.rows = rows

    def run(self) -> None:
        finish = "finish-00000"
        try:
            if not self.shared.is_finished(finish):
                self._share("index", self._index)
                if self.options.half:
                    self.shared.do_parts(["half-00000"], self._compare_half)
                    self._say_half()
                with self._bar("score", len(self.tasks)) as self._progress:
                    self._share("scores", self._score)
            self.shared.do_parts([finish], self._finish)
        except FileNotFoundError as error:
            if self.shared.folder.is_dir() and not self.shared.is_finished(finish):
                raise
            raise AlreadyFinished from error

    def _share(self, kind: str, do: Callable[[str], dict[str, Any]]) -> None:
        """Each process begins at another part, so that few meet."""
        names = [f"{kind}-{i:05d}" for i in range(self.count)]
        first = self.world.rank * self.count // self.world.size
        self.shared.do_parts([*names[first:], *names[:first]], do)

    def _bar(self, what: str, total: int) -> tqdm:
        """Of this process's own work; its end is known where it is alone."""
        alone = self.world.size == 1
        return tqdm(
            total=total if alone else None, unit="picture", desc=what, mininterval=0.5, disable=self.world.rank != 0
        )

    # --- which pictures there are -------------------------------------------------------------------------------

    def _index(self, name: str) -> dict[str, Any]:
        found, rejected = [], []
        for item in self._rows_of(name):
            if isinstance(item, Rejected):
                rejected.append([item.row, item.uid, item.reason])
            else:
                label = np.nan if item.label is None else item.label
                found.append((item.row, label, score_table.keys_of(item)))
        return {**self.shared.keep(name, np.array(found, _ROW).tobytes()), "rejected": rejected}

    def _rows_of(self, name: str) -> Iterator[RawPair | Rejected]:
        first = int(name.rpartition("-")[2]) * PART_ROWS
        return reader.read_pairs(self.path, start=first, max_pairs=min(first + PART_ROWS, self.rows))

    @cached_property
    def index(self) -> np.ndarray:
        """The usable rows of the table, _ROW [N]."""
        kept = [np.fromfile(self.shared.kept(f"index-{i:05d}"), _ROW) for i in range(self.count)]
        return np.concatenate([np.zeros(0, _ROW), *kept])

    @cached_property
    def _distinct(self) -> tuple[np.ndarray, np.ndarray]:
        """Where in the flat keys [2N] each distinct picture comes first, ascending; and the number of each key's."""
        _, first, number = np.unique(self.index["keys"].reshape(-1), return_index=True, return_inverse=True)
        order = np.argsort(first)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        return first[order], rank[number]

    @cached_property
    def tasks(self) -> np.ndarray:
        """Places of the pictures to score in the flat keys."""
        if not len(self._distinct[0]):
            raise UserError(f"data.pairs: no usable pair in {self.path}: {_counted(self._unusable())}")
        return self._distinct[0]

    def _unusable(self) -> list[tuple[int, str, str]]:
        return [tuple(item) for i in range(self.count) for item in self._note("index", i)["rejected"]]

    def _note(self, kind: str, number: int) -> dict[str, Any]:
        return self.shared.manifest(f"{kind}-{number:05d}")

    def _tasks_of(self, name: str) -> list[_Task]:
        first = int(name.rpartition("-")[2]) * PART_ROWS
        rows, keys = self.index["row"], self.index["keys"]
        begin, end = np.searchsorted(rows[self.tasks // 2], [first, first + PART_ROWS])
        return [
            _Task(int(rows[place // 2]), place % 2, keys[place // 2, place % 2].ljust(KEY.itemsize, b"\0"))
            for place in self.tasks[begin:end].tolist()
        ]

    # --- scoring ------------------------------------------------------------------------------------------------

    @cached_property
    def scorers(self) -> list[Scorer]:
        half = self._note("half", 0)["half"] if self.options.half else {}
        return [load_scorer(name, self.world.device, half=half.get(name, False)) for name in self.names]

    def _score(self, name: str) -> dict[str, Any]:
        tasks, draft = self._tasks_of(name), self.shared.draft(name)
        done = sum(record["count"] for record in draft.records)
        self._progress.update(done)
        for batch in _batches(self._pictures(name, tasks[done:]), self.options.batch):
            scores, problems = self._scores_of(batch)
            draft.append({"count": len(batch), "problems": problems}, [scores.tobytes()])
            self._progress.update(len(batch))
        scores = np.frombuffer(draft.data(), np.float32).reshape(-1, len(self.names))
        problems = [reason for record in draft.records for reason in record["problems"]]
        return {**self.shared.keep(name, scores.tobytes()), "problems": problems}

    def _scores_of(self, batch: Sequence[tuple[Image | BadImage, str]]) -> tuple[np.ndarray, list[str]]:
        """Scores float32 [n, scorers], NaN for a picture that cannot be decoded; and what is wrong with each, or ''."""
        good = [i for i, (picture, _) in enumerate(batch) if not isinstance(picture, BadImage)]
        scores = np.full((len(batch), len(self.names)), np.nan, np.float32)
        pictures: Any = [batch[i][0] for i in good]
        if good:
            prompts = [batch[i][1] for i in good]
            scores[good] = np.stack([scorer(pictures, prompts) for scorer in self.scorers], axis=1)
        problems = [str(picture) if isinstance(picture, BadImage) else "" for picture, _ in batch]
        for i in good:
            problems[i] = no_finite_score(*scores[i].tolist()) or ""
        return scores, problems

    def _pictures(self, name: str, tasks: Sequence[_Task]) -> Iterator[tuple[Image | BadImage, str]]:
        """The tasks' pictures and prompts in order, decoded in threads a bounded number ahead."""
        wanted: dict[int, list[_Task]] = {}
        for task in tasks:
            wanted.setdefault(task.row, []).append(task)

        def encoded() -> Iterator[tuple[bytes, str]]:
            for item in self._rows_of(name) if wanted else ():
                for task in wanted.pop(item.row, ()):
                    if isinstance(item, Rejected) or score_table.keys_of(item)[task.side] != task.key:
                        raise UserError(f"data.pairs: row {item.row} of {self.path} changed while it was scored")
                    yield item.images[task.side], item.prompt
                if not wanted:
                    return

        workers = min(8, os.cpu_count() or 1)
        return map_ahead(lambda one: (_decoded(one[0]), one[1]), encoded(), workers, ahead=4 * workers)

    # --- half precision -----------------------------------------------------------------------------------------

    def _compare_half(self, name: str) -> dict[str, Any]:
        """The first pictures in float32 and in float16."""
        batch: list[tuple[Image, str]] = []
        for i in range(self.count):
            for picture, prompt in self._pictures(f"scores-{i:05d}", self._tasks_of(f"scores-{i:05d}")[:HALF_SAMPLE]):
                if not isinstance(picture, BadImage):
                    batch.append((picture, prompt))
            if len(batch) >= HALF_SAMPLE:
                break
        pictures, prompts = [one[0] for one in batch[:HALF_SAMPLE]], [one[1] for one in batch[:HALF_SAMPLE]]
        note: dict[str, Any] = {"half": {}, "difference": {}, "limit": {}, "pictures": len(pictures)}
        for scorer in self.names:
            full, half = (
                load_scorer(scorer, self.world.device, half=half)(pictures, prompts) for half in (False, True)
            )
            difference, limit = float(np.abs(half - full).max(initial=0)), HALF_TOLERANCE * float(full.std())
            note["half"][scorer] = difference <= limit  # false for NaN
            note["difference"][scorer], note["limit"][scorer] = repr(difference), repr(limit)
        return note

    def _say_half(self) -> None:
        note = self._note("half", 0)
        for name, holds in note["half"].items():
            text = (
                f"{name}: float16 differs from float32 by at most {float(note['difference'][name]):.3g} over "
                f"{note['pictures']} pictures, allowed are {float(note['limit'][name]):.3g}"
            )
            if holds:
                print0(text)
            else:
                warn0(f"{text}: float32 is taken")

    # --- the end ------------------------------------------------------------------------------------------------

    def _finish(self, name: str) -> dict[str, Any]:
        kept = [
            np.fromfile(self.shared.kept(f"scores-{i:05d}"), np.float32).reshape(-1, len(self.names))
            for i in range(self.count)
        ]
        raw = np.concatenate(kept)
        problems = [reason for i in range(self.count) for reason in self._note("scores", i)["problems"]]
        combined, constants = combine(self.options.scorer, raw)
        number = self._distinct[1].reshape(-1, 2)
        rewards = combined[number]
        good = np.isfinite(rewards).all(axis=1)
        rejected = self._unusable()
        for i in np.flatnonzero(~good).tolist():
            side = int(np.isfinite(rewards[i, 0]))
            row = int(self.index["row"][i])
            rejected.append((row, f"row-{row}", f"jpg_{side} {problems[number[i, side]]}"))
        if not good.any():
            raise UserError(f"{self.options.scorer}: no pair could be scored; the first: {min(rejected)}")
        single = {name: raw[:, i] for i, name in enumerate(self.names)} if len(self.names) > 1 else {}
        score_table.write(
            self.shared.folder,
            self.index["keys"].reshape(-1)[self.tasks],
            {"score": combined, **single},
            {
                "row": self.index["row"][good],
                "label_0": self.index["label"][good],
                "score_0": rewards[good, 0],
                "score_1": rewards[good, 1],
            },
            sorted(rejected),
            {
                "made": self.made,
                "scorers": constants,
                "counts": {"pairs": int(good.sum()), "pictures": len(self.tasks), "rejected": _counted(rejected)},
                "half": self._note("half", 0)["half"] if self.options.half else {},
                "versions": {name: version(name) for name in ("torch", "transformers", "pillow")},
            },
        )
        return {"kept": {}}


def combine(scorer: str, raw: np.ndarray) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """The sum of w (s - mean) / std over the scorers of a combination, float64 [n]; of a single one its score.

    raw: float32 [n, scorers].  Mean and (population) standard deviation are those of the rows that are finite, which
    are the distinct pictures of a table.  Also returns them, with each scorer's name, identity and weight.
    """
    wanted, values = terms(scorer), raw.astype(np.float64)
    finite = values[np.isfinite(values).all(axis=1)]
    mean, std = (finite.mean(axis=0), finite.std(axis=0)) if len(finite) else (np.zeros(len(wanted)),) * 2
    constants: list[dict[str, Any]] = [
        {"name": name, "identity": scorer_identity(name), "weight": weight, "mean": float(m), "std": float(s)}
        for (weight, name), m, s in zip(wanted, mean, std, strict=True)
    ]
    if len(wanted) == 1:
        return values[:, 0], constants
    for fact in constants:
        if not fact["std"]:
            raise UserError(f"--scorer: '{fact['name']}' gives all pictures the same score: leave it out")
    return ((values - mean) / std) @ np.array([weight for weight, _ in wanted]), constants


def _made(path: Path, options: ScoreOptions) -> dict[str, Any]:
    """What the scores of a folder are of."""
    files = [{"name": file.name, "bytes": file.stat().st_size} for file in reader.files(path)]
    found = [[weight, name, scorer_identity(name)] for weight, name in terms(options.scorer)]
    if options.half:
        for _, name in terms(options.scorer):
            _check_half(name)
    return {"format": FORMAT, "pairs": files, "max_pairs": options.max_pairs, "scorers": found, "half": options.half}


def _check_half(name: str) -> None:
    if name.partition(":")[0] not in KINDS:
        raise UserError(f"--half: '{name}' has no half precision: only {', '.join(KINDS)} have")


def _check_same(out: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    other = [key for key in wanted if json.loads(json.dumps(wanted[key])) != found.get(key)]
    if other:
        raise UserError(f"{out} holds other scores (they differ in {', '.join(other)}): remove it, or name another")


def _counted(rejected: Sequence[tuple[int, str, str]]) -> dict[str, int]:
    return dict(Counter(reason_kind(reason) for _, _, reason in rejected).most_common())


def _summary(out: Path, facts: dict[str, Any]) -> str:
    counts = facts["counts"]
    listed = ", ".join(f"{what} ({count})" for what, count in counts["rejected"].items()) or "none"
    lines = [f"{out}: {counts['pictures']} pictures of {counts['pairs']} pairs scored, rows rejected: {listed}"]
    lines += [
        f"  {fact['name']}: mean {fact['mean']:.4g}, standard deviation {fact['std']:.4g}, weight {fact['weight']:g}"
        for fact in facts["scorers"]
    ]
    return "\n".join(lines)


def _decoded(content: bytes) -> Image | BadImage:
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
