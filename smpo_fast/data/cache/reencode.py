"""Encoding a sample of a cache's pairs and prompts again, and comparing them with what is stored.

The networks compute in float32 as when the cache was prepared, and the cache stores float16. Sums are rounded
otherwise in batches of another size and on another device: with float32 that changes a float16 number by one unit in
the last place at most, which is 2**-10 of it; TOLERANCE is twice that, and relative to the root mean square of the
tensor for numbers near zero. Other pixels, another prompt or another network change the numbers by their own size.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from smpo_fast.common.console import printable
from smpo_fast.common.verification import Finding, bad, good
from smpo_fast.config.schema import Config
from smpo_fast.data import aspect_buckets
from smpo_fast.data.cache import stages
from smpo_fast.data.cache.format import Entry
from smpo_fast.data.cache.reader import CachedPairs
from smpo_fast.data.pairs import reader
from smpo_fast.data.pairs.pair import Rejected
from smpo_fast.data.rewards.score_table import ScoreTable
from smpo_fast.models.encoders import Encoders
from smpo_fast.models.locate import find

SAMPLE = 8  # pairs, evenly spaced over the cache
TOLERANCE = 2**-9


def check_sample(cached: CachedPairs, settings: Config, device: torch.device) -> Iterator[Finding]:
    """Encode evenly spaced pairs of a cache again from ``data.pairs``, with the networks of ``[model]`` on ``device``.

    Raises DataError for a table that cannot be read and ModelError for networks that cannot be loaded.
    """
    path, encoders = reader.source_path(settings.data.pairs), Encoders(find(settings.model), device)
    side = settings.data.resolution
    sizes = aspect_buckets.buckets(side) if settings.data.buckets else ((side, side),)
    scores = ScoreTable(Path(settings.data.scores)) if settings.data.scores else None
    rows, decoder = stages.Reader(path, scores), stages.Decoder(sizes, True, ())
    encoded = np.flatnonzero(cached.encoded)
    picked = sorted({*np.linspace(0, len(encoded) - 1, min(SAMPLE, len(encoded)), dtype=int).tolist()})
    largest, wrong = 0.0, 0
    for index in encoded[picked].tolist():
        row = int(cached.rows[index])
        decoded = [decoder(item) for item in rows.read([row])]
        (found,) = stages.encode(decoded, encoders, flip=cached.info.flips == 2, batch=8)
        if isinstance(found, Rejected):
            problem = f"the table's row cannot be used: {found.reason}"
        else:
            problem, difference = _compare(cached, index, found, encoders)
            largest = max(largest, difference)
        if problem:
            wrong += 1
            where = printable(f"row {row} of {path} ({cached.uids[index]})")
            yield bad(cached.root, f"{where}: {problem}: remove the folder and run 'smpo prepare' again")
    if not wrong:
        yield good(cached.root, f"{len(picked)} pairs encoded again: they differ by at most {largest:.1e} (relative)")


def _compare(cached: CachedPairs, index: int, found: stages.EncodedPair, encoders: Encoders) -> tuple[str, float]:
    """What differs between a stored pair and the same one encoded again, or ''; and the largest relative difference."""
    assert found.mean is not None and found.std is not None
    if problem := _entry_problem(cached, index, found.entry):
        return problem, 0.0
    stored, again = [], []
    for flip in range(cached.info.flips):
        mean, std = cached.moments([index], np.full((1, 2), bool(flip)))
        stored += [mean[0], std[0]]
        again += [found.mean[:, flip], found.std[:, flip]]
    stored += [value for value in cached.prompts([cached.prompt_index[index]]) if value is not None]
    again += [value.float().cpu() for value in encoders.encode_prompts([found.entry.prompt]) if value is not None]
    differences = [_relative_difference(old, new) for old, new in zip(stored, again, strict=True)]
    if max(differences) <= TOLERANCE:
        return "", max(differences)
    what = "latents" if max(differences[: 2 * cached.info.flips]) > TOLERANCE else "prompt's embeddings"
    return f"its {what} differ from those encoded again by {max(differences):.2g}, {TOLERANCE:.2g} is allowed", 0.0


def _entry_problem(cached: CachedPairs, index: int, entry: Entry) -> str:
    if cached.texts[cached.prompt_index[index]] != entry.prompt:
        return "its prompt is another one in the table"
    if not np.array_equal(cached.labels[index], np.nan if entry.label is None else entry.label, equal_nan=True):
        return "its label is another one in the table"
    if not np.array_equal(cached.frames[index], entry.frames):
        return "what is cut from its images differs"
    return ""


def _relative_difference(old: Tensor, new: Tensor) -> float:
    """The largest difference, relative to the number or the tensor's root mean square, whichever is larger.

    old: from float16, any shape; new: float32, of the same shape.
    """
    if old.shape != new.shape:
        return float("inf")
    scale = torch.maximum(old.abs(), old.square().mean().sqrt()).clamp_min(torch.finfo(torch.float16).tiny)
    return ((old - new.half().float()).abs() / scale).max().item()
