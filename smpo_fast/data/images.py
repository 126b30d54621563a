"""Encoded images: decoding with limits, size and content hash, and files below one folder."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
MAX_FILE_BYTES = 256 << 20
MAX_PIXELS = 80_000_000  # a bomb of a few kB can decode to gigabytes; real pictures stay far below this
MIN_SIDE = 8  # px; one latent pixel of the VAE: smaller pictures are broken downloads and placeholders
MAX_ASPECT = 4  # beyond it a picture is cropped before it is resized, which bounds the memory
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_ORIENTATION = 0x0112
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
    """Bytes that do not decode to a usable picture; the message is 'what: detail'."""


def decode(data: bytes) -> Image.Image:
    """An upright RGB picture from JPEG, PNG, WebP, BMP or GIF bytes (of an animation the first frame).

    Transparency is laid over white, 16 bits are scaled to 8, the EXIF orientation is applied.  Raises BadPicture
    for bytes that are no such picture, truncated ones, more than MAX_PIXELS, or a side below MIN_SIDE px.
    """
    image = _opened(data)
    try:
        image.load()
        return _upright(_to_rgb(image), _orientation(image))
    except DECODE_ERRORS as error:
        raise BadImage(f"cannot be decoded: {error}") from error


def sniff(data: bytes) -> tuple[int, int]:
    """Width and height as a picture's header states them, without decoding it; raises BadPicture like ``decode``."""
    return _opened(data).size


def content_hash(data: bytes) -> int:
    """64 bits of an encoded picture or text: what tells those of a table apart."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def read_inside(folder: Path, name: str, fence: Path | None = None) -> bytes:
    """The bytes of the file ``name`` below ``folder``; raises BadPicture where they are not to be had.

    A path or symbolic link that leaves ``fence`` (default: the folder) is refused, and so is what is no regular
    file or larger than MAX_FILE_BYTES.
    """
    if "\0" in name:
        raise BadImage("leaves its folder: a path with a null character")
    path = Path(os.path.realpath(folder / name))
    if not path.is_relative_to(os.path.realpath(fence or folder)):
        raise BadImage(f"leaves its folder: '{name}' is not below {fence or folder}")
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise BadImage(f"no file: '{name}' is a folder or a device")
        if facts.st_size > MAX_FILE_BYTES:
            raise BadImage(f"too large: '{name}' has {facts.st_size >> 20} MB, the limit is {MAX_FILE_BYTES >> 20}")
        return path.read_bytes()
    except OSError as error:
        raise BadImage(f"no file: '{name}' cannot be read ({error.strerror})") from error


def _opened(data: bytes) -> Image.Image:
    """A picture of which the header is read; raises BadPicture for what is none and for sizes out of bounds."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        raise BadImage(f"not a picture: {len(data)} bytes that are none of {', '.join(FORMATS)}") from error
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
    except DECODE_ERRORS:  # broken notes about a picture do not make the picture unusable
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)
