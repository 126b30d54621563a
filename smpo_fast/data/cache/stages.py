"""The stages that the rows of a pair table pass through: read | decode | score | encode | write.

A row that a stage cannot use becomes a ``Rejected`` with the reason, and passes through the later stages unchanged.
So it stops nothing and shifts no other row.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from smpo_fast.data import aspect_buckets, images
from smpo_fast.data.aspect_buckets import Frame, Size
from smpo_fast.data.cache.format import Entry, Unstorable
from smpo_fast.data.cache.parts import PairsPart
from smpo_fast.data.images import BadImage
from smpo_fast.data.pairs import reader, rules
from smpo_fast.data.pairs.pair import RawPair, Rejected
from smpo_fast.data.rewards.score_table import ScoreTable
from smpo_fast.data.rewards.scorers import Scorer

if TYPE_CHECKING:
    from PIL.Image import Image

CALL_PIXELS = 2 * 1024 * 1024  # in a call of the VAE, which takes 2.7 GB per million; more would not be faster
_SKIP_ROWS = 256  # rows that are read and dropped; to skip more, the table is opened again further down


class Encoders(Protocol):
    """What the cache needs of the networks (smpo_fast.models.encoders.Encoders).

    ``encode_images`` turns pixels [n, 3, H, W] in -1 .. 1 into mean and standard deviation [n, C, h, w] of the VAE's
    posterior, or raises FloatingPointError; ``encode_prompts`` gives embeddings [n, S, D] and, for SDXL, [n, E].
    """

    kind: str  # "sdxl" | "sd15"
    identity: str
    channels: int  # of a latent
    factor: int  # image pixels per latent pixel, along a side

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]: ...

    def encode_prompts(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]: ...

    def truncated(self, prompts: Sequence[str]) -> int: ...


@dataclass(frozen=True)
class DecodedPair:
    """A pair after decoding."""

    pair: RawPair
    size: Size  # height and width of the pixels
    pixels: np.ndarray  # uint8 [2, H, W, 3], resized and cropped
    frames: tuple[Frame, Frame]
    images: tuple[Image, Image] | None  # the whole images, kept only for pairs that are to be scored
    scored: bool = False  # the rewards come from the scorer

    @property
    def row(self) -> int:
        """The row in the pair table."""
        return self.pair.row

    def entry(self) -> Entry:
        """What the index records of the pair."""
        pair = self.pair
        return Entry(pair.row, pair.uid, pair.prompt, pair.rewards, pair.label, self.scored, self.size, self.frames)

    def rejected(self, reason: str) -> Rejected:
        """This row as a rejected one."""
        return Rejected(self.pair.row, self.pair.uid, reason)


@dataclass(frozen=True)
class EncodedPair:
    """A pair after encoding."""

    entry: Entry
    mean: Tensor | None  # float32 [2, F, C, H, W]: of the VAE's posterior; None in a survey
    std: Tensor | None

    @property
    def row(self) -> int:
        """The row in the pair table."""
        return self.entry.row


class Reader:
    """Stage 1, read: rows of the pair table in ascending chunks; neighbouring chunks are read in one pass."""

    def __init__(self, path: Path, scores: ScoreTable | None) -> None:
        self._path, self._scores = path, scores
        self._next: int | None = None  # the row that the open iterator gives next
        self._rows: Iterator[RawPair | Rejected] = iter(())

    def read(self, rows: Sequence[int]) -> Iterator[RawPair | Rejected]:
        """The given rows, ascending, with rewards from the score table if there is one."""
        if not rows:
            return
        if self._next is None or not 0 <= rows[0] - self._next <= _SKIP_ROWS:
            found = reader.read_pairs(self._path, start=rows[0])
            self._rows, self._next = self._scores.with_rewards(found) if self._scores else found, rows[0]
        wanted = rows if isinstance(rows, range) else set(rows)
        for item in self._rows:
            self._next = item.row + 1
            if item.row in wanted:
                yield item
            if item.row >= rows[-1]:
                return


@dataclass(frozen=True)
class Decoder:
    """Stage 2, decode: both images of a pair, resized and cropped to the aspect-ratio bucket that fits them best.

    sizes: the buckets.  can_score: whether pairs without rewards will be scored.  surveyed: rows that a survey has
    scored already; the index takes their rewards from there.
    """

    sizes: Sequence[Size]
    can_score: bool
    surveyed: Container[int]

    def __call__(self, row: RawPair | Rejected) -> DecodedPair | Rejected:
        """Decode one row. Pillow releases the interpreter lock, so that threads run in parallel."""
        if isinstance(row, Rejected):
            return row
        if not self.can_score and (reason := rules.no_preference(row.label, row.rewards)):
            return Rejected(row.row, row.uid, reason)
        decoded = []
        for name, content in zip(("jpg_0", "jpg_1"), row.images, strict=True):
            try:
                decoded.append(images.decode(content))
            except BadImage as error:
                return Rejected(row.row, row.uid, f"{name} {error}")
        size = aspect_buckets.choose(self.sizes, [(image.height, image.width) for image in decoded])
        (pixels_0, frame_0), (pixels_1, frame_1) = (aspect_buckets.fit(image, size) for image in decoded)
        if reason := rules.same_image(pixels_0, pixels_1):
            return Rejected(row.row, row.uid, reason)
        to_score = self.can_score and row.rewards is None and row.row not in self.surveyed
        whole = (decoded[0], decoded[1]) if to_score else None
        return DecodedPair(row, size, np.stack([pixels_0, pixels_1]), (frame_0, frame_1), whole)


def score(rows: Sequence[DecodedPair | Rejected], scorer: Scorer | None) -> list[DecodedPair | Rejected]:
    """Stage 3, score: give rewards to the pairs that the decoder marked for it."""
    pairs = [row for row in rows if isinstance(row, DecodedPair) and row.images is not None]
    if scorer is None or not pairs:
        return list(rows)
    scores = scorer(
        [image for pair in pairs for image in pair.images or ()], [pair.pair.prompt for pair in pairs for _ in range(2)]
    ).reshape(-1, 2)
    scored = {pair.row: _with_rewards(pair, *both) for pair, both in zip(pairs, scores.tolist(), strict=True)}
    return [scored.get(row.row, row) for row in rows]


def encode(
    rows: Sequence[DecodedPair | Rejected], encoders: Encoders, *, flip: bool, batch: int
) -> list[EncodedPair | Rejected]:
    """Stage 4, encode: mean and standard deviation of the VAE's posterior for both images, also mirrored if ``flip``.

    batch: images in a call of the VAE, fewer where they have more pixels than ``CALL_PIXELS``.
    """
    done: dict[int, EncodedPair | Rejected] = {row.row: row for row in rows if isinstance(row, Rejected)}
    pairs = sorted((row for row in rows if isinstance(row, DecodedPair)), key=lambda pair: pair.size)
    for _, same_size in groupby(pairs, key=lambda pair: pair.size):
        group = list(same_size)
        for pair, moments in zip(group, _encode_same_size(group, encoders, flip, batch), strict=True):
            if moments is None:
                done[pair.row] = pair.rejected("latents: the VAE gave NaN or infinity")
            else:
                done[pair.row] = EncodedPair(pair.entry(), *moments)
    return [done[row.row] for row in rows]


def without_latents(rows: Sequence[DecodedPair | Rejected]) -> list[EncodedPair | Rejected]:
    """Stage 4 of a survey, which encodes nothing."""
    return [row if isinstance(row, Rejected) else EncodedPair(row.entry(), None, None) for row in rows]


def write(rows: Iterable[EncodedPair | Rejected], part: PairsPart) -> Iterator[Rejected]:
    """Stage 5, write: add the rows to a part; yields each rejected row before it is recorded."""
    for row in rows:
        if isinstance(row, EncodedPair):
            try:
                part.add(row.entry, row.mean, row.std)
                continue
            except Unstorable as error:
                row = Rejected(row.row, row.entry.uid, f"latents: {error}")
        yield row
        part.reject(row.row, row.uid, row.reason)


def _with_rewards(pair: DecodedPair, reward_0: float, reward_1: float) -> DecodedPair | Rejected:
    if reason := rules.no_finite_score(reward_0, reward_1):
        return pair.rejected(reason)
    return replace(pair, pair=replace(pair.pair, rewards=(reward_0, reward_1)), images=None, scored=True)


def _encode_same_size(
    group: Sequence[DecodedPair], encoders: Encoders, flip: bool, batch: int
) -> list[tuple[Tensor, Tensor] | None]:
    """Mean and std [2, F, C, H, W] of each pair; None if the VAE cannot encode it."""
    plain = torch.from_numpy(np.stack([pair.pixels for pair in group]))  # [n, 2, H, W, 3]
    views = [plain, plain.flip(3)] if flip else [plain]
    pixels = torch.stack(views, dim=2).permute(0, 1, 2, 5, 3, 4).float() / 127.5 - 1  # [n, 2, F, 3, H, W]
    try:
        return list(_encode_pixels(pixels, encoders, batch))
    except FloatingPointError:  # of an image in the group: encode each pair alone to find it
        return [_encode_alone(one, encoders, batch) for one in pixels]


def _encode_alone(pixels: Tensor, encoders: Encoders, batch: int) -> tuple[Tensor, Tensor] | None:
    try:
        return next(_encode_pixels(pixels[None], encoders, batch))
    except FloatingPointError:
        return None


def _encode_pixels(pixels: Tensor, encoders: Encoders, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    images = max(1, min(batch, CALL_PIXELS // (pixels.shape[-2] * pixels.shape[-1])))
    pieces = [encoders.encode_images(piece) for piece in pixels.flatten(0, 2).split(images)]
    mean, std = (torch.cat([p.float().cpu() for p in both]) for both in zip(*pieces, strict=True))
    shape = (*pixels.shape[:3], *mean.shape[1:])
    return zip(mean.reshape(shape), std.reshape(shape), strict=True)
