"""The on-disk format of encoded pairs: write, verify, read.

A cache is a folder (docs/data.md) that appears under its name only when it is complete::

    cache.json                   format, identity, counts, shapes, and size and sha256 of every other file
    pairs.parquet                one row a pair: row, uid, prompt, reward_0, reward_1, label_0, scored, shard, position
    prompts.parquet              one row a distinct prompt: text, shard, position; prompt 0 is the empty one
    rejected.parquet             one row a rejected row: row, uid, reason
    latents-00000.safetensors    mean, std: float16 [n, 2 pictures, F, C, H, W]; F = 2: as it is and mirrored, else 1
    prompts-00000.safetensors    embeds: float16 [n, S, D]; pooled: float16 [n, E] (SDXL)

Until then it grows in a hidden folder beside it, ``.NAME.partial``, where every finished shard has a note
``part-00000.json`` of the rows it covers.  An interrupted preparation is taken up after the last note.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.numpy import save_file
from torch import Tensor

from smpo_fast.config import SettingsError

FORMAT = 1
SHARD_BYTES = 256 << 20
INFO, PAIRS, PROMPTS, REJECTED = "cache.json", "pairs.parquet", "prompts.parquet", "rejected.parquet"
_MARK = "identity.json"  # in an unfinished cache: what it will be a cache of
_OPEN_SHARDS = 128  # memory maps hold a file descriptor each, of which a process has about 1000

# The entries of an identity, and the settings they come from.
SETTING_OF = {
    "source": "data.pairs",
    "max_pairs": "data.max_pairs",
    "kind": "model.path",
    "encoders": "model.path or model.vae",
    "resolution": "data.resolution",
    "flip": "data.flip",
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


@dataclass(frozen=True)
class CacheInfo:
    """What ``cache.json`` says."""

    root: Path
    identity: dict[str, Any]
    source: dict[str, Any]  # data.pairs as given, and size, time and sha256 of its files
    counts: dict[str, int]  # pairs, rejected, prompts, stored, scored, unrewarded
    latent: tuple[int, int, int]  # C, H, W
    flips: int  # 2: both, 1: as it is
    prompt: tuple[int, int]  # S, D
    pooled: int | None  # E
    rewards: tuple[float, float] | None  # least and greatest
    files: dict[str, dict[str, Any]]  # name -> bytes, sha256
    versions: dict[str, str]

    @property
    def bytes(self) -> int:
        return sum(file["bytes"] for file in self.files.values())


def exists(root: Path) -> bool:
    """Whether there is a complete cache (nothing is said of its health)."""
    return (root / INFO).is_file()


def file_facts(file: Path) -> dict[str, Any]:
    """Size and sha256 of a file."""
    return {"bytes": file.stat().st_size, "sha256": _sha256(file)}


def combined(hashes: Sequence[str]) -> str:
    """One sha256 for an ordered list of them."""
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


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
        fields |= {name: tuple(fields[name]) for name in ("latent", "prompt")}
        fields["rewards"] = None if fields["rewards"] is None else tuple(fields["rewards"])
        return CacheInfo(root, **fields)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, CacheError):
            raise
        raise _damaged(file, f"cannot be read ({type(error).__name__}: {error})") from error


class CacheWriter:
    """Writes a cache: pairs and rejections in row order, then the prompts, then ``finish``.

    As a context manager it holds a lock, which the system releases however the process ends.  Raises SettingsError
    when the target exists already, or another process is preparing it.
    """

    def __init__(
        self,
        root: Path,
        identity: Mapping[str, Any],
        source: Mapping[str, Any],
        *,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise SettingsError(f"data.cache: {root} exists already: remove it, or give data.cache another folder")
        self.root, self.folder = root, root.parent / f".{root.name}.partial"
        self.identity, self.source, self.shard_bytes = dict(identity), dict(source), shard_bytes
        self.entries: list[Entry] = []
        self.rejected: list[tuple[int, str, str]] = []
        self._parts: list[dict[str, Any]] = []  # notes of the finished shards
        self._buffer: list[tuple[np.ndarray, np.ndarray]] = []
        self._files: dict[str, dict[str, Any]] = {}
        self._prompts: dict[str, int] = {"": 0}
        self._encoded: list[tuple[int, int]] = []  # shard and position of each encoded prompt
        self._prompt_shape: tuple[int, int] = (0, 0)
        self._pooled: int | None = None

    def __enter__(self) -> CacheWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise SettingsError(
                f"data.cache: another process is preparing {self.root}: wait for it or end it"
            ) from error
        self._take_up()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._parts:
            shutil.rmtree(self.folder, ignore_errors=True)  # nothing that a next run could take up
        self._lock.close()

    @property
    def next_row(self) -> int:
        """Rows below this one are in finished shards already."""
        return self._parts[-1]["next_row"] if self._parts else 0

    @property
    def pair_bytes(self) -> int:
        """Size of a pair's latents on disk; 0 before the first."""
        shapes = [mean.shape for mean, _ in self._buffer[:1]] or [(2, *part["shape"]) for part in self._parts[:1]]
        return sum(2 * 2 * math.prod(shape) for shape in shapes)  # mean and std, two bytes a number

    def reject(self, row: int, uid: str, reason: str) -> None:
        self.rejected.append((row, uid, reason))

    def add(self, entry: Entry, mean: Tensor, std: Tensor) -> None:
        """Add a pair, rows ascending. mean, std: float32 [2, F, C, H, W], kept as float16.

        Raises Unstorable, and adds nothing, when a number is NaN, infinite or beyond float16.
        """
        kept = tuple(
            _half(tensor, f"row {entry.row}: latent {name}") for name, tensor in (("mean", mean), ("std", std))
        )
        self._buffer.append((kept[0], kept[1]))
        self.entries.append(replace(entry, prompt=sys.intern(entry.prompt)))  # prompts repeat: one string each

    def commit(self) -> None:
        """Write a shard when enough has come together; where to call it decides where a resumed run begins."""
        if self._buffer and len(self._buffer) * 2 * self._buffer[0][0].nbytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting."""
        if not self._buffer:
            return
        number, waiting = len(self._parts), self.entries[-len(self._buffer) :]
        next_row = waiting[-1].row + 1
        arrays = [np.stack(arrays) for arrays in zip(*self._buffer, strict=True)]
        name = _latents(number)
        facts = self._save(name, {"mean": arrays[0], "std": arrays[1]})
        rejected = sorted(r for r in self.rejected if self.next_row <= r[0] < next_row)
        part = {"next_row": next_row, "file": facts, "shape": arrays[0].shape[2:], "pairs": len(waiting)}
        note = {**part, "entries": [asdict(entry) for entry in waiting], "rejected": rejected}
        _write_text(self.folder / _part(number), json.dumps(note))
        self._parts.append(part)
        self._buffer.clear()

    def prompts(self) -> list[str]:
        """The distinct prompts of the pairs in order of appearance, the empty one first."""
        for entry in self.entries:
            self._prompts.setdefault(entry.prompt, len(self._prompts))
        return list(self._prompts)

    def add_prompts(self, embeds: Tensor, pooled: Tensor | None) -> None:
        """Write the embeddings of the next n of ``prompts()`` as a shard. embeds [n, S, D]; pooled [n, E] or None."""
        shard = self._encoded[-1][0] + 1 if self._encoded else 0
        arrays = {"embeds": _half(embeds, f"prompts from {len(self._encoded)} on")}
        if pooled is not None:
            arrays["pooled"] = _half(pooled, f"pooled prompts from {len(self._encoded)} on")
            self._pooled = pooled.shape[1]
        self._prompt_shape = (embeds.shape[1], embeds.shape[2])
        self._files[_embeds(shard)] = self._save(_embeds(shard), arrays)
        self._encoded += [(shard, position) for position in range(len(embeds))]

    def finish(self, counts: Mapping[str, int]) -> CacheInfo:
        """Write the index and give the cache its name. counts: more numbers for ``cache.json``."""
        self.flush()
        self.rejected.sort()
        texts = self.prompts()
        if not self._parts or len(self._encoded) != len(texts):
            raise ValueError(f"{len(self.entries)} pairs, {len(self._encoded)} of {len(texts)} prompts: not complete")
        self._files |= {_latents(i): part["file"] for i, part in enumerate(self._parts)}
        self._save_tables(texts)
        values = np.array([e.rewards for e in self.entries if e.rewards is not None])
        *_, channels, height, width = self._parts[0]["shape"]
        info = CacheInfo(
            root=self.root,
            identity=self.identity,
            source=self.source,
            counts={
                "pairs": len(self.entries),
                "rejected": len(self.rejected),
                "prompts": len(texts),
                **counts,
            },
            latent=(channels, height, width),
            flips=self._parts[0]["shape"][0],
            prompt=self._prompt_shape,
            pooled=self._pooled,
            rewards=(float(values.min()), float(values.max())) if len(values) else None,
            files=dict(sorted(self._files.items())),
            versions={name: version(name) for name in ("torch", "numpy", "pillow", "diffusers", "transformers")},
        )
        facts = {key: value for key, value in asdict(info).items() if key != "root"}
        _write_text(self.folder / INFO, json.dumps({"format": FORMAT, **facts}, indent=1))
        for name in ("lock", _MARK, *map(_part, range(len(self._parts)))):
            (self.folder / name).unlink()
        os.replace(self.folder, self.root)
        _sync(self.root.parent)
        return info

    def _save_tables(self, texts: Sequence[str]) -> None:
        place = [(shard, i) for shard, part in enumerate(self._parts) for i in range(part["pairs"])]
        rewards = [e.rewards or (None, None) for e in self.entries]
        pairs = {
            "row": pa.array([e.row for e in self.entries], pa.int64()),
            "uid": pa.array([e.uid for e in self.entries], pa.string()),
            "prompt": pa.array([self._prompts[e.prompt] for e in self.entries], pa.int32()),
            "reward_0": pa.array([r[0] for r in rewards], pa.float64()),
            "reward_1": pa.array([r[1] for r in rewards], pa.float64()),
            "label_0": pa.array([e.label for e in self.entries], pa.float64()),
            "scored": pa.array([e.scored for e in self.entries], pa.bool_()),
            "shard": pa.array([p[0] for p in place], pa.int32()),
            "position": pa.array([p[1] for p in place], pa.int32()),
        }
        prompts = {
            "text": pa.array(texts, pa.string()),
            "shard": pa.array([p[0] for p in self._encoded], pa.int32()),
            "position": pa.array([p[1] for p in self._encoded], pa.int32()),
        }
        rejected = {
            "row": pa.array([r[0] for r in self.rejected], pa.int64()),
            "uid": pa.array([r[1] for r in self.rejected], pa.string()),
            "reason": pa.array([r[2] for r in self.rejected], pa.string()),
        }
        for name, columns in ((PAIRS, pairs), (PROMPTS, prompts), (REJECTED, rejected)):
            pq.write_table(pa.table(columns), self.folder / name)
            _sync(self.folder / name)
            self._files[name] = file_facts(self.folder / name)

    def _save(self, name: str, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, self.folder / name)
        # safetensors gives its files to their owner alone: make them as readable as any other file.
        (self.folder / name).chmod(os.fstat(self._lock.fileno()).st_mode & 0o777)
        _sync(self.folder / name)
        return file_facts(self.folder / name)

    def _take_up(self) -> None:
        """Keep the finished shards of an interrupted preparation of the same cache, and remove everything else."""
        mark = self.folder / _MARK
        same = mark.is_file() and mark.read_text() == json.dumps(self.identity, sort_keys=True)
        while same and (note := self._read_note(len(self._parts))) is not None:
            self.entries += [_entry(values) for values in note.pop("entries")]
            self.rejected += [(row, uid, reason) for row, uid, reason in note.pop("rejected")]
            self._parts.append(note)
        keep = {"lock"} | {name(i) for i in range(len(self._parts)) for name in (_part, _latents)}
        for file in self.folder.iterdir():
            if file.name not in keep:
                shutil.rmtree(file) if file.is_dir() else file.unlink()
        _write_text(mark, json.dumps(self.identity, sort_keys=True))

    def _read_note(self, number: int) -> dict[str, Any] | None:
        shard = self.folder / _latents(number)
        try:
            note = json.loads((self.folder / _part(number)).read_text())
            return note if shard.stat().st_size == note["file"]["bytes"] else None
        except (OSError, ValueError, KeyError):
            return None


class CachedPairs:
    """A prepared cache, read through memory maps: N pairs by index 0 .. N-1, in the order of their rows.

    Opening it checks that all files are there in their full length and raises CacheError otherwise;
    ``verify`` also reads them.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.info = root, read_info(root)
        self._check_files()
        pairs, prompts = (_read_table(root / name) for name in (PAIRS, PROMPTS))
        self.rows: np.ndarray = pairs["row"]  # int64 [N], row in the source table
        self.uids: np.ndarray = pairs["uid"]  # object [N]
        self.prompt_index: np.ndarray = pairs["prompt"]  # int32 [N], into prompts(); 0 is the empty prompt
        self.rewards = np.stack([pairs["reward_0"], pairs["reward_1"]], axis=1).astype(np.float64)  # [N, 2], NaN: none
        self.labels: np.ndarray = pairs["label_0"].astype(np.float64)  # [N], share of picture 0, NaN: none
        self.texts: np.ndarray = prompts["text"]  # object [P]
        self._place = np.stack([pairs["shard"], pairs["position"]], axis=1)
        self._prompt_place = np.stack([prompts["shard"], prompts["position"]], axis=1)
        self._open = lru_cache(maxsize=_OPEN_SHARDS)(self._map)

    def __len__(self) -> int:
        return len(self.rows)

    def expect(self, wanted: Mapping[str, Any]) -> None:
        """Raise CacheError unless the cache serves this identity (only the entries given are compared).

        A cache with mirrored pictures serves a run without; the scorer is compared if rewards hang on it.
        """
        found = self.info.identity
        differing = [key for key, value in wanted.items() if found.get(key) != value and self._matters(key, value)]
        if differing:
            listed = "; ".join(
                f"{key} ({SETTING_OF.get(key, key)}): found {_brief(found.get(key))}, wanted {_brief(wanted[key])}"
                for key in differing
            )
            raise CacheError(
                f"{self.root}: this cache was prepared with other settings: {listed}. Give data.cache another folder, "
                "or remove this one to have it prepared again, or set what differs back"
            )

    def moments(self, index: Sequence[int] | np.ndarray, flips: np.ndarray) -> tuple[Tensor, Tensor]:
        """Posterior mean and standard deviation of pairs: float32 [n, 2, C, H, W] each.

        index: n pairs.  flips: bool [n, 2], the mirrored picture 0 or 1.  Raises ValueError for a flip the cache
        does not hold.
        """
        flip = np.asarray(flips, dtype=np.int64)
        if self.info.flips == 1 and flip.any():
            raise ValueError(f"{self.root} holds no mirrored pictures")
        place = self._place[np.asarray(index, dtype=np.int64)]
        shape = (len(place), 2, *self.info.latent)
        mean, std = np.empty(shape, np.float16), np.empty(shape, np.float16)
        pictures = np.arange(2)
        for shard in np.unique(place[:, 0]):
            here = np.flatnonzero(place[:, 0] == shard)
            stored = self._open(_latents(shard))
            where = (place[here, 1][:, None], pictures, flip[here])
            mean[here], std[here] = stored["mean"][where], stored["std"][where]
        return torch.from_numpy(mean).float(), torch.from_numpy(std).float()

    def prompts(self, prompt_indices: Sequence[int] | np.ndarray) -> tuple[Tensor, Tensor | None]:
        """Embeddings of prompts: float32 [n, S, D], and [n, E] for SDXL."""
        place = self._prompt_place[np.asarray(prompt_indices, dtype=np.int64)]
        embeds = np.empty((len(place), *self.info.prompt), np.float16)
        pooled = None if self.info.pooled is None else np.empty((len(place), self.info.pooled), np.float16)
        for shard in np.unique(place[:, 0]):
            here = np.flatnonzero(place[:, 0] == shard)
            stored, where = self._open(_embeds(shard)), place[here, 1]
            embeds[here] = stored["embeds"][where]
            if pooled is not None:
                pooled[here] = stored["pooled"][where]
        return torch.from_numpy(embeds).float(), None if pooled is None else torch.from_numpy(pooled).float()

    def rejections(self) -> list[tuple[int, str, str]]:
        """Row, uid and reason of every rejected row."""
        table = _read_table(self.root / REJECTED)
        return list(zip(table["row"].tolist(), table["uid"].tolist(), table["reason"].tolist(), strict=True))

    def verify(self) -> list[str]:
        """Read every file and compare it with its sha256; what is wrong, a line a file, and nothing if all is well."""
        wrong = (name for name, facts in self.info.files.items() if _sha256(self.root / name) != facts["sha256"])
        return [f"{self.root / name}: its content has changed since it was written (sha256 differs)" for name in wrong]

    def _matters(self, key: str, wanted: Any) -> bool:
        if key == "flip":
            return bool(wanted)
        return key != "scorer" or self.info.counts["unrewarded"] > 0

    def _check_files(self) -> None:
        for name, facts in self.info.files.items():
            file = self.root / name
            if not file.is_file():
                raise _damaged(file, "is missing")
            if file.stat().st_size != facts["bytes"]:
                raise _damaged(file, f"has {file.stat().st_size} bytes instead of {facts['bytes']}")

    def _map(self, name: str) -> dict[str, np.ndarray]:
        """The float16 arrays of a safetensors file (a length, a JSON header, the data), mapped, not read."""
        file = self.root / name
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


def _latents(number: int) -> str:
    return f"latents-{number:05d}.safetensors"


def _embeds(number: int) -> str:
    return f"prompts-{number:05d}.safetensors"


def _part(number: int) -> str:
    return f"part-{number:05d}.json"


def _entry(values: dict[str, Any]) -> Entry:
    rewards = values["rewards"]
    return Entry(**{**values, "prompt": sys.intern(values["prompt"]), "rewards": rewards and (rewards[0], rewards[1])})


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


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_text(file: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    draft = file.with_name(file.name + ".tmp")
    draft.write_text(text)
    _sync(draft)
    os.replace(draft, file)


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
