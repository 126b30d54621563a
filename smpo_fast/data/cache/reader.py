"""Reading a cache of encoded pairs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

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
    CacheError,
    damaged,
    frame_columns,
    read_info,
    shard_name,
)

_OPEN_SHARDS = 128  # each memory map holds a file descriptor, of which a process has about 1000


class CachedPairs:
    """A prepared cache, read through memory maps: N pairs by index 0 .. N-1, in the order of their rows.

    Opening it checks that all files are there in their full length and raises CacheError otherwise; ``verify`` also
    checks their content.  origin: URL of the same cache, from which missing shards are fetched when they are needed.
    """

    def __init__(self, root: Path, origin: str = "") -> None:
        self.root, self.info = root, read_info(root)
        self._origin = RemoteFolder(origin) if origin else None
        self._check_files()
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
        self._mapped = lru_cache(maxsize=_OPEN_SHARDS)(self._map)

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
        """The arrays of a shard by name, memory-mapped. Raises CacheError if it cannot be read."""
        return self._mapped(name)

    def file(self, name: str) -> Path:
        """A file of the cache; a missing one is fetched from the origin. Raises CacheError if that one is damaged."""
        file = self.root / name
        if self._origin is not None and not file.is_file():
            self._origin.fetch([name], self.root)
            if sha256(file) != self.info.files[name]["sha256"]:
                file.unlink(missing_ok=True)
                raise CacheError(f"{self._origin.url}/{name}: its content is not what {INFO} says (sha256 differs)")
        return file

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
                raise damaged(file, "is missing")
            if file.stat().st_size != facts["bytes"]:
                raise damaged(file, f"has {file.stat().st_size} bytes instead of {facts['bytes']}")

    def _map(self, name: str) -> dict[str, np.ndarray]:
        """Map the float16 arrays of a safetensors file, which is a length, a JSON header and the data."""
        file = self.file(name)
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
            raise damaged(file, f"cannot be read ({type(error).__name__}: {error})") from error


def _read_table(file: Path) -> dict[str, np.ndarray]:
    try:
        table = pq.read_table(file)
        return {name: table[name].to_numpy() for name in table.column_names}
    except (pa.ArrowException, OSError) as error:
        raise damaged(file, f"cannot be read ({error})") from error
