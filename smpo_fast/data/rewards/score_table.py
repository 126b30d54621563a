"""The score table: a folder of scores, written by ``smpo score`` and looked up by image and prompt.

    scores.parquet     picture, prompt: sha256 of the encoded image and of the text; score; if several scorers are
                       combined, also each one's score under its name
    pairs.parquet      row, label_0, score_0, score_1 of every pair that was scored
    rejected.parquet   row, uid and reason of every row that was not
    scores.json        scorers with identity and version, constants, counts, the sha256 of the other files, its own seal

A score belongs to the content of an image: the pair table may be moved, shuffled, cut or imported again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from smpo_fast.common import storage
from smpo_fast.common.errors import DataError, environment_problem
from smpo_fast.data.pairs.pair import RawPair, Rejected
from smpo_fast.data.pairs.rules import no_finite_score

SCORES, PAIRS, REJECTED, FACTS = "scores.parquet", "pairs.parquet", "rejected.parquet", "scores.json"
NEEDED = ("bytes", "counts", "made", "scorers", "sha256")  # what every version wrote into scores.json
KEY = np.dtype("S64")  # sha256 of the encoded image, then of the prompt
_HASH = 32
_PAIR_COLUMNS = ("row", "label_0", "score_0", "score_1")


class ScoreTable:
    """The scores of a folder. Raises DataError if it holds none, or they are damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.facts = folder, read_facts(folder)
        if storage.sha256(folder / SCORES) != self.facts["sha256"]:
            raise DataError(f"{folder / SCORES} has changed since it was written (sha256 differs): score again")
        table = _read(folder / SCORES, ["picture", "prompt", "score"])
        self.keys = _keys(table["picture"], table["prompt"])  # KEY [n], ascending
        self.scores: np.ndarray = table["score"].to_numpy()  # float64 [n]

    def with_rewards(self, rows: Iterator[RawPair | Rejected]) -> Iterator[RawPair | Rejected]:
        """The rows with these scores as rewards, in place of any others; pairs that were not scored are rejected."""
        for item in rows:
            yield item if isinstance(item, Rejected) else self._with_rewards(item)

    def scores_of(self, keys: Sequence[bytes]) -> np.ndarray:
        """The scores of n images by the keys of ``keys_of``, float64 [n]; NaN for one that is not in the table."""
        places, found = self.find(keys)
        return np.where(found, self.scores[places], np.nan)

    def column(self, names: Sequence[str]) -> np.ndarray:
        """The scores of single scorers of a combination, float64 [n, names]. Raises DataError if they are damaged."""
        table = _read(self.folder / SCORES, list(names))
        return np.stack([table[name].to_numpy().astype(np.float64) for name in names], axis=1)

    def find(self, keys: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """The places of keys in the table, [n], and whether they are there, bool [n]."""
        wanted = np.array(keys, KEY)
        places = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return places, self.keys[places] == wanted

    def _with_rewards(self, pair: RawPair) -> RawPair | Rejected:
        places, there = self.find(keys_of(pair))
        found = there.tolist()
        if not all(found):
            return Rejected(
                pair.row, pair.uid, f"not in data.scores: picture {found.index(False)} with this prompt was not scored"
            )
        one, two = (float(score) for score in self.scores[places])
        if reason := no_finite_score(one, two):
            return Rejected(pair.row, pair.uid, reason)
        return replace(pair, rewards=(one, two))


def keys_of(pair: RawPair) -> list[bytes]:
    """The keys of a pair's two images with its prompt, 64 bytes each."""
    prompt = storage.sha256_of(pair.prompt.encode())
    return [storage.sha256_of(image) + prompt for image in pair.images]


def identity(folder: Path) -> str:
    """What identifies the scores of a folder, without reading them. Raises DataError if there are none."""
    return f"scores@{read_facts(folder)['sha256'][:16]}"


def read_facts(folder: Path) -> dict[str, Any]:
    """The content of scores.json. Raises DataError if it cannot be read, or scores.parquet has not the size it says."""
    try:
        facts = storage.unsealed(json.loads((folder / FACTS).read_text()))
        size = (folder / SCORES).stat().st_size
        missing = [name for name in NEEDED if name not in facts]
        if missing:
            raise ValueError(f"{FACTS} lacks {', '.join(missing)}")
    except (OSError, ValueError, TypeError) as error:
        raise environment_problem(error, folder) or DataError(
            f"{folder} holds no finished scores ({error}): make them with smpo score"
        ) from error
    if size != facts["bytes"]:
        raise DataError(f"{folder / SCORES} has {size} bytes, {FACTS} says {facts['bytes']}: score again")
    return facts


def read_pairs(folder: Path) -> dict[str, np.ndarray]:
    """Human label and scores of the N scored pairs: 'label' float64 [N], 'rewards' float64 [N, 2]."""
    table = _read(folder / PAIRS, ["label_0", "score_0", "score_1"])
    columns = [table[name].to_numpy(zero_copy_only=False).astype(np.float64) for name in table.column_names]
    return {"label": columns[0], "rewards": np.stack(columns[1:], axis=1)}


def read_rows(folder: Path) -> np.ndarray:
    """The rows of the pair table that the scored pairs have: int64 [N], ascending."""
    return _read(folder / PAIRS, ["row"])["row"].to_numpy()


def write(
    folder: Path,
    keys: np.ndarray,
    scores: Mapping[str, np.ndarray],
    pairs: Mapping[str, Sequence[Any] | np.ndarray],
    rejected: Sequence[tuple[int, str, str]],
    facts: Mapping[str, Any],
) -> None:
    """Write the four files; scores.json, which marks the table as complete, is the last.

    keys: KEY [n], distinct.  scores: columns of scores.parquet, 'score' among them: [n] each.  pairs: columns of
    pairs.parquet.  rejected: row, uid and reason.  facts: more content of scores.json.
    """
    order = np.argsort(keys)
    halves = np.frombuffer(keys[order].tobytes(), np.uint8).reshape(len(keys), 2, _HASH)
    columns = {name: _hashes(halves[:, i]) for i, name in enumerate(("picture", "prompt"))}
    columns |= {name: pa.array(values[order]) for name, values in scores.items()}
    pq.write_table(pa.table(columns), folder / SCORES, compression="zstd", use_dictionary=["prompt"])
    pq.write_table(
        pa.table({name: pa.array(pairs[name]) for name in _PAIR_COLUMNS}), folder / PAIRS, compression="zstd"
    )
    kinds = pa.schema([("row", pa.int64()), ("uid", pa.string()), ("reason", pa.string())])
    listed = [dict(zip(kinds.names, item, strict=True)) for item in rejected]
    pq.write_table(pa.Table.from_pylist(listed, kinds), folder / REJECTED)
    for name in (SCORES, PAIRS, REJECTED):
        storage.sync(folder / name)
    hashes = {name: storage.file_facts(folder / name) for name in (PAIRS, REJECTED)}
    values = {**facts, **storage.file_facts(folder / SCORES), "files": hashes}
    storage.write_json(folder / FACTS, storage.sealed(values), indent=2)


def _read(file: Path, columns: list[str]) -> pa.Table:
    try:
        return pq.read_table(file, columns=columns)
    except (pa.ArrowException, OSError, MemoryError, RuntimeError) as error:
        raise environment_problem(error, file) or DataError(f"{file} cannot be read ({error}): score again") from error


def _hashes(values: np.ndarray) -> pa.Array:
    """A column of hashes, from uint8 [n, 32]."""
    kind = pa.binary(_HASH)
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])


def _keys(images: pa.ChunkedArray, prompts: pa.ChunkedArray) -> np.ndarray:
    """The keys that two columns of hashes form: KEY [n]."""
    both = np.empty((len(images), 2, _HASH), np.uint8)
    for i, column in enumerate((images, prompts)):
        first = 0
        for chunk in column.chunks:
            content = np.frombuffer(chunk.buffers()[1], np.uint8).reshape(-1, _HASH)
            both[first : first + len(chunk), i] = content[chunk.offset : chunk.offset + len(chunk)]
            first += len(chunk)
    return both.reshape(len(both), -1).view(KEY).reshape(-1)
