"""Decoding images: every kind of JPEG, PNG, WebP, BMP and GIF becomes upright RGB or a BadImage that says why."""

from __future__ import annotations

import io

import numpy as np
import pytest
from helpers.images import encoded, noise
from PIL import Image

from smpo_fast.data import images
from smpo_fast.data.aspect_buckets import fit
from smpo_fast.data.images import BadImage, decode


def to_square(image: Image.Image, resolution: int) -> np.ndarray:
    return fit(image, (resolution, resolution))[0]


def test_the_size_is_read_from_the_header_alone() -> None:
    whole = encoded(np.zeros((16, 40, 3), np.uint8), "JPEG")
    assert images.header_size(whole) == images.header_size(whole[:-30]) == (40, 16)
    with pytest.raises(BadImage, match="cannot be decoded"):
        decode(whole[:-30])
    with pytest.raises(BadImage, match="too small: 40x7 px"):
        images.header_size(encoded(np.zeros((7, 40, 3), np.uint8)))


def test_decode_grey_palette_and_16_bits() -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    wanted = np.repeat(grey[..., None], 3, axis=2)
    assert np.array_equal(np.array(decode(encoded(grey))), wanted)
    assert np.array_equal(np.array(decode(encoded(grey.astype(np.uint16) * 257))), wanted)
    palette = io.BytesIO()
    Image.fromarray(grey).convert("P").save(palette, "GIF")
    assert np.array_equal(np.array(decode(palette.getvalue())), wanted)


def test_16_bits_are_scaled_and_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    assert np.abs(np.array(decode(encoded(ramp)))[..., 0].astype(float) - ramp / 257).max() <= 0.5


def test_transparency_lies_over_white() -> None:
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[..., 0] = 200
    rgba[:4, :, 3] = 255
    rgba[4, :, 3] = 128
    found = np.array(decode(encoded(rgba)))
    assert found[0, 0].tolist() == [200, 0, 0]
    assert found[7, 0].tolist() == [255, 255, 255]
    assert np.abs(found[4, 0].astype(int) - [227, 127, 127]).max() <= 1


def test_cmyk_gives_the_colours_of_the_original() -> None:
    rgb = np.full((16, 16, 3), (200, 60, 20), np.uint8)
    file = io.BytesIO()
    Image.fromarray(rgb).convert("CMYK").save(file, "JPEG", quality=95)
    assert np.abs(np.array(decode(file.getvalue())).astype(int) - rgb).max() < 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    array = np.random.default_rng(0).integers(0, 256, (10, 14, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = {
        1: array,
        2: array[:, ::-1],
        3: array[::-1, ::-1],
        4: array[::-1],
        5: array.transpose(1, 0, 2),
        6: np.rot90(array, -1),
        7: array[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(array, 1),
    }[orientation]
    assert np.array_equal(np.array(decode(encoded(array, exif=exif))), turned)


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"hello, not an image", "not a picture"),
        (noise()[:200], "cannot be decoded|not a picture"),
        (encoded(np.zeros((1, 1, 3), np.uint8)), "too small: 1x1"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
    ],
)
def test_what_does_not_decode_is_refused(raw: bytes, why: str) -> None:
    with pytest.raises(BadImage, match=why):
        decode(raw)


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    bomb = encoded(np.zeros((9100, 9100), np.uint8))
    assert len(bomb) < 200_000
    with pytest.raises(BadImage, match="too large: 9100x9100"):
        decode(bomb)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_random_damage_gives_a_picture_or_BadPicture() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    array = np.random.default_rng(1).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    rng = np.random.default_rng(2)
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF"):
        good = encoded(array, kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}))
        for _ in range(150):
            raw = np.frombuffer(good, np.uint8).copy()
            raw[rng.integers(0, min(len(raw), 400), rng.integers(1, 8))] = rng.integers(0, 256)
            try:
                assert decode(raw.tobytes()).mode == "RGB"
            except BadImage as error:
                assert ":" in str(error)


def test_square_is_resize_then_centre_crop() -> None:
    image = Image.open(io.BytesIO(noise(3, (61, 40))))
    wide = image.resize((int(32 * 61 / 40), 32), Image.Resampling.BILINEAR)
    assert np.array_equal(to_square(image, 32), np.array(wide)[:, 8:40])  # 48 wide: 8 px are cut on either side
    tall = Image.open(io.BytesIO(noise(3, (40, 61))))
    assert to_square(tall, 32).shape == (32, 32, 3)
    same = Image.open(io.BytesIO(noise(3, (32, 32))))
    assert np.array_equal(to_square(same, 32), np.array(same))


def test_a_very_long_picture_gives_its_centre_without_a_huge_intermediate() -> None:
    row = np.repeat(np.arange(4000) // 16, 8).reshape(4000, 8).T.astype(np.uint8)  # 4000 x 8 px, 0 .. 249
    found = to_square(Image.fromarray(row).convert("RGB"), 1024)
    assert found.shape == (1024, 1024, 3)
    assert abs(int(found.mean()) - 125) <= 1
