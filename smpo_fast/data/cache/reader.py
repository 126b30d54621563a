"""Reading a cache of encoded pairs."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from smpo_fast.common.errors import environment_problem
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
    CacheError,
    damaged,
    frame_columns,
    read_info,
    shard_name,
)
from smpo_fast.data.cache.integrity import HashChecks

_MAPPED_SHARDS = 4096  # at a time; a process may have about 65,000 memory maps


class CachedPairs:
    """A prepared cache, read through memory maps: N pairs by index 0 .. N-1, in the order of their rows.

    Content is compared with the hashes in ``cache.json``, and CacheError is raised where it differs:

    - Opening the cache checks that all files have their full length, and hashes the index (the parquet files).
    - A shard is hashed when it is first read: one of up to 32 MB before anything is read from it, a larger one in the
      background. The result is awaited by ``finish_checks``, and noticed earlier by the next call that reads.
    - A shard that is fetched is hashed before it gets its name.

    EnvironmentProblem is raised if the machine is the reason why a file cannot be read.

    origin: URL of the same cache, from which missing shards are fetched when they are needed.  check: False leaves
    all sizes and hashes to ``verify``.
    """

    def __init__(self, root: Path, origin: str = "", *, check: bool = True) -> None:
        self.root, self.info = root, read_info(root)
        self._origin = RemoteFolder(origin) if origin else None
        self._checks = HashChecks(self.info) if check else None
        if self._checks is not None:
            self._check_sizes()
            for name in (PAIRS, PROMPTS, REJECTED):
                self._checks.check(name)
        pairs, prompts = (_read_table(root / name) for name in (PAIRS, PROMPTS))
        self.rows: np.ndarray = pairs["row"]  # int64 [N], row in the source table
        self.uids: np.ndarray = pairs["uid"]  # object [N]
        self.prompt_index: np.ndarray = pairs["prompt"]  # int32 [N], into texts; 0 is the empty prompt
        self.rewards = np.stack([pairs["reward_0"], pairs["reward_1"]], axis=1).astype(np.float64)  # [N, 2], NaN: none
        self.labels: np.ndarray = pairs["label_0"].astype(np.float64)  # [N], 1: image 0 is preferred, NaN: no label
        self.texts: np.ndarray = prompts["text"]  # object [P]
        self.shapes: np.ndarray = pairs["shape"]  # int32 [N], into pixels
        self.pixels = np.array(self.info.pixels)  # int [K, 2], height and width of each shape
        frames = np.stack([pairs[name] for name in frame_columns()], axis=1).reshape(-1, 2, len(FRAME))
        self.frames = frames  # int32 [N, 2, 5], FRAME of each image
        self.places = np.stack([pairs["shard"], pairs["position"]], axis=1)  # [N, 2], shard and position of the latents
        self.encoded: np.ndarray = self.places[:, 0] >= 0  # bool [N]; False: not visited by the run it was made for
        self.prompt_places = np.stack([prompts["shard"], prompts["position"]], axis=1)  # [P, 2]
        self._mapped = lru_cache(maxsize=_MAPPED_SHARDS)(self._map)

    def __len__(self) -> int:
        return len(self.rows)

    def moments(self, index: Sequence[int] | np.ndarray, flips: np.ndarray) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's posterior, of n pairs of one shape: float32 [n, 2, C, H, W] each.

        index: n pairs.  flips: bool [n, 2], whether to give the mirrored version of image 0 and image 1.
        Raises ValueError for a flip that the cache does not hold and for pairs of several shapes, and CacheError for
        a pair without latents.
        """
        wanted, flip = np.asarray(index, dtype=np.int64), np.asarray(flips, dtype=np.int64)
        kinds = np.unique(self.shapes[wanted])
        if len(kinds) > 1:
            raise ValueError(f"pairs of {len(kinds)} shapes at a time")
        if self.info.flips == 1 and flip.any():
            raise ValueError(f"{self.root} holds no mirrored images")
        self._check_encoded(wanted)
        kind = int(kinds[0]) if len(kinds) else 0
        places, suffix = self.places[wanted], self.info.suffix(kind)
        shape = (len(places), 2, *self.info.latent(kind))
        mean, std = np.empty(shape, np.float16), np.empty(shape, np.float16)
        images = np.arange(2)
        for shard in np.unique(places[:, 0]):
            here = np.flatnonzero(places[:, 0] == shard)
            stored = self.shard(shard_name(LATENTS_PART, shard))
            where = (places[here, 1][:, None], images, flip[here])
            mean[here], std[here] = stored[f"mean{suffix}"][where], stored[f"std{suffix}"][where]
        return torch.from_numpy(mean).float(), torch.from_numpy(std).float()

    def prompts(self, prompt_indices: Sequence[int] | np.ndarray) -> tuple[Tensor, Tensor | None]:
        """Embeddings of n prompts: float32 [n, S, D], and pooled [n, E] for SDXL."""
        places = self.prompt_places[np.asarray(prompt_indices, dtype=np.int64)]
        shapes = {"embeds": self.info.prompt} | ({} if self.info.pooled is None else {"pooled": (self.info.pooled,)})
        # Memory from numpy, which uses huge pages: touching it for the first time costs half as much as torch's.
        found = {key: torch.from_numpy(np.empty((len(places), *shape), np.float32)) for key, shape in shapes.items()}
        for row, (shard, position) in enumerate(places):
            stored = self.shard(shard_name(PROMPTS_PART, shard))
            for key, values in found.items():
                values[row].copy_(torch.from_numpy(stored[key][position].copy()))
        return found["embeds"], found.get("pooled")

    def rejections(self) -> list[tuple[int, str, str]]:
        """Row, uid and reason of every rejected row."""
        table = _read_table(self.root / REJECTED)
        return list(zip(table["row"].tolist(), table["uid"].tolist(), table["reason"].tolist(), strict=True))

    def shard(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of a shard by name, memory-mapped. Raises CacheError if it is damaged.

        Raises EnvironmentProblem if the machine is the reason why it cannot be read.
        """
        if self._checks is not None:
            self._checks.raise_if_damaged()
        return self._mapped(name)

    def file(self, name: str) -> Path:
        """A file of the cache; a missing one is fetched from the origin. Raises CacheError if that one is damaged."""
        file = self.root / name
        if self._origin is not None and not file.is_file():
            self._origin.fetch([name], self.root, accept=self._accept)
            if self._checks is not None:
                self._checks.mark_checked(name)
        return file

    def finish_checks(self) -> None:
        """Wait until all shards that were read have been hashed. Raises CacheError if one is damaged."""
        if self._checks is not None:
            self._checks.finish()

    def _accept(self, name: str, fetched: Path) -> None:
        if sha256(fetched) != self.info.files[name]["sha256"]:
            url = self._origin.url if self._origin else ""
            raise CacheError(f"{url}/{name}: its content is not what {INFO} says (sha256 differs)")

    def _check_encoded(self, index: np.ndarray) -> None:
        missing = index[~self.encoded[index]]
        if len(missing):
            raise CacheError(
                f"{self.root}: row {self.rows[missing[0]]} has no latents: the cache was prepared with "
                "data.only_visited for a run that does not visit it; prepare one for this run"
            )

    def _check_sizes(self) -> None:
        for name, facts in self.info.files.items():
            file = self.root / name
            if not file.is_file():
                if self._origin is not None and name.endswith(".safetensors"):
                    continue
                raise damaged(file, "is missing")
            if file.stat().st_size != facts["bytes"]:
                raise damaged(file, f"has {file.stat().st_size} bytes instead of {facts['bytes']}")

    def _map(self, name: str) -> dict[str, np.ndarray]:
        """Map the float16 arrays of a safetensors file, which is a length, a JSON header and the data."""
        file = self.file(name)
        if self._checks is not None:
            self._checks.check_soon(name)
        try:
            data = _map_file(file)
            start = 8 + int.from_bytes(data[:8].tobytes(), "little")
            header = json.loads(data[8:start].tobytes())
            arrays = {}
            for key, item in header.items():
                if key == "__metadata__":
                    continue
                first, last = (start + offset for offset in item["data_offsets"])
                arrays[key] = data[first:last].view(np.float16).reshape(item["shape"])
            return arrays
        except (OSError, MemoryError, RuntimeError, ValueError, KeyError, TypeError) as error:
            problem = f"cannot be read ({type(error).__name__}: {error})"
            raise environment_problem(error, file) or damaged(file, problem) from error


def _map_file(file: Path) -> np.ndarray:
    """The bytes of a file, memory-mapped: uint8 [n]. Writing to them does not change the file.

    Unlike maps of numpy and of Python's mmap, this one keeps no file descriptor: a cache may have more shards than a
    process may have open files.
    """
    with file.open("rb") as stream:  # raises an OSError with its number, unlike torch
        size = os.fstat(stream.fileno()).st_size
    return torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8).numpy()


def _read_table(file: Path) -> dict[str, np.ndarray]:
    try:
        table = pq.read_table(file)
        return {name: table[name].to_numpy() for name in table.column_names}
    except (pa.ArrowException, OSError, MemoryError, RuntimeError) as error:
        raise environment_problem(error, file) or damaged(file, f"cannot be read ({error})") from error
