"""Encoded images: decoding with limits on size, the size from the header, and the content hash."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
MAX_FILE_BYTES = 256 << 20
MAX_PIXELS = 80_000_000  # a decompression bomb of a few kB decodes to gigabytes; real images stay far below this
MIN_SIDE = 8  # px; one latent pixel of the VAE: smaller images are broken downloads and placeholders
MAX_ASPECT = 4  # a longer image is cropped before it is resized, which bounds the memory
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
_ORIENTATION = 0x0112  # EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(ValueError):
    """Bytes that do not decode to a usable image; the message is 'kind: detail', as a rejected row's reason is."""


def decode(data: bytes) -> Image.Image:
    """An upright RGB image from JPEG, PNG, WebP, BMP or GIF bytes (of an animation the first frame).

    Transparent pixels are blended with white, 16 bits are scaled to 8, the EXIF orientation is applied. Raises BadImage
    for bytes of another format, truncated ones, more than MAX_PIXELS, and a side below MIN_SIDE px.
    """
    image = _open(data)
    try:
        image.load()
        return upright_rgb(image)
    except DECODE_ERRORS as error:
        raise BadImage(f"cannot be decoded: {error}") from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """A loaded image of any mode as ``decode`` gives it."""
    return _upright(_to_rgb(image), _orientation(image))


def header_size(data: bytes) -> tuple[int, int]:
    """Width and height in px according to the image's header, without decoding. Raises BadImage like ``decode``."""
    return _open(data).size


def content_hash(data: bytes) -> int:
    """64-bit hash of an encoded image or a text, to recognise equal ones within a table."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _open(data: bytes) -> Image.Image:
    """An image of which only the header was read. Raises BadImage for other formats and sizes out of bounds."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        raise BadImage(f"not a picture: {len(data)} bytes of none of the formats {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise BadImage(f"too large: {error}") from error
    except DECODE_ERRORS as error:
        raise BadImage(f"cannot be decoded: {error}") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadImage(f"too large: {width}x{height} px, the limit is {MAX_PIXELS / 1e6:g} million")
    if min(width, height) < MIN_SIDE:
        raise BadImage(f"too small: {width}x{height} px, the shorter side must have {MIN_SIDE}")
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: convert() would clip it to white
        grey = np.asarray(image).astype(np.float32) / 257
        return Image.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except DECODE_ERRORS:  # broken EXIF data does not make the image unusable
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)
