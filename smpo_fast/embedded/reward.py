"""The rule that scores an image of the embedded world against its prompt.

The image is split into background (the colour of its rim) and foreground (what differs most from it); the reward
is 0.4 x foreground colour + 0.3 x background colour + 0.3 x shape.  It needs numpy only, no network.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from smpo_fast.embedded.shapes import HIGH, LOW, PIXELS, SHAPES, coverage, parse, rgb

WEIGHTS = {"foreground": 0.4, "background": 0.3, "shape": 0.3}
COLOUR_REACH = 0.7  # RGB distance at which a colour scores 0: grey against any colour of the world
MIN_CONTRAST = 0.08  # below this RGB distance of the two regions, no shape is visible


@dataclass(frozen=True)
class Scores:
    """Rewards of N images and the parts they are made of; every array is float32 [N] in 0..1."""

    reward: np.ndarray
    foreground: np.ndarray
    background: np.ndarray
    shape: np.ndarray


def score(images: np.ndarray, prompts: Sequence[str]) -> Scores:
    """Score images uint8 [N, H, W, 3] against one prompt each.

    Raises ValueError for a prompt that is not a caption of this world, and for images of another kind.
    """
    scenes = [parse(prompt) for prompt in prompts]
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
        raise ValueError(f"images must be uint8 [N, H, W, 3], not {images.dtype} {list(images.shape)}")
    if len(images) != len(scenes):
        raise ValueError(f"{len(images)} images for {len(scenes)} prompts")
    if not scenes:
        return Scores(*(np.zeros(0, np.float32) for _ in range(4)))
    images = _resize(images / 255.0)
    back, front, mask, contrast = _regions(images)
    parts = {
        "foreground": _colour_match(front, rgb([s.colour for s in scenes])),
        "background": _colour_match(back, rgb([s.background for s in scenes])),
        "shape": _shape_match(mask, [s.shape for s in scenes]) * (contrast >= MIN_CONTRAST),
    }
    total = np.sum([WEIGHTS[name] * part for name, part in parts.items()], axis=0)
    return Scores(total.astype(np.float32), **{name: part.astype(np.float32) for name, part in parts.items()})


def _resize(images: np.ndarray) -> np.ndarray:
    """[N, H, W, 3] to [N, 32, 32, 3] by averaging over areas."""
    rows, columns = (_area_matrix(size) for size in images.shape[1:3])
    return np.einsum("ph,nhwc,qw->npqc", rows, images, columns, optimize=True)


def _area_matrix(size: int) -> np.ndarray:
    """[32, size] overlap of each target pixel with each source pixel, rows summing to 1."""
    edges = np.linspace(0, size, PIXELS + 1)
    source = np.arange(size)
    overlap = np.minimum(edges[1:, None], source + 1) - np.maximum(edges[:-1, None], source)
    return np.clip(overlap, 0, None) * PIXELS / size


def _regions(images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Background and foreground colour [N, 3], soft foreground mask [N, 32, 32], contrast [N] of the two."""
    rim = np.concatenate([images[:, 0], images[:, -1], images[:, 1:-1, 0], images[:, 1:-1, -1]], axis=1)
    back = np.median(rim, axis=1)
    distance = np.linalg.norm(images - back[:, None, None], axis=-1)
    # The 24 most different pixels are the inside of even the smallest shape, and few enough to avoid its edge.
    pixels = images.reshape(len(images), -1, 3)
    core = np.argsort(-distance.reshape(len(images), -1), axis=1, kind="stable")[:, :24]
    front = np.median(np.take_along_axis(pixels, core[..., None], axis=1), axis=1)
    axis = front - back
    length = (axis**2).sum(-1)
    mask = ((images - back[:, None, None]) * axis[:, None, None]).sum(-1) / np.maximum(length, 1e-6)[:, None, None]
    return back, front, np.clip(mask, 0, 1), np.sqrt(length)


def _colour_match(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """[N] 1 for the wanted colour, falling linearly to 0 at COLOUR_REACH; excess saturation is not penalised."""
    return np.clip(1 - np.linalg.norm(np.clip(found, LOW, HIGH) - wanted, axis=-1) / COLOUR_REACH, 0, 1)


def _shape_match(mask: np.ndarray, shapes: Sequence[str]) -> np.ndarray:
    """[N] overlap (intersection over union) with the wanted shape of the same area and centre of mass."""
    mask = np.clip((mask - 0.2) / 0.6, 0, 1)  # faint texture is not area
    area = np.maximum(mask.sum((1, 2)), 1e-6)
    axis = np.arange(PIXELS) + 0.5
    centre = np.stack([(mask.sum(1) * axis).sum(1), (mask.sum(2) * axis).sum(1)], axis=1) / area[:, None]
    result = np.zeros(len(mask))
    for shape in SHAPES:
        rows = [i for i, name in enumerate(shapes) if name == shape]
        if rows:
            unit_area, unit_centre = _UNIT[shape]
            radii = np.sqrt(area[rows] / unit_area)
            wanted = coverage(shape, centre[rows] - radii[:, None] * unit_centre, radii)
            both, either = np.minimum(mask[rows], wanted), np.maximum(mask[rows], wanted)
            result[rows] = both.sum((1, 2)) / np.maximum(either.sum((1, 2)), 1e-6)
    return result


def _unit(shape: str, radius: float = 12.0) -> tuple[float, np.ndarray]:
    """Area and centre of mass [2] of the shape of radius 1."""
    mask = coverage(shape, np.full((1, 2), PIXELS / 2), np.array([radius]))[0]
    axis = np.arange(PIXELS) + 0.5 - PIXELS / 2
    area = mask.sum()
    return area / radius**2, np.array([(mask.sum(0) * axis).sum(), (mask.sum(1) * axis).sum()]) / area / radius


_UNIT = {shape: _unit(shape) for shape in SHAPES}
