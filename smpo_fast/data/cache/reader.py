"""Reading and verifying a cache of encoded pairs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from smpo_fast.common.remote import RemoteFolder
from smpo_fast.common.storage import sha256
from smpo_fast.data.cache.format import (
    FRAME,
    INFO,
    LATENTS_PART,
    PAIRS,
    PROMPTS,
    PROMPTS_PART,
    REJECTED,
    SETTING_OF,
    CacheError,
    _brief,
    _damaged,
    _frame_columns,
    _shard,
    _suffix,
    read_info,
)

_OPEN_SHARDS = 128  # memory maps hold a file descriptor each, of which a process has about 1000
_SCAN_BYTES = 64 << 20


class CachedPairs:
    """A prepared cache, read through memory maps: N pairs by index 0 .. N-1, in the order of their rows.

    Opening it checks that all files are there in their full length and raises CacheError otherwise; ``verify`` also
    reads them.  origin: URL of the same cache, from which files that are not there are fetched when they are needed.
    """

    def __init__(self, root: Path, origin: str = "") -> None:
        self.root, self.info = root, read_info(root)
        self._origin = RemoteFolder(origin) if origin else None
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
    bucket = RemoteFolder(origin)
    if bucket.size(INFO) is None:
        return False
    bucket.fetch([PAIRS, PROMPTS, REJECTED, INFO], root)  # the description last: it says that the rest is there
    return True


def send(root: Path, origin: str) -> int:
    """Copy a complete cache to a URL, what is not there yet; returns how many files were copied."""
    files = [name for name in read_info(root).files if (root / name).is_file()]
    return RemoteFolder(origin).send(root, [*files, INFO])


def _bad(array: np.ndarray, least: float = -np.inf) -> Iterator[int]:
    """Rows of a float16 array [n, ..] with numbers that are not finite or below ``least``."""
    step = max(1, _SCAN_BYTES // max(1, array[:1].nbytes))
    for first in range(0, len(array), step):
        block = array[first : first + step].reshape(len(array[first : first + step]), -1)
        yield from (int(first + i) for i in np.flatnonzero(~(np.isfinite(block) & (block >= least)).all(axis=1)))


def _read_table(file: Path) -> dict[str, np.ndarray]:
    try:
        table = pq.read_table(file)
        return {name: table[name].to_numpy() for name in table.column_names}
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file, f"cannot be read ({error})") from error
