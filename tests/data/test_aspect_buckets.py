"""Pictures of any shape become the pixels that are asked for, and what was cut is what was cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from smpo_fast.data.aspect_buckets import buckets, choose, fit
from smpo_fast.data.images import MAX_ASPECT

sides = st.integers(8, 200)


def to_square(image: Image.Image, resolution: int) -> np.ndarray:
    """What the published recipes do: torchvision's Resize of the shorter side, then CenterCrop."""
    short = min(image.size)
    size = tuple(int(resolution * side / short) for side in image.size)
    image = image if size == image.size else image.resize(size, Image.Resampling.BILINEAR)
    left, top = (round((side - resolution) / 2) for side in size)
    return np.array(image.crop((left, top, left + resolution, top + resolution)))


def picture(height: int, width: int) -> Image.Image:
    """Red says which row, green which column."""
    array = np.zeros((height, width, 3), np.uint8)
    array[..., 0], array[..., 1] = np.linspace(0, 255, height)[:, None], np.linspace(0, 255, width)
    return Image.fromarray(array)


def test_at_1024_px_they_are_sdxls_buckets() -> None:
    found = buckets(1024)
    assert {(1024, 1024), (832, 1216), (896, 1152), (768, 1344), (640, 1536), (512, 2048), (1152, 896)} <= set(found)
    assert all(height % 64 == 0 and width % 64 == 0 for height, width in found)


@pytest.mark.parametrize("resolution", [32, 64, 256, 512, 768, 1024])
def test_buckets_have_no_more_pixels_than_the_square_and_not_many_fewer(resolution: int) -> None:
    found = buckets(resolution)
    assert (resolution, resolution) in found and list(found) == sorted(set(found))
    for height, width in found:
        assert (width, height) in found
        assert height % 8 == width % 8 == 0
        assert 0.7 * resolution**2 < height * width <= resolution**2
        assert max(height, width) <= 4 * min(height, width)


def test_the_bucket_of_a_pair_is_between_its_pictures_and_does_not_depend_on_their_order() -> None:
    shapes = buckets(1024)
    assert choose(shapes, [(500, 500), (77, 77)]) == (1024, 1024)
    assert choose(shapes, [(832, 1216), (832, 1216)]) == (832, 1216)
    assert choose(shapes, [(100, 200), (200, 100)]) == (1024, 1024)
    assert choose(shapes, [(100, 225), (100, 100)]) == choose(shapes, [(100, 100), (100, 225)]) == (832, 1216)
    assert choose(shapes, [(10, 1000)] * 2) == (512, 2048)


@given(sides, sides, st.sampled_from([16, 32, 40]))
@example(14, 56, 32)  # the longest
@settings(deadline=None, max_examples=100)
def test_a_square_is_the_released_recipes_crop(height: int, width: int, resolution: int) -> None:
    assume(max(height, width) <= MAX_ASPECT * min(height, width))  # of a longer one the middle is taken first
    image = picture(height, width)
    assert np.array_equal(fit(image, (resolution, resolution))[0], to_square(image, resolution))


@given(sides, sides, st.sampled_from([(32, 32), (16, 64), (64, 16), (24, 40)]))
@settings(deadline=None, max_examples=100)
def test_what_is_left_and_what_was_cut_make_up_the_picture(height: int, width: int, size: tuple[int, int]) -> None:
    pixels, frame = fit(picture(height, width), size)
    assert pixels.shape == (*size, 3)
    assert (frame.height, frame.width) == (height, width)
    assert min(frame) >= 0
    scale = max(size[0] / height, size[1] / width)
    whole = frame.left + size[1] + frame.right
    # resized sides are rounded to whole px; a picture longer than 4 : 1 is cut first, to whole px too
    assert abs(whole - width * scale) <= 2 + 2 * scale
    assert abs(frame.left - frame.right) <= 2 + 2 * scale
    assert frame.top == 0 or frame.left == 0 or max(height, width) > 4 * min(height, width)


def test_an_odd_rest_is_cut_more_on_one_side() -> None:
    frame = fit(picture(32, 35), (32, 32))[1]
    assert (frame.left, frame.right) == (2, 1)


@pytest.mark.parametrize("shape", [(64, 128), (128, 64), (64, 512), (512, 64)])
def test_the_corner_is_where_the_pixels_come_from(shape: tuple[int, int]) -> None:
    pixels, frame = fit(picture(*shape), (64, 64))
    scale = 64 / min(shape)
    row, column = (frame.top + 0.5) / scale, (frame.left + 0.5) / scale
    assert abs(int(pixels[0, 0, 0]) - 255 * (row - 0.5) / (shape[0] - 1)) < 2
    assert abs(int(pixels[0, 0, 1]) - 255 * (column - 0.5) / (shape[1] - 1)) < 2
