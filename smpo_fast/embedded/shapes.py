"""A world of coloured shapes: its captions, its images, and its split into train and held-out prompts.

A caption reads `a [small|large] COLOUR SHAPE on a COLOUR background [on the left|on the right|at the top|at the
bottom]`.  The eight colours are the corners of a cube around grey, so all are equally far from grey and no two
are closer than one edge.
"""

import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

PIXELS = 32
LOW, HIGH = 0.1, 0.9  # cube corners stay inside 0..1: a decoder's overshoot stays visible
GREY = (LOW + HIGH) / 2

COLOURS: dict[str, tuple[float, float, float]] = {
    "black": (LOW, LOW, LOW),
    "blue": (LOW, LOW, HIGH),
    "green": (LOW, HIGH, LOW),
    "cyan": (LOW, HIGH, HIGH),
    "red": (HIGH, LOW, LOW),
    "magenta": (HIGH, LOW, HIGH),
    "yellow": (HIGH, HIGH, LOW),
    "white": (HIGH, HIGH, HIGH),
}
SIZES: dict[str, tuple[float, float]] = {
    "": (6.2, 7.8),
    "small": (4.4, 5.4),
    "large": (8.4, 9.4),
}  # radius, pixels
POSITIONS: dict[str, tuple[float, float]] = {  # offset of the centre (x, y) in pixels, y downwards
    "": (0.0, 0.0),
    "on the left": (-5.0, 0.0),
    "on the right": (5.0, 0.0),
    "at the top": (0.0, -5.0),
    "at the bottom": (0.0, 5.0),
}
SPLITS = ("train", "held-out")
HELD_OUT_SHARE = 0.25

Gauge = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y)


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(abs(x), abs(y)) / 0.82


def _diamond(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (abs(x) + abs(y)) / 1.1


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    y = y - 0.15  # the tip is farther from the centre than the base: centre the bounding box
    return np.maximum(y, abs(x) * 0.866 - y * 0.5) / 0.6


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    wide, tall = np.maximum(abs(x), abs(y) * 3), np.maximum(abs(x) * 3, abs(y))
    return np.minimum(wide, tall)


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    angles = np.arange(5) * (2 * np.pi / 5)
    sides = np.stack([x * np.sin(a) - y * np.cos(a) for a in angles])
    return np.partition(sides, 3, axis=0)[3] / 0.37  # inside at least four of the five sides of a pentagram


# A gauge is 1 on the outline of the shape of radius 1, below 1 inside, and grows linearly along every ray.
SHAPES: dict[str, Gauge] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "cross": _cross,
    "star": _star,
}


@dataclass(frozen=True)
class Scene:
    """What a caption describes; an empty `size` or `position` is not mentioned in the caption."""

    shape: str
    colour: str
    background: str
    size: str = ""
    position: str = ""

    @property
    def caption(self) -> str:
        words = (
            "a",
            self.size,
            self.colour,
            self.shape,
            "on a",
            self.background,
            "background",
            self.position,
        )
        return " ".join(word for word in words if word)


def scenes() -> list[Scene]:
    """All scenes of the world: foreground and background colour always differ."""
    grid = product(SHAPES, COLOURS, COLOURS, SIZES, POSITIONS)
    return [Scene(*words) for words in grid if words[1] != words[2]]


def _alternatives(words: Sequence[str]) -> str:
    return "|".join(word for word in words if word)


_COLOUR = _alternatives(list(COLOURS))
_CAPTION = re.compile(
    rf"a (?:({_alternatives(list(SIZES))}) )?({_COLOUR}) ({_alternatives(list(SHAPES))}) "
    rf"on a ({_COLOUR}) background(?: ({_alternatives(list(POSITIONS))}))?"
)


def parse(caption: str) -> Scene:
    """The scene a caption describes; ValueError if it is not a caption of this world."""
    match = _CAPTION.fullmatch(caption)
    if match is None or match[2] == match[4]:
        raise ValueError(
            f"not a caption of the embedded world: {caption!r} "
            "(expected, for example, 'a small red circle on a blue background at the top'; two different colours)"
        )
    return Scene(match[3], match[2], match[4], match[1] or "", match[5] or "")


def split_of(scene: Scene) -> str:
    """`train` or `held-out`: decided by shape and colours alone, so a held-out combination is new in every size."""
    key = f"{scene.colour} {scene.shape} on {scene.background}"
    return "held-out" if zlib.crc32(key.encode()) < HELD_OUT_SHARE * 2**32 else "train"


def count_prompts(split: str) -> int:
    """How many distinct captions a split has."""
    return sum(split_of(scene) == split for scene in scenes())


def prompts(split: str, n: int, seed: int = 0) -> list[str]:
    """`n` distinct captions of a split, drawn without replacement. Raises ValueError if the split has fewer."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, not {split!r}")
    captions = [scene.caption for scene in scenes() if split_of(scene) == split]
    if n > len(captions):
        raise ValueError(f"split {split!r} has {len(captions)} captions, fewer than {n}")
    order = np.random.default_rng(seed).permutation(len(captions))
    return [captions[i] for i in order[:n]]


def coverage(shape: str, centres: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """How much of each pixel a shape covers.

    centres: [N, 2] (x, y) in pixels from the top left corner; radii: [N] in pixels.  Returns [N, 32, 32] in 0..1,
    anti-aliased: a soft edge on a grid twice as fine, averaged.
    """
    axis = (np.arange(2 * PIXELS) + 0.5) / 2
    x = (axis[None, None, :] - centres[:, 0, None, None]) / radii[:, None, None]
    y = (axis[None, :, None] - centres[:, 1, None, None]) / radii[:, None, None]
    distance = (SHAPES[shape](*np.broadcast_arrays(x, y)) - 1) * radii[:, None, None]
    fine = np.clip(0.5 - 2 * distance, 0, 1)
    return fine.reshape(len(radii), PIXELS, 2, PIXELS, 2).mean((2, 4))


def paint(masks: np.ndarray, foreground: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Images uint8 [N, 32, 32, 3] from masks [N, 32, 32] and colours [N, 3] in 0..1."""
    mix = masks[..., None]
    image = mix * foreground[:, None, None] + (1 - mix) * background[:, None, None]
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)


def rgb(names: Sequence[str]) -> np.ndarray:
    """Colours [N, 3] in 0..1 of their names."""
    return np.array([COLOURS[name] for name in names])


def render(
    batch: Sequence[Scene], rng: np.random.Generator, *, pale: float = 1.0, wrong_colour: float = 0.0
) -> np.ndarray:
    """Images uint8 [N, 32, 32, 3] of scenes, clean by default.

    `pale` < 1 draws the saturation of foreground and background independently from U(pale, 1), and `wrong_colour`
    is the probability of a random foreground colour.  Captions mention neither: a model trained on such images
    varies in exactly what the reward judges, so that its samples differ in quality.
    """
    n = len(batch)
    centres = np.array([POSITIONS[s.position] for s in batch]) + PIXELS / 2 + rng.uniform(-1, 1, (n, 2))
    radii = np.array([rng.uniform(*SIZES[s.size]) for s in batch])
    masks = np.empty((n, PIXELS, PIXELS))
    for shape in SHAPES:
        rows = [i for i, scene in enumerate(batch) if scene.shape == shape]
        masks[rows] = coverage(shape, centres[rows], radii[rows])
    foreground, background = rgb([s.colour for s in batch]), rgb([s.background for s in batch])
    wrong = rng.random(n) < wrong_colour
    foreground[wrong] = rgb(list(COLOURS))[rng.integers(len(COLOURS), size=int(wrong.sum()))]
    saturation = rng.uniform(pale, 1, (2, n, 1))
    foreground, background = (GREY + s * (c - GREY) for s, c in zip(saturation, (foreground, background), strict=True))
    return paint(masks, foreground, background)
