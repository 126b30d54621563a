"""The on-disk format of a cache: names of its files and columns, and its description ``cache.json``.

A cache is a folder (docs/data.md) that appears under its name only when it is complete::

    cache.json                   format, identity, counts, shapes, size and sha256 of every other file, and its own seal
    pairs.parquet                one row per pair: row, uid, prompt, rewards, label, place of its latents, what was cut
    prompts.parquet              one row per distinct prompt: text, shard, position; prompt 0 is the empty one
    rejected.parquet             one row per rejected row: row, uid, reason
    latents-00000.safetensors    mean, std: float16 [n, 2 images, F, C, H, W]; F = 2: as it is and mirrored, else 1;
                                 with aspect-ratio buckets a mean and std for each shape, as in mean.832x1216
    prompts-00000.safetensors    embeds: float16 [n, S, D]; pooled: float16 [n, E] (SDXL)

While it is being prepared it is the hidden folder ``.NAME.partial`` next to it, which any number of processes share
(smpo_fast.common.shared_work). The files do not depend on which process wrote which.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smpo_fast.common.console import printable
from smpo_fast.common.errors import DataError, environment_problem
from smpo_fast.common.storage import unsealed

FORMAT = 2
INFO, PAIRS, PROMPTS, REJECTED = "cache.json", "pairs.parquet", "prompts.parquet", "rejected.parquet"
LATENTS_PART, SURVEY_PART, PROMPTS_PART, LAST_PART = "latents", "survey", "prompts", "index-0"
FRAME = ("height", "width", "top", "left", "right")


class CacheError(DataError):
    """A cache that is damaged, not a cache, or made with other settings; the message says which and what to do."""


class Unstorable(ValueError):
    """Numbers that float16 cannot hold."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What the index records of a pair."""

    row: int
    uid: str
    prompt: str
    rewards: tuple[float, float] | None
    label: float | None  # human preference: 1 for image 0, 0 for image 1, 0.5 for a tie
    scored: bool  # the rewards were computed by data.scorer, not stored in the table
    pixels: tuple[int, int]  # height and width of what was encoded
    frames: tuple[Sequence[int], Sequence[int]]  # of each image, as FRAME: its original size, and what was cut


@dataclass(frozen=True)
class CacheInfo:
    """The content of ``cache.json``."""

    root: Path
    identity: dict[str, Any]
    source: dict[str, Any]  # data.pairs as given, and size, time and sha256 of its files
    counts: dict[str, int]  # pairs, encoded, rejected, prompts; stored, scored, unrewarded: see ``CacheWriter``
    pixels: tuple[tuple[int, int], ...]  # height and width of the images of each shape, ascending
    channels: int  # C
    factor: int  # image pixels per latent pixel, along a side
    flips: int  # 2: each image as it is and mirrored, 1: only as it is
    prompt: tuple[int, int]  # S, D
    pooled: int | None  # E
    rewards: tuple[float, float] | None  # smallest and largest
    files: dict[str, dict[str, Any]]  # name -> bytes, sha256
    versions: dict[str, str]

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file["bytes"] for file in self.files.values())

    def latent(self, shape: int = 0) -> tuple[int, int, int]:
        """C, H, W of the latents of a shape."""
        height, width = self.pixels[shape]
        return self.channels, height // self.factor, width // self.factor

    def suffix(self, shape: int) -> str:
        """What the names of a shape's tensors end in: '.832x1216' with aspect-ratio buckets, else nothing."""
        return size_suffix(self.pixels[shape]) if self.identity.get("buckets") else ""


def read_info(root: Path) -> CacheInfo:
    """Read ``cache.json``. Raises CacheError if there is no cache, or its description is damaged.

    Raises EnvironmentProblem if the machine is the reason why it cannot be read.
    """
    file = root / INFO
    if not file.is_file():
        raise CacheError(
            f"{root} holds no prepared cache ({INFO} is missing): run 'smpo prepare' with the same settings"
        )
    try:
        values = unsealed(json.loads(file.read_text()))
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
        problem = f"cannot be read ({type(error).__name__}: {error})"
        raise environment_problem(error, file) or damaged(file, problem) from error


def part_name(kind: str, number: int) -> str:
    """The name of a part of the preparation, such as 'latents-00003'."""
    return f"{kind}-{number:05d}"


def shard_name(kind: str, number: int) -> str:
    """The file name of a shard, such as 'latents-00003.safetensors'."""
    return f"{part_name(kind, number)}.safetensors"


def size_suffix(size: Sequence[int]) -> str:
    """'.HEIGHTxWIDTH', what the names of tensors of one shape end in."""
    return f".{size[0]}x{size[1]}"


def frame_columns() -> list[str]:
    """The columns of pairs.parquet that hold the FRAME of image 0, then of image 1."""
    return [f"{name}_{image}" for image in range(2) for name in FRAME]


def entry_from_json(values: dict[str, Any]) -> Entry:
    """An entry from its JSON form, in which tuples are lists."""
    tuples = {name: values[name] and tuple(values[name]) for name in ("rewards", "pixels", "frames")}
    return Entry(**{**values, **tuples, "prompt": sys.intern(values["prompt"])})


def brief(value: Any) -> str:
    """A value for an error message, printable; hashes and other long values are shortened."""
    text = str(value)
    return printable(repr(value)) if len(text) <= 60 else f"'{printable(text[:12])}..{printable(text[-12:])}'"


def damaged(file: Path, problem: str) -> CacheError:
    """The error for a damaged file of a cache."""
    return CacheError(f"{file}: {problem}: the cache is damaged; remove {file.parent} and run 'smpo prepare' again")
