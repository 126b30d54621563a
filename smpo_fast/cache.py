"""The on-disk format of encoded pairs: write, verify, read.

A cache is a folder (docs/data.md) that appears under its name only when it is complete::

    cache.json                   format, identity, counts, shapes, and size and sha256 of every other file
    pairs.parquet                one row a pair: row, uid, prompt, rewards, label, place of its latents, what was cut
    prompts.parquet              one row a distinct prompt: text, shard, position; prompt 0 is the empty one
    rejected.parquet             one row a rejected row: row, uid, reason
    latents-00000.safetensors    mean, std: float16 [n, 2 pictures, F, C, H, W]; F = 2: as it is and mirrored, else 1;
                                 with buckets a mean and std for each shape, mean.832x1216
    prompts-00000.safetensors    embeds: float16 [n, S, D]; pooled: float16 [n, E] (SDXL)

Until then it grows in a hidden folder beside it, ``.NAME.partial``, in parts that any number of processes share
(smpo_fast.parts): the files do not depend on who wrote which.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
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

from smpo_fast import parts, remote
from smpo_fast.config import SettingsError
from smpo_fast.durable import sha256, sync, write_text
from smpo_fast.parts import Finished, Parts

FORMAT = 2
INFO, PAIRS, PROMPTS, REJECTED = "cache.json", "pairs.parquet", "prompts.parquet", "rejected.parquet"
LATENTS_PART, SURVEY_PART, PROMPTS_PART, LAST_PART = "latents", "survey", "prompts", "index-0"
FRAME = ("height", "width", "top", "left", "right")
_OPEN_SHARDS = 128  # memory maps hold a file descriptor each, of which a process has about 1000
_INDEX_ROWS = 1 << 14
_SCAN_BYTES = 64 << 20

# The entries of an identity, and the settings they come from.
SETTING_OF = {
    "source": "data.pairs",
    "max_pairs": "data.max_pairs",
    "kind": "model.path",
    "encoders": "model.path or model.vae",
    "resolution": "data.resolution",
    "buckets": "data.buckets",
    "flip": "data.flip",
    "scores": "data.scores",
    "scorer": "data.scorer",
}


class CacheError(SettingsError):
    """A cache that is damaged, foreign, or made with other settings: the message says which and what to do."""


class Unstorable(ValueError):
    """Numbers that float16 cannot hold."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What the index says of a pair."""

    row: int
    uid: str
    prompt: str
    rewards: tuple[float, float] | None
    label: float | None  # share of picture 0 in a human's preference
    scored: bool  # rewards come from data.scorer, not from the table
    pixels: tuple[int, int]  # height and width of what was encoded
    frames: tuple[Sequence[int], Sequence[int]]  # of each picture, as FRAME: its own size, and what was cut


@dataclass(frozen=True)
class CacheInfo:
    """What ``cache.json`` says."""

    root: Path
    identity: dict[str, Any]
    source: dict[str, Any]  # data.pairs as given, and size, time and sha256 of its files
    counts: dict[str, int]  # pairs, encoded, rejected, prompts; rewards stored, scored, unrewarded (rest on the scorer)
    pixels: tuple[tuple[int, int], ...]  # height and width of the pictures of each shape, ascending
    channels: int  # C
    factor: int  # px of the picture to one of the latent
    flips: int  # 2: both, 1: as it is
    prompt: tuple[int, int]  # S, D
    pooled: int | None  # E
    rewards: tuple[float, float] | None  # least and greatest
    files: dict[str, dict[str, Any]]  # name -> bytes, sha256
    versions: dict[str, str]

    @property
    def bytes(self) -> int:
        return sum(file["bytes"] for file in self.files.values())

    def latent(self, shape: int = 0) -> tuple[int, int, int]:
        """C, H, W of the latents of a shape."""
        height, width = self.pixels[shape]
        return self.channels, height // self.factor, width // self.factor


def exists(root: Path) -> bool:
    """Whether there is a complete cache (nothing is said of its health)."""
    return (root / INFO).is_file()


def file_facts(file: Path) -> dict[str, Any]:
    """Size and sha256 of a file."""
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


def combined(hashes: Sequence[str]) -> str:
    """One sha256 for an ordered list of them."""
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def partial(root: Path) -> Path:
    """Where a cache is before it is complete."""
    return root.parent / f".{root.name}.partial"


def settle(root: Path) -> None:
    """Give a cache that is complete but for its name its name; waits for a process that is about to."""
    if exists(partial(root)):
        parts.settle(partial(root), root, INFO)
    elif exists(root):  # a process that came too late left what it had begun
        shutil.rmtree(partial(root), ignore_errors=True)


def check_target(root: Path) -> None:
    """Raise SettingsError where something other than a cache is in its place."""
    if not exists(root) and root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise SettingsError(f"data.cache: {root} exists already: remove it, or give data.cache another folder")


def read_info(root: Path) -> CacheInfo:
    """What a cache says of itself; raises CacheError when there is none, or it is not readable."""
    file = root / INFO
    if not file.is_file():
        raise CacheError(
            f"{root}: no prepared cache here ({INFO} is missing): run 'smpo prepare' with the same settings"
        )
    try:
        values = json.loads(file.read_text())
        if values["format"] != FORMAT:
            raise CacheError(
                f"{file}: cache format {values['format']}, this version reads {FORMAT}: remove {root} and prepare again"
            )
        fields = {name: values[name] for name in CacheInfo.__dataclass_fields__ if name != "root"}
        fields["prompt"], fields["pixels"] = tuple(fields["prompt"]), tuple(map(tuple, fields["pixels"]))
        fields["rewards"] = None if fields["rewards"] is None else tuple(fields["rewards"])
        return CacheInfo(root, **fields)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, CacheError):
            raise
        raise _damaged(file, f"cannot be read ({type(error).__name__}: {error})") from error


class CacheWriter:
    """Writes a cache together with any number of other processes: the pairs' parts, the prompts' parts, ``finish``.

    plan: how the work is divided; processes with another plan or identity are refused while one is at work.
    Raises SettingsError when the target exists already, and ``parts.Finished`` as soon as another process has
    completed the cache.
    """

    def __init__(
        self, root: Path, identity: Mapping[str, Any], source: Mapping[str, Any], plan: Mapping[str, Any] | None = None
    ) -> None:
        check_target(root)
        self.root, self.folder = root, partial(root)
        self.identity, self.source = dict(identity), dict(source)
        self.parts = Parts(self.folder, {"identity": self.identity, **(plan or {})}, self._is_intact)
        self.counts = {LATENTS_PART: 0, SURVEY_PART: 0, PROMPTS_PART: 0}  # parts of each kind

    def __enter__(self) -> CacheWriter:
        settle(self.root)  # all but its name was made by a process that was killed
        if exists(self.root):
            raise Finished
        self.parts.__enter__()
        if exists(self.root):
            self.parts.discard()
            raise Finished
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
        self.parts.share(self._names(kind), lambda name: do(int(name.rpartition("-")[2])))

    def pairs(self, number: int, kind: str = LATENTS_PART) -> PairsPart:
        """A part of the pairs, to be filled; of kind SURVEY_PART it holds no latents."""
        return PairsPart(self, _part(kind, number))

    def prompts(self, number: int) -> PromptsPart:
        """A part of the prompts, to be filled."""
        return PromptsPart(self, _part(PROMPTS_PART, number))

    def done(self, kind: str, count: int) -> list[bool]:
        """Which of the parts 0 .. count-1 are done."""
        return [self.parts.is_done(_part(kind, i)) for i in range(count)]

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
        draft = self.folder / f"{name}.tmp"
        save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, draft)
        draft.chmod(self.parts.mode)  # safetensors gives its files to their owner alone
        sync(draft)
        facts = file_facts(draft)
        draft.replace(self.folder / name)
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
        write_text(self.folder / INFO, json.dumps({"format": FORMAT, **facts}, indent=1))

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
        return map(self.parts.note, self._names(kind))

    def _shard_facts(self, name: str) -> dict[str, Any]:
        note = self.parts.note(name)
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


class CachedPairs:
    """A prepared cache, read through memory maps: N pairs by index 0 .. N-1, in the order of their rows.

    Opening it checks that all files are there in their full length and raises CacheError otherwise; ``verify`` also
    reads them.  origin: URL of the same cache, from which files that are not there are fetched when they are needed.
    """

    def __init__(self, root: Path, origin: str = "") -> None:
        self.root, self.info = root, read_info(root)
        self._origin = remote.Bucket(origin) if origin else None
        self._check_files()
        pairs, prompts = (_read_table(root / name) for name in (PAIRS, PROMPTS))
        self.rows: np.ndarray = pairs["row"]  # int64 [N], row in the source table
        self.uids: np.ndarray = pairs["uid"]  # object [N]
        self.prompt_index: np.ndarray = pairs["prompt"]  # int32 [N], into prompts(); 0 is the empty prompt
        self.rewards = np.stack([pairs["reward_0"], pairs["reward_1"]], axis=1).astype(np.float64)  # [N, 2], NaN: none
        self.labels: np.ndarray = pairs["label_0"].astype(np.float64)  # [N], share of picture 0, NaN: none
        self.texts: np.ndarray = prompts["text"]  # object [P]
        self.shapes: np.ndarray = pairs["shape"]  # int32 [N], into pixels
        self.pixels = np.array(self.info.pixels)  # int [K, 2], height and width of each shape
        frames = np.stack([pairs[name] for name in _frame_columns()], axis=1).reshape(-1, 2, len(FRAME))
        self.frames = frames  # int32 [N, 2, 5], FRAME of each picture
        self.encoded: np.ndarray = pairs["shard"] >= 0  # bool [N]; False: not visited by the run it was made for
        self._place = np.stack([pairs["shard"], pairs["position"]], axis=1)
        self._prompt_place = np.stack([prompts["shard"], prompts["position"]], axis=1)
        self._open = lru_cache(maxsize=_OPEN_SHARDS)(self._map)

    def __len__(self) -> int:
        return len(self.rows)

    def expect(self, wanted: Mapping[str, Any], details: Mapping[str, str] | None = None) -> None:
        """Raise CacheError unless the cache serves this identity (only the entries given are compared).

        A cache with mirrored pictures serves a run without; the scorer is compared if rewards hang on it.
        details: more to say of an entry if it differs.
        """
        found = self.info.identity
        differing = [key for key, value in wanted.items() if found.get(key) != value and self._matters(key, value)]
        if differing:
            listed = "; ".join(
                f"{key} ({SETTING_OF.get(key, key)}): found {_brief(found.get(key))}, wanted {_brief(wanted[key])}"
                + (f" ({details[key]})" if details and details.get(key) else "")
                for key in differing
            )
            raise CacheError(
                f"{self.root}: this cache was prepared with other settings: {listed}. Give data.cache another folder, "
                "or remove this one to have it prepared again, or set what differs back"
            )

    def moments(self, index: Sequence[int] | np.ndarray, flips: np.ndarray) -> tuple[Tensor, Tensor]:
        """Posterior mean and standard deviation of pairs of one shape: float32 [n, 2, C, H, W] each.

        index: n pairs.  flips: bool [n, 2], the mirrored picture 0 or 1.  Raises ValueError for a flip the cache
        does not hold and for pairs of several shapes, CacheError for a pair without latents.
        """
        which, flip = np.asarray(index, dtype=np.int64), np.asarray(flips, dtype=np.int64)
        kinds = np.unique(self.shapes[which])
        if len(kinds) > 1:
            raise ValueError(f"pairs of {len(kinds)} shapes at a time")
        if self.info.flips == 1 and flip.any():
            raise ValueError(f"{self.root} holds no mirrored pictures")
        self._check_encoded(which)
        kind = int(kinds[0]) if len(kinds) else 0
        place, suffix = self._place[which], self._suffix(kind)
        shape = (len(place), 2, *self.info.latent(kind))
        mean, std = np.empty(shape, np.float16), np.empty(shape, np.float16)
        pictures = np.arange(2)
        for shard in np.unique(place[:, 0]):
            here = np.flatnonzero(place[:, 0] == shard)
            stored = self._open(_shard(LATENTS_PART, shard))
            where = (place[here, 1][:, None], pictures, flip[here])
            mean[here], std[here] = stored[f"mean{suffix}"][where], stored[f"std{suffix}"][where]
        return torch.from_numpy(mean).float(), torch.from_numpy(std).float()

    def prompts(self, prompt_indices: Sequence[int] | np.ndarray) -> tuple[Tensor, Tensor | None]:
        """Embeddings of prompts: float32 [n, S, D], and [n, E] for SDXL."""
        place = self._prompt_place[np.asarray(prompt_indices, dtype=np.int64)]
        shapes = {"embeds": self.info.prompt} | ({} if self.info.pooled is None else {"pooled": (self.info.pooled,)})
        # numpy's memory lies in huge pages, of which the first touch costs half
        found = {key: torch.from_numpy(np.empty((len(place), *shape), np.float32)) for key, shape in shapes.items()}
        for row, (shard, position) in enumerate(place):
            stored = self._open(_shard(PROMPTS_PART, shard))
            for key, values in found.items():
                values[row].copy_(torch.from_numpy(stored[key][position].copy()))
        return found["embeds"], found.get("pooled")

    def rejections(self) -> list[tuple[int, str, str]]:
        """Row, uid and reason of every rejected row."""
        table = _read_table(self.root / REJECTED)
        return list(zip(table["row"].tolist(), table["uid"].tolist(), table["reason"].tolist(), strict=True))

    def verify(self) -> list[str]:
        """Read everything: hashes, counts, places and numbers. What is wrong, a line each; nothing if all is well."""
        problems: list[str] = []
        for check in (self._changed_files, self._wrong_index, self._bad_numbers):
            try:
                problems += check()
            except CacheError as error:  # a file that cannot be read at all
                problems.append(str(error))
        return list(dict.fromkeys(problems))

    def _changed_files(self) -> Iterator[str]:
        for name, facts in self.info.files.items():
            if sha256(self._file(name)) != facts["sha256"]:
                what = "its content has changed since it was written (sha256 differs)"
                yield f"{self.root / name}: {what}{self._held(name)}"

    def _held(self, name: str) -> str:
        """Which pairs or prompts a shard holds."""
        kind, _, number = name.partition(".")[0].rpartition("-")
        if kind == LATENTS_PART:
            rows = self.rows[self._place[:, 0] == int(number)]
            return f"; it holds {len(rows)} pairs, rows {rows.min()} to {rows.max()}" if len(rows) else ""
        if kind == PROMPTS_PART:
            texts = self.texts[self._prompt_place[:, 0] == int(number)]
            return f"; it holds {len(texts)} prompts, from {_brief(texts[0])} on" if len(texts) else ""
        return ""

    def _wrong_index(self) -> Iterator[str]:
        rejected = [row for row, _, _ in self.rejections()]
        found = {
            "pairs": len(self), "encoded": int(self.encoded.sum()),
            "prompts": len(self.texts), "rejected": len(rejected),
        }  # fmt: skip
        for what, count in found.items():
            if count != self.info.counts[what]:
                yield f"{self.root}: the index has {count} {what}, {INFO} says {self.info.counts[what]}"
        if (np.diff(self.rows) <= 0).any():
            yield f"{self.root / PAIRS}: rows do not ascend: a pair is there twice or has moved"
        both = sorted(set(rejected) & set(self.rows.tolist()))
        if both:
            yield f"{self.root}: rows {both[:5]} are both used and rejected"
        if not ((0 <= self.prompt_index) & (self.prompt_index < len(self.texts))).all():
            yield f"{self.root / PAIRS}: a pair's prompt is not in {PROMPTS}"
        yield from self._wrong_places()

    def _wrong_places(self) -> Iterator[str]:
        """Shards that do not hold exactly the pairs that the index places there."""
        for shard in np.unique(self._place[self.encoded, 0]):
            name = _shard(LATENTS_PART, shard)
            stored, here = self._open(name), self._place[:, 0] == shard
            for kind in np.unique(self.shapes[here]):
                places = np.sort(self._place[here & (self.shapes == kind), 1])
                mean = stored.get(f"mean{self._suffix(kind)}")
                held = 0 if mean is None else len(mean)
                if not np.array_equal(places, np.arange(held)):
                    what = f"it holds {held} pairs where the index has {len(places)}"
                    yield f"{self.root / name}: {what}{self._held(name)}"

    def _bad_numbers(self) -> Iterator[str]:
        """Numbers that are NaN or infinite, and standard deviations below 0: which pair or prompt has them."""
        for shard in np.unique(self._place[self.encoded, 0]):
            for key, array in self._open(_shard(LATENTS_PART, shard)).items():
                what, _, size = key.partition(".")
                for position in _bad(array, least=0.0 if what == "std" else -np.inf):
                    where = (self._place == (shard, position)).all(axis=1)
                    for pair in np.flatnonzero(where & (not size or self._sizes() == size)):
                        yield (
                            f"{self.root / _shard(LATENTS_PART, shard)}: row {self.rows[pair]} ({self.uids[pair]}): "
                            f"the latents' {what} is not a finite number or below 0"
                        )
        for shard in np.unique(self._prompt_place[:, 0]):
            for array in self._open(_shard(PROMPTS_PART, shard)).values():
                for position in _bad(array):
                    for i in np.flatnonzero((self._prompt_place == (shard, position)).all(axis=1)):
                        file = self.root / _shard(PROMPTS_PART, shard)
                        yield f"{file}: the embedding of prompt {i}, {_brief(self.texts[i])}, is not finite"

    def _sizes(self) -> np.ndarray:
        return np.array([_suffix(size)[1:] for size in self.info.pixels])[self.shapes]

    def _suffix(self, kind: int) -> str:
        return _suffix(self.info.pixels[kind]) if self.info.identity.get("buckets") else ""

    def _matters(self, key: str, wanted: Any) -> bool:
        if key == "flip":
            return bool(wanted)
        return key != "scorer" or self.info.counts["unrewarded"] > 0

    def _check_encoded(self, index: np.ndarray) -> None:
        missing = index[~self.encoded[index]]
        if len(missing):
            raise CacheError(
                f"{self.root}: row {self.rows[missing[0]]} has no latents: the cache was prepared with "
                "data.only_visited for a run that does not visit it; prepare one for this run"
            )

    def _check_files(self) -> None:
        for name, facts in self.info.files.items():
            file = self.root / name
            if not file.is_file():
                if self._origin is not None and name.endswith(".safetensors"):
                    continue
                raise _damaged(file, "is missing")
            if file.stat().st_size != facts["bytes"]:
                raise _damaged(file, f"has {file.stat().st_size} bytes instead of {facts['bytes']}")

    def _file(self, name: str) -> Path:
        """A file of the cache, fetched and compared with its hash where it is not here yet."""
        file = self.root / name
        if self._origin is not None and not file.is_file():
            self._origin.fetch([name], self.root)
            if sha256(file) != self.info.files[name]["sha256"]:
                file.unlink(missing_ok=True)
                raise CacheError(f"{self._origin.url}/{name}: its content is not what {INFO} says (sha256 differs)")
        return file

    def _map(self, name: str) -> dict[str, np.ndarray]:
        """The float16 arrays of a safetensors file (a length, a JSON header, the data), mapped, not read."""
        file = self._file(name)
        try:
            data = np.memmap(file, np.uint8, mode="r")
            start = 8 + int.from_bytes(data[:8].tobytes(), "little")
            header = json.loads(data[8:start].tobytes())
            arrays = {}
            for key, item in header.items():
                if key == "__metadata__":
                    continue
                first, last = (start + offset for offset in item["data_offsets"])
                arrays[key] = data[first:last].view(np.float16).reshape(item["shape"])
            return arrays
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(file, f"cannot be read ({type(error).__name__}: {error})") from error


def fetch_index(root: Path, origin: str) -> bool:
    """Bring the index of a cache at a URL, without its shards, to ``root``; False where there is no cache."""
    bucket = remote.Bucket(origin)
    if bucket.size(INFO) is None:
        return False
    bucket.fetch([PAIRS, PROMPTS, REJECTED, INFO], root)  # the description last: it says that the rest is there
    return True


def send(root: Path, origin: str) -> int:
    """Copy a complete cache to a URL, what is not there yet; returns how many files were copied."""
    files = [name for name in read_info(root).files if (root / name).is_file()]
    return remote.Bucket(origin).send(root, [*files, INFO])


def _part(kind: str, number: int) -> str:
    return f"{kind}-{number:05d}"


def _shard(kind: str, number: int) -> str:
    return f"{_part(kind, number)}.safetensors"


def _suffix(size: Sequence[int]) -> str:
    return f".{size[0]}x{size[1]}"


def _frame_columns() -> list[str]:
    return [f"{name}_{picture}" for picture in range(2) for name in FRAME]


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


def _bad(array: np.ndarray, least: float = -np.inf) -> Iterator[int]:
    """Rows of a float16 array [n, ..] with numbers that are not finite or below ``least``."""
    step = max(1, _SCAN_BYTES // max(1, array[:1].nbytes))
    for first in range(0, len(array), step):
        block = array[first : first + step].reshape(len(array[first : first + step]), -1)
        yield from (int(first + i) for i in np.flatnonzero(~(np.isfinite(block) & (block >= least)).all(axis=1)))


def _entry(values: dict[str, Any]) -> Entry:
    tuples = {name: values[name] and tuple(values[name]) for name in ("rewards", "pixels", "frames")}
    return Entry(**{**values, **tuples, "prompt": sys.intern(values["prompt"])})


def _brief(value: Any) -> str:
    """A value in an error message, shortened where it is a hash or as long as one."""
    text = str(value)
    return repr(value) if len(text) <= 60 else f"'{text[:12]}..{text[-12:]}'"


def _damaged(file: Path, what: str) -> CacheError:
    return CacheError(f"{file}: {what}: the cache is damaged; remove {file.parent} and run 'smpo prepare' again")


def _half(values: Tensor, what: str) -> np.ndarray:
    array = values.detach().cpu().to(torch.float16).numpy()
    if not np.isfinite(array).all():
        bad = "NaN or infinite" if not bool(torch.isfinite(values).all()) else "beyond float16 (65504)"
        raise Unstorable(f"{what} is {bad}")
    return array


def _read_table(file: Path) -> dict[str, np.ndarray]:
    try:
        table = pq.read_table(file)
        return {name: table[name].to_numpy() for name in table.column_names}
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file, f"cannot be read ({error})") from error
