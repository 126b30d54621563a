"""The parts of a cache in preparation: pairs with their latents, and prompts with their embeddings.

A part becomes one shard. What has been added to it survives a kill of the process (smpo_fast.common.shared_work).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor

from smpo_fast.common.shared_work import SharedWork
from smpo_fast.common.storage import atomic_write, file_facts
from smpo_fast.data.cache.format import Entry, Unstorable, size_suffix


class PairsPart:
    """Consecutive rows of the pair table: ``add`` or ``reject`` each, ``commit`` after every few, then ``close``.

    by_size: whether the shard holds tensors of several shapes, named after their size.
    """

    def __init__(self, work: SharedWork, name: str, *, by_size: bool) -> None:
        self._work, self._name, self._by_size = work, name, by_size
        self._draft = work.draft(name)
        self._entries: list[dict[str, Any]] = []
        self._shapes: list[tuple[int, ...]] = []
        self._blobs: list[bytes] = []
        self._rejected: list[tuple[int, str, str]] = []

    @property
    def next_row(self) -> int:
        """Rows below this one have been committed, perhaps by a process that was killed; 0 at the beginning."""
        return self._draft.records[-1]["next_row"] if self._draft.records else 0

    def reject(self, row: int, uid: str, reason: str) -> None:
        """Record a row that cannot be used."""
        self._rejected.append((row, uid, reason))

    def add(self, entry: Entry, mean: Tensor | None = None, std: Tensor | None = None) -> None:
        """Add a pair. mean, std: float32 [2, F, C, H, W], stored as float16; a survey has none.

        Raises Unstorable, and adds nothing, if a number is NaN, infinite or beyond float16.
        """
        arrays = [
            _to_float16(tensor, f"row {entry.row}: latent {name}")
            for name, tensor in (("mean", mean), ("std", std))
            if tensor is not None
        ]
        self._entries.append(asdict(entry))
        if arrays:
            self._shapes.append(arrays[0].shape[1:])
            self._blobs += [array.tobytes() for array in arrays]

    def commit(self, next_row: int) -> None:
        """Write what was added to the disk; a process that resumes the part begins at ``next_row``."""
        record = {
            "next_row": next_row, "entries": self._entries, "rejected": self._rejected, "shapes": self._shapes,
        }  # fmt: skip
        self._draft.append(record, self._blobs)
        self._entries, self._shapes, self._blobs, self._rejected = [], [], [], []

    def close(self) -> dict[str, Any]:
        """Write the shard; returns the part's manifest."""
        records = self._draft.records
        entries = [entry for record in records for entry in record["entries"]]
        shapes = [tuple(shape) for record in records for shape in record["shapes"]]
        manifest: dict[str, Any] = {
            "entries": entries,
            "rejected": [row for record in records for row in record["rejected"]],
            "name": f"{self._name}.safetensors",
            "file": None,
            "latent": None,
        }
        if shapes:
            flips, channels, height, _ = shapes[0]
            manifest["latent"] = {"flips": flips, "channels": channels, "factor": entries[0]["pixels"][0] // height}
            suffixes = [size_suffix(entry["pixels"]) if self._by_size else "" for entry in entries]
            tensors = _gather(self._draft.mapped(), shapes, suffixes)
            manifest["file"] = _save(self._work, manifest["name"], tensors)
        return manifest


class PromptsPart:
    """Consecutive prompts: ``add`` a few at a time, then ``close``."""

    def __init__(self, work: SharedWork, name: str) -> None:
        self._work, self._name, self._draft = work, name, work.draft(name)

    @property
    def done(self) -> int:
        """How many prompts have been added, perhaps by a process that was killed."""
        return sum(record["count"] for record in self._draft.records)

    def add(self, embeds: Tensor, pooled: Tensor | None) -> None:
        """Add the next n prompts. embeds: [n, S, D].  pooled: [n, E] or None.  Raises Unstorable as ``PairsPart``."""
        arrays = [_to_float16(embeds, f"the embedding of one of {len(embeds)} prompts")]
        if pooled is not None:
            arrays.append(_to_float16(pooled, f"the pooled embedding of one of {len(embeds)} prompts"))
        width = None if pooled is None else pooled.shape[1]
        record = {"count": len(embeds), "shape": embeds.shape[1:], "pooled": width}
        self._draft.append(record, [array.tobytes() for array in arrays])

    def close(self) -> dict[str, Any]:
        """Write the shard; returns the part's manifest."""
        first, data, offset = self._draft.records[0], self._draft.mapped(), 0
        shapes = {"embeds": tuple(first["shape"])} | ({"pooled": (first["pooled"],)} if first["pooled"] else {})
        pieces: dict[str, list[np.ndarray]] = {key: [] for key in shapes}
        for record in self._draft.records:
            for key, shape in shapes.items():
                size = record["count"] * math.prod(shape)
                pieces[key].append(np.frombuffer(data, np.float16, size, offset).reshape(record["count"], *shape))
                offset += 2 * size
        name = f"{self._name}.safetensors"
        facts = _save(self._work, name, {key: np.concatenate(found) for key, found in pieces.items()})
        return {"name": name, "file": facts, "count": self.done, "shape": first["shape"], "pooled": first["pooled"]}


def shard_is_intact(folder: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether the shard of a finished part, if it has one, still has its size."""
    return manifest["file"] is None or (folder / manifest["name"]).stat().st_size == manifest["file"]["bytes"]


def _save(work: SharedWork, name: str, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Write a shard; returns its size and hash."""
    with atomic_write(work.folder / name) as draft:
        save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, draft)
        draft.chmod(work.mode)  # safetensors makes its files readable by their owner only
        facts = file_facts(draft)
    return facts


def _gather(data: memoryview, shapes: Sequence[tuple[int, ...]], suffixes: Sequence[str]) -> dict[str, np.ndarray]:
    """The tensors of a shard, from the bytes of its pairs.

    shapes: F, C, H, W of each pair.  suffixes: what the names of each pair's tensors end in.
    """
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


def _to_float16(values: Tensor, what: str) -> np.ndarray:
    array = values.detach().cpu().to(torch.float16).numpy()
    if not np.isfinite(array).all():
        problem = "NaN or infinite" if not bool(torch.isfinite(values).all()) else "beyond float16 (65504)"
        raise Unstorable(f"{what} is {problem}")
    return array
