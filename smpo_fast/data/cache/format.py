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
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smpo_fast.common import shared_work
from smpo_fast.common.errors import DataError, UserError
from smpo_fast.common.storage import sha256

FORMAT = 2
INFO, PAIRS, PROMPTS, REJECTED = "cache.json", "pairs.parquet", "prompts.parquet", "rejected.parquet"
LATENTS_PART, SURVEY_PART, PROMPTS_PART, LAST_PART = "latents", "survey", "prompts", "index-0"
FRAME = ("height", "width", "top", "left", "right")

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


class CacheError(DataError):
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
        shared_work.publish(partial(root), root, INFO)
    elif exists(root):  # a process that came too late left what it had begun
        shutil.rmtree(partial(root), ignore_errors=True)


def check_target(root: Path) -> None:
    """Raise SettingsError where something other than a cache is in its place."""
    if not exists(root) and root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"data.cache: {root} exists already: remove it, or give data.cache another folder")


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


def _part(kind: str, number: int) -> str:
    return f"{kind}-{number:05d}"


def _shard(kind: str, number: int) -> str:
    return f"{_part(kind, number)}.safetensors"


def _suffix(size: Sequence[int]) -> str:
    return f".{size[0]}x{size[1]}"


def _frame_columns() -> list[str]:
    return [f"{name}_{picture}" for picture in range(2) for name in FRAME]


def _entry(values: dict[str, Any]) -> Entry:
    tuples = {name: values[name] and tuple(values[name]) for name in ("rewards", "pixels", "frames")}
    return Entry(**{**values, **tuples, "prompt": sys.intern(values["prompt"])})


def _brief(value: Any) -> str:
    """A value in an error message, shortened where it is a hash or as long as one."""
    text = str(value)
    return repr(value) if len(text) <= 60 else f"'{text[:12]}..{text[-12:]}'"


def _damaged(file: Path, what: str) -> CacheError:
    return CacheError(f"{file}: {what}: the cache is damaged; remove {file.parent} and run 'smpo prepare' again")
