"""Pairs of images that a pipeline generated for one prompt, scored or not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from smpo_fast.data.images import content_hash
from smpo_fast.data.ingest.ranking import select_pairs
from smpo_fast.data.pairs.pair import CandidatePair, ImageRef, Rejected, UsableImage, UsablePair
from smpo_fast.data.pairs.rules import equal_scores, same_image


@dataclass(frozen=True)
class GeneratedImage:
    """An encoded image that was generated; ``problem`` says why it cannot be used, or is ''."""

    number: int  # among those of its prompt
    content: bytes
    size: tuple[int, int]  # width, height
    score: float | None
    problem: str


def pairs_of(
    prompt_number: int, prompt: str, images: Sequence[GeneratedImage], pairing: str
) -> list[UsablePair | Rejected]:
    """The pairs of a prompt's images, the image that was generated first as image 0.

    pairing: a key of ``ranking.PAIRINGS``; images without scores are ranked in the order they were generated in.
    """
    found: list[UsablePair | Rejected] = [
        Rejected(prompt_number, _uid(prompt_number, image), image.problem) for image in images if image.problem
    ]
    usable = [image for image in images if not image.problem]
    if len(usable) < 2:
        too_few = f"fewer than two pictures: the prompt has {len(usable)} usable image(s)"
        return [*found, Rejected(prompt_number, f"prompt-{prompt_number}", too_few)]
    ranked = usable if pairing == "all" else sorted(usable, key=lambda i: -math.inf if i.score is None else i.score)
    for both in select_pairs(ranked, pairing):
        zero, one = sorted(both, key=lambda image: image.number)
        if reason := same_image(zero.content, one.content) or equal_scores(zero.score, one.score):
            uids = f"{_uid(prompt_number, zero)}/{_uid(prompt_number, one)}"
            found.append(Rejected(prompt_number, uids, reason))
        else:
            found.append(_pair(prompt_number, prompt, (zero, one)))
    return found


def _pair(prompt_number: int, prompt: str, images: tuple[GeneratedImage, GeneratedImage]) -> UsablePair:
    uids = [_uid(prompt_number, image) for image in images]
    zero, one = (ImageRef(partial(bytes, image.content), uid=uid) for image, uid in zip(images, uids, strict=True))
    usable = [UsableImage(image.content, None, content_hash(image.content), image.size) for image in images]
    scores = images[0].score, images[1].score
    rewards = None if scores[0] is None or scores[1] is None else (scores[0], scores[1])
    candidate = CandidatePair(prompt_number, "/".join(uids), prompt, (zero, one), None, rewards)
    return UsablePair(candidate, (usable[0], usable[1]))


def _uid(prompt_number: int, image: GeneratedImage) -> str:
    return f"{prompt_number}-{image.number}"
