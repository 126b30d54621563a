"""Writing a cache of encoded pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.numpy import save_file
from torch import Tensor

from smpo_fast.common.shared_work import AlreadyFinished, SharedWork
from smpo_fast.common.storage import atomic_write, sync, write_json
from smpo_fast.data.cache.format import (
    FORMAT,
    INFO,
    LAST_PART,
    LATENTS_PART,
    PAIRS,
    PROMPTS,
    PROMPTS_PART,
    REJECTED,
    SURVEY_PART,
    CacheInfo,
    Entry,
    Unstorable,
    _entry,
    _frame_columns,
    _part,
    _suffix,
    check_target,
    exists,
    file_facts,
    partial,
    settle,
)

_INDEX_ROWS = 1 << 14


class CacheWriter:
    """Writes a cache together with any number of other processes: the pairs' parts, the prompts' parts, ``finish``.

    plan: how the work is divided; processes with another plan or identity are refused while one is at work.
    Raises SettingsError when the target exists already, and ``parts.AlreadyFinished`` as soon as another process has
    completed the cache.
    """

    def __init__(
        self, root: Path, identity: Mapping[str, Any], source: Mapping[str, Any], plan: Mapping[str, Any] | None = None
    ) -> None:
        check_target(root)
        self.root, self.folder = root, partial(root)
        self.identity, self.source = dict(identity), dict(source)
        self.parts = SharedWork(self.folder, {"identity": self.identity, **(plan or {})}, self._is_intact)
        self.counts = {LATENTS_PART: 0, SURVEY_PART: 0, PROMPTS_PART: 0}  # parts of each kind

    def __enter__(self) -> CacheWriter:
        settle(self.root)  # all but its name was made by a process that was killed
        if exists(self.root):
            raise AlreadyFinished
        self.parts.__enter__()
        if exists(self.root):
            self.parts.discard()
            raise AlreadyFinished
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.parts.__exit__(kind, error, trace)

    def share(self, kind: str, count: int, do: Callable[[int], dict[str, Any]]) -> None:
        """Do parts 0 .. count-1 of a kind together with the other processes; returns when all are done.

        do: makes a part and returns what ``PairsPart.close`` or ``PromptsPart.close`` gave.
        """
        self.counts[kind] = max(count, self.counts[kind])
        self.parts.do_parts(self._names(kind), lambda name: do(int(name.rpartition("-")[2])))

    def pairs(self, number: int, kind: str = LATENTS_PART) -> PairsPart:
        """A part of the pairs, to be filled; of kind SURVEY_PART it holds no latents."""
        return PairsPart(self, _part(kind, number))

    def prompts(self, number: int) -> PromptsPart:
        """A part of the prompts, to be filled."""
        return PromptsPart(self, _part(PROMPTS_PART, number))

    def done(self, kind: str, count: int) -> list[bool]:
        """Which of the parts 0 .. count-1 are done."""
        return [self.parts.is_finished(_part(kind, i)) for i in range(count)]

    def entries(self) -> Iterator[tuple[Entry, int, int]]:
        """All usable pairs by row, with the shard of their latents and the place in it; -1 where there are none."""
        if not self.counts[SURVEY_PART]:
            yield from self._encoded()
            return
        rejected = {row for row, _, _ in self._rejected(LATENTS_PART)}
        place = {entry.row: (shard, position) for entry, shard, position in self._encoded()}
        for note in self._notes(SURVEY_PART):
            for entry in map(_entry, note["entries"]):
                if entry.row not in rejected:
                    yield entry, *place.get(entry.row, (-1, -1))

    def rejected(self) -> list[tuple[int, str, str]]:
        """Row, uid and reason of all rejected rows, ascending."""
        return sorted(chain(self._rejected(LATENTS_PART), self._rejected(SURVEY_PART)))

    def texts(self) -> list[str]:
        """The distinct prompts of the pairs in order of appearance, the empty one first."""
        return list(dict.fromkeys(chain([""], (entry.prompt for entry, *_ in self.entries()))))

    def finish(self, scorers: Sequence[str] = ()) -> None:
        """Write the index and give the cache its name, where no other process does it.

        scorers: beginnings of the reasons for which rows were rejected that another scorer might have saved.
        """
        with self.parts.claim(LAST_PART, wait=True):
            if not exists(self.folder):
                self._describe(scorers)
        settle(self.root)

    def discard(self) -> None:
        """Remove what was written, where no other process is at work."""
        self.parts.discard()

    def save(self, name: str, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Write a file of arrays; returns its size and hash."""
        with atomic_write(self.folder / name) as draft:
            save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, draft)
            draft.chmod(self.parts.mode)  # safetensors gives its files to their owner alone
            facts = file_facts(draft)
        return facts

    def _describe(self, scorers: Sequence[str]) -> None:
        """The index and ``cache.json``, which completes the cache."""
        rejected, notes = self.rejected(), list(map(self._shard_facts, self._names(LATENTS_PART)))
        texts, latent = self.texts(), next((note["latent"] for note in notes if note["file"]), None)
        prompt_notes = list(self._notes(PROMPTS_PART))
        if latent is None or sum(note["count"] for note in prompt_notes) != len(texts):
            raise ValueError(f"{len(texts)} prompts, {len(prompt_notes)} shards of prompts: not complete")
        files = {note["name"]: note["file"] for note in [*notes, *prompt_notes] if note["file"]}
        pixels = sorted({entry.pixels for entry, *_ in self.entries()})
        index = _IndexWriter(self.folder / PAIRS, texts, pixels)
        for found in self.entries():
            index.add(*found)
        counts = index.close()
        hanging = sum(reason.startswith(tuple(scorers)) for _, _, reason in rejected) if scorers else 0
        self._save_tables(texts, [note["count"] for note in prompt_notes], rejected)
        files |= {name: file_facts(self.folder / name) for name in (PAIRS, PROMPTS, REJECTED)}
        info = CacheInfo(
            root=self.root,
            identity=self.identity,
            source=self.source,
            counts={
                **counts,
                "rejected": len(rejected),
                "prompts": len(texts),
                "unrewarded": counts["pairs"] - counts["stored"] + hanging,
            },
            pixels=tuple(pixels),
            channels=latent["channels"],
            factor=latent["factor"],
            flips=latent["flips"],
            prompt=tuple(prompt_notes[0]["shape"]),
            pooled=prompt_notes[0]["pooled"],
            rewards=index.range,
            files=dict(sorted(files.items())),
            versions={name: version(name) for name in ("torch", "numpy", "pillow", "diffusers", "transformers")},
        )
        facts = {key: value for key, value in asdict(info).items() if key != "root"}
        write_json(self.folder / INFO, {"format": FORMAT, **facts}, indent=1)

    def _save_tables(self, texts: list[str], sizes: Sequence[int], rejected: Sequence[tuple[int, str, str]]) -> None:
        place = [(shard, i) for shard, count in enumerate(sizes) for i in range(count)]
        prompts = {
            "text": pa.array(texts, pa.string()),
            "shard": pa.array([p[0] for p in place], pa.int32()),
            "position": pa.array([p[1] for p in place], pa.int32()),
        }
        bad = {
            "row": pa.array([r[0] for r in rejected], pa.int64()),
            "uid": pa.array([r[1] for r in rejected], pa.string()),
            "reason": pa.array([r[2] for r in rejected], pa.string()),
        }
        for name, columns in ((PROMPTS, prompts), (REJECTED, bad)):
            pq.write_table(pa.table(columns), self.folder / name)
            sync(self.folder / name)

    def _encoded(self) -> Iterator[tuple[Entry, int, int]]:
        for shard, note in enumerate(self._notes(LATENTS_PART)):
            filled: dict[tuple[int, int], int] = {}
            for entry in map(_entry, note["entries"]):
                position = filled.get(entry.pixels, 0)
                filled[entry.pixels] = position + 1
                yield entry, shard, position

    def _rejected(self, kind: str) -> Iterator[tuple[int, str, str]]:
        return ((row, uid, reason) for note in self._notes(kind) for row, uid, reason in note["rejected"])

    def _names(self, kind: str) -> list[str]:
        return [_part(kind, number) for number in range(self.counts[kind])]

    def _notes(self, kind: str) -> Iterator[dict[str, Any]]:
        return map(self.parts.manifest, self._names(kind))

    def _shard_facts(self, name: str) -> dict[str, Any]:
        note = self.parts.manifest(name)
        return {key: note[key] for key in ("name", "file", "latent")}

    def _is_intact(self, note: Mapping[str, Any]) -> bool:
        return note["file"] is None or (self.folder / note["name"]).stat().st_size == note["file"]["bytes"]


class PairsPart:
    """Some of the pairs, rows ascending: ``add`` and ``reject``, ``commit`` after every few, then ``close``."""

    def __init__(self, writer: CacheWriter, name: str) -> None:
        self._writer, self._name, self._draft = writer, name, writer.parts.draft(name)
        self._entries: list[dict[str, Any]] = []
        self._shapes: list[tuple[int, ...]] = []
        self._blobs: list[bytes] = []
        self._rejected: list[tuple[int, str, str]] = []

    @property
    def next_row(self) -> int:
        """Rows below this one have been committed, also by a process that was killed; 0 at the beginning."""
        return self._draft.records[-1]["next_row"] if self._draft.records else 0

    def reject(self, row: int, uid: str, reason: str) -> None:
        """Note a row that cannot be used."""
        self._rejected.append((row, uid, reason))

    def add(self, entry: Entry, mean: Tensor | None = None, std: Tensor | None = None) -> None:
        """Add a pair. mean, std: float32 [2, F, C, H, W], kept as float16; none in a survey.

        Raises Unstorable, and adds nothing, when a number is NaN, infinite or beyond float16.
        """
        kept = [
            _half(tensor, f"row {entry.row}: latent {name}")
            for name, tensor in (("mean", mean), ("std", std))
            if tensor is not None
        ]
        self._entries.append(asdict(entry))
        if kept:
            self._shapes.append(kept[0].shape[1:])
            self._blobs += [array.tobytes() for array in kept]

    def commit(self, next_row: int) -> None:
        """Put on disk what was added: a part that is taken up again begins at ``next_row``."""
        record = {
            "next_row": next_row, "entries": self._entries, "rejected": self._rejected, "shapes": self._shapes,
        }  # fmt: skip
        self._draft.append(record, self._blobs)
        self._entries, self._shapes, self._blobs, self._rejected = [], [], [], []

    def close(self) -> dict[str, Any]:
        """Write the shard; returns the part's note."""
        records = self._draft.records
        entries = [entry for record in records for entry in record["entries"]]
        shapes = [tuple(shape) for record in records for shape in record["shapes"]]
        note: dict[str, Any] = {
            "entries": entries,
            "rejected": [bad for record in records for bad in record["rejected"]],
            "name": f"{self._name}.safetensors",
            "file": None,
            "latent": None,
        }
        if shapes:
            flips, channels, height, _ = shapes[0]
            note["latent"] = {"flips": flips, "channels": channels, "factor": entries[0]["pixels"][0] // height}
            suffixes = [_suffix(e["pixels"]) if self._writer.identity.get("buckets") else "" for e in entries]
            note["file"] = self._writer.save(note["name"], _gather(self._draft.mapped(), shapes, suffixes))
        return note


class PromptsPart:
    """Some of the prompts, in order."""

    def __init__(self, writer: CacheWriter, name: str) -> None:
        self._writer, self._name, self._draft = writer, name, writer.parts.draft(name)

    @property
    def done(self) -> int:
        """How many have been added, also by a process that was killed."""
        return sum(record["count"] for record in self._draft.records)

    def add(self, embeds: Tensor, pooled: Tensor | None) -> None:
        """Add the next n prompts. embeds [n, S, D]; pooled [n, E] or None."""
        arrays = [_half(embeds, f"the embedding of one of {len(embeds)} prompts")]
        if pooled is not None:
            arrays.append(_half(pooled, f"the pooled embedding of one of {len(embeds)} prompts"))
        width = None if pooled is None else pooled.shape[1]
        record = {"count": len(embeds), "shape": embeds.shape[1:], "pooled": width}
        self._draft.append(record, [array.tobytes() for array in arrays])

    def close(self) -> dict[str, Any]:
        """Write the shard; returns the part's note."""
        first, data, offset = self._draft.records[0], self._draft.mapped(), 0
        widths = {"embeds": tuple(first["shape"])} | ({"pooled": (first["pooled"],)} if first["pooled"] else {})
        pieces: dict[str, list[np.ndarray]] = {key: [] for key in widths}
        for record in self._draft.records:
            for key, width in widths.items():
                size = record["count"] * math.prod(width)
                piece = np.frombuffer(data, np.float16, size, offset).reshape(record["count"], *width)
                pieces[key].append(piece)
                offset += 2 * size
        name = f"{self._name}.safetensors"
        facts = self._writer.save(name, {key: np.concatenate(found) for key, found in pieces.items()})
        return {"name": name, "file": facts, "count": self.done, "shape": first["shape"], "pooled": first["pooled"]}


class _IndexWriter:
    """Writes ``pairs.parquet`` piece by piece and counts."""

    def __init__(self, file: Path, texts: Sequence[str], pixels: Sequence[tuple[int, int]]) -> None:
        self._file, self._prompts = file, {text: i for i, text in enumerate(texts)}
        self._shapes = {size: i for i, size in enumerate(pixels)}
        kinds = {"row": pa.int64(), "uid": pa.string(), "prompt": pa.int32()}
        kinds |= {"reward_0": pa.float64(), "reward_1": pa.float64(), "label_0": pa.float64(), "scored": pa.bool_()}
        kinds |= {name: pa.int32() for name in ("shape", "shard", "position", *_frame_columns())}
        self._schema = pa.schema(list(kinds.items()))
        self._writer = pq.ParquetWriter(file, self._schema)
        self._rows: list[tuple[Any, ...]] = []
        self._counts = {"pairs": 0, "encoded": 0, "stored": 0, "scored": 0}
        self.range: tuple[float, float] | None = None

    def add(self, e: Entry, shard: int, position: int) -> None:
        """Add a pair with the place of its latents."""
        rewards, place = e.rewards or (None, None), (self._shapes[e.pixels], shard, position)
        labels = (*rewards, e.label, e.scored)
        self._rows.append((e.row, e.uid, self._prompts[e.prompt], *labels, *place, *e.frames[0], *e.frames[1]))
        self._counts["pairs"] += 1
        self._counts["encoded"] += shard >= 0
        if e.rewards is not None:
            self._counts["scored" if e.scored else "stored"] += 1
            low, high = self.range or (math.inf, -math.inf)
            self.range = min(low, *e.rewards), max(high, *e.rewards)
        if len(self._rows) == _INDEX_ROWS:
            self._flush()

    def close(self) -> dict[str, int]:
        """Finish the file; how many pairs there are, encoded, with rewards stored and scored."""
        self._flush()
        self._writer.close()
        sync(self._file)
        return self._counts

    def _flush(self) -> None:
        columns = list(zip(*self._rows, strict=True)) or [()] * len(self._schema)
        arrays = [pa.array(values, field.type) for values, field in zip(columns, self._schema, strict=True)]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))
        self._rows.clear()


def _gather(data: memoryview, shapes: Sequence[tuple[int, ...]], suffixes: Sequence[str]) -> dict[str, np.ndarray]:
    """The tensors of a shard from the bytes of its pairs. shapes: F, C, H, W of each; suffixes: of tensors' names."""
    arrays: dict[str, np.ndarray] = {}
    for suffix in sorted(set(suffixes)):
        members = [shape for shape, own in zip(shapes, suffixes, strict=True) if own == suffix]
        for key in ("mean", "std"):
            arrays[key + suffix] = np.empty((len(members), 2, *members[0]), np.float16)
    filled, offset = dict.fromkeys(suffixes, 0), 0
    for shape, suffix in zip(shapes, suffixes, strict=True):
        count = 2 * math.prod(shape)
        for key in ("mean", "std"):
            values = np.frombuffer(data, np.float16, count, offset)
            arrays[key + suffix][filled[suffix]] = values.reshape(2, *shape)
            offset += 2 * count
        filled[suffix] += 1
    return arrays


def _half(values: Tensor, what: str) -> np.ndarray:
    array = values.detach().cpu().to(torch.float16).numpy()
    if not np.isfinite(array).all():
        bad = "NaN or infinite" if not bool(torch.isfinite(values).all()) else "beyond float16 (65504)"
        raise Unstorable(f"{what} is {bad}")
    return array
