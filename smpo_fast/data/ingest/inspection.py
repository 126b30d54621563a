"""From candidate pairs to usable pairs: every image is read, its header or content checked, and hashed, in threads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from smpo_fast.common.pools import map_ahead
from smpo_fast.data import images
from smpo_fast.data.images import BadImage
from smpo_fast.data.pairs.pair import CandidatePair, ImageRef, Rejected, UsableImage, UsablePair
from smpo_fast.data.pairs.rules import same_image

_WORKERS = 4  # threads; more do not help where the images are in the records


def inspect_images(
    units: Iterable[Sequence[CandidatePair | Rejected]], *, decode: bool
) -> Iterator[list[UsablePair | Rejected]]:
    """The units in order, their candidates turned into usable pairs or rejected; a bounded number is read ahead.

    decode: decode every image, which also finds truncated ones, instead of reading its header only.
    """
    return map_ahead(partial(_inspect_unit, decode=decode), units, _WORKERS, ahead=2 * _WORKERS)


def _inspect_unit(unit: Sequence[CandidatePair | Rejected], *, decode: bool) -> list[UsablePair | Rejected]:
    inspected: dict[int, UsableImage | BadImage] = {}  # an image of a ranking is in several pairs
    return [item if isinstance(item, Rejected) else _inspect_pair(item, inspected, decode) for item in unit]


def _inspect_pair(
    candidate: CandidatePair, inspected: dict[int, UsableImage | BadImage], decode: bool
) -> UsablePair | Rejected:
    usable = []
    for name, ref in zip(("jpg_0", "jpg_1"), candidate.images, strict=True):
        if id(ref) not in inspected:
            inspected[id(ref)] = _inspect_image(ref, decode)
        image = inspected[id(ref)]
        if isinstance(image, BadImage):
            return Rejected(candidate.row, candidate.uid, f"{name} {image}")
        usable.append(image)
    zero, one = usable
    if reason := same_image(zero.hash, one.hash):
        return Rejected(candidate.row, candidate.uid, reason)
    return UsablePair(candidate, (zero, one))


def _inspect_image(ref: ImageRef, decode: bool) -> UsableImage | BadImage:
    try:
        content = ref.read()
        size = images.decode(content).size if decode else images.header_size(content)
        return UsableImage(content, ref.path, images.content_hash(content), size)
    except BadImage as error:
        return error
