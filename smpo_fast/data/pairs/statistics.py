"""Statistics of a written pair table, for its summary: labels, sizes, and how often images and prompts repeat."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from smpo_fast.data import images
from smpo_fast.method.labels import TIE

_COLUMNS = ["caption", "label_0", "reward_0", "hash_0", "hash_1", "width_0", "height_0", "width_1", "height_1"]


def table_statistics(files: Sequence[Path]) -> dict[str, Any]:
    """Counts over the parts of a table, read from all columns but the images: some hundred bytes of memory a pair."""
    found = _read_columns(files)
    label, prompts = found["label_0"], found["caption"]
    labelled, decided = np.isfinite(label), np.isfinite(label) & (label != TIE)
    scored = np.isfinite(found["reward_0"].astype(float))
    sides = np.minimum(*(np.minimum(found[f"width_{i}"], found[f"height_{i}"]) for i in (0, 1)))
    _, per_image = np.unique(np.concatenate([found["hash_0"], found["hash_1"]]), return_counts=True)
    distinct_prompts, per_prompt = np.unique(prompts, return_counts=True)
    quantiles = np.quantile(sides, (0, 0.5, 1), method="nearest").astype(int).tolist() if len(sides) else [0] * 3
    unequal = (found["width_0"] != found["width_1"]) | (found["height_0"] != found["height_1"])
    return {
        "labelled": int(labelled.sum()),
        "ties": int((labelled & ~decided).sum()),
        "first_preferred": float((label[decided] > TIE).mean()) if decided.any() else 0.0,
        "scored": int(scored.sum()),
        "undecided": int((~labelled & ~scored).sum()),
        "pictures": len(per_image),
        "pictures_in_several_pairs": int((per_image > 1).sum()),
        "prompts": len(distinct_prompts),
        "pairs_of_commonest_prompt": int(per_prompt.max(initial=0)),
        "empty_prompts": int((prompts == images.content_hash(b"")).sum()),
        "shorter_side": quantiles,
        "unequal_sizes": int(unequal.sum()),
        **_repetitions(found["hash_0"], found["hash_1"], prompts, np.where(decided, label > TIE, -1)),
    }


def _read_columns(files: Sequence[Path]) -> dict[str, np.ndarray]:
    """Arrays [N] by column, of captions their hashes."""
    columns: dict[str, list[np.ndarray]] = {name: [np.zeros(0)] for name in _COLUMNS}
    columns |= {name: [np.zeros(0, np.uint64)] for name in ("caption", "hash_0", "hash_1")}
    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(4096, columns=_COLUMNS):
            for name in _COLUMNS:
                values = batch.column(name)
                columns[name].append(
                    _text_hashes(values) if name == "caption" else values.to_numpy(zero_copy_only=False)
                )
    return {name: np.concatenate(parts) for name, parts in columns.items()}


def _repetitions(hash_0: np.ndarray, hash_1: np.ndarray, prompts: np.ndarray, first: np.ndarray) -> dict[str, int]:
    """How many pairs have the two images and the prompt of an earlier pair.

    hash_0, hash_1, prompts: uint64 [N].  first: [N], 1 where image 0 is preferred, 0 where image 1 is, -1 where
    neither.
    """
    swapped = hash_0 > hash_1
    low, high = np.where(swapped, hash_1, hash_0), np.where(swapped, hash_0, hash_1)
    key = (low * np.uint64(0x9E3779B97F4A7C15) ^ high) * np.uint64(0xC2B2AE3D27D4EB4F) ^ prompts
    _, origin, group = np.unique(key, return_index=True, return_inverse=True)
    earlier = origin[group]
    again = earlier != np.arange(len(key))
    turned = again & (swapped != swapped[earlier])
    lower_wins = np.where(first < 0, -1, np.where(swapped, 1 - first, first))
    known = (lower_wins >= 0) & (lower_wins[earlier] >= 0)
    return {
        "repeated_pairs": int(again.sum()),
        "swapped_pairs": int(turned.sum()),
        "contradicting_pairs": int((again & known & (lower_wins != lower_wins[earlier])).sum()),
    }


def _text_hashes(texts: pa.Array) -> np.ndarray:
    return np.array([images.content_hash(text.encode()) for text in texts.to_pylist()], np.uint64)
