"""Images and their scores by what decides them: drawn and scored once, however many evaluations use them."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from smpo_fast.common.errors import DataError
from smpo_fast.common.storage import atomic_write, file_facts, sealed, unsealed, write_json
from smpo_fast.common.verification import Finding, bad, check_unlisted, good

IMAGES = "images"  # the folder beside an evaluation
_AGAIN = "smpo evaluate draws the image again"
_ADVICE = f"remove it: {_AGAIN}"


class ImageStore:
    """A folder of images. A key is a hash of all that decides an image.

    Beside each image, KEY.png, there is KEY.json: its size and SHA-256, and its scores, for the identity of each scorer
    its parts by name. Both appear complete or not at all, the image first.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __contains__(self, key: str) -> bool:
        return bool(self._facts(key)) and self.file(key).is_file()

    def file(self, key: str) -> Path:
        """Where an image is, or will be."""
        return self.folder / key[:2] / f"{key}.png"

    def add(self, key: str, image: Image.Image) -> None:
        """Keep an image."""
        file = self.file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as draft:
            image.save(draft, "PNG")
        self._write(key, {"image": file_facts(file), "scores": {}})

    def image(self, key: str) -> Image.Image:
        """An image that is kept. Raises DataError for one that has changed."""
        if problem := self.problem(key):
            raise DataError(f"{problem.place} {problem.text}")
        with Image.open(self.file(key)) as image:
            return image.convert("RGB")

    def data_url(self, key: str, side: int) -> str:
        """An image as a URL with its content: exactly up to half of ``side`` px, otherwise reduced to ``side``."""
        image, stream = self.image(key), io.BytesIO()
        if max(image.size) <= side // 2:
            image.save(stream, "PNG")
            return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        image.save(stream, "WEBP", quality=85)
        return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"

    def problem(self, key: str) -> Finding | None:
        """What is wrong with an image or its record, if anything."""
        facts, file, record = self._facts(key), self.file(key), self._record(key)
        if not record.is_file():
            return bad(record, f"is missing: {_AGAIN}")
        if not facts:
            return bad(record, f"cannot be read, or has changed: {_ADVICE}")
        if not file.is_file():
            return bad(file, f"is missing: {_AGAIN}")
        return None if file_facts(file) == facts["image"] else bad(file, f"has changed since it was drawn: {_ADVICE}")

    def scores(self, key: str) -> dict[str, dict[str, float]]:
        """The scores of an image that are known."""
        return dict(self._facts(key).get("scores", {}))

    def add_scores(self, key: str, scorer: str, parts: Mapping[str, float]) -> None:
        """Keep a scorer's scores of an image."""
        facts = self._facts(key)
        self._write(key, {**facts, "scores": {**facts["scores"], scorer: dict(parts)}})

    def _facts(self, key: str) -> dict[str, Any]:
        """What is recorded of an image; nothing where it cannot be read, or has changed."""
        try:
            return unsealed(json.loads(self._record(key).read_text()))
        except (OSError, ValueError):
            return {}

    def _write(self, key: str, facts: Mapping[str, Any]) -> None:
        write_json(self._record(key), sealed(facts))

    def _record(self, key: str) -> Path:
        return self.file(key).with_suffix(".json")


def verify_images(folder: Path, wanted: Sequence[str] = ()) -> Iterator[Finding]:
    """Verify a store: every image as it was drawn, and every record as it was written. wanted: keys it must have."""
    store = ImageStore(folder)
    shelves = sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    keys = {file.stem for shelf in shelves for file in shelf.iterdir() if file.suffix in (".png", ".json")}
    for key in sorted(keys | set(wanted)):
        if problem := store.problem(key):
            yield problem
    for shelf in shelves:
        known = {f"{key}{suffix}" for key in keys for suffix in (".png", ".json")}
        yield from check_unlisted(shelf, known, "remove it if it is not yours")
    yield good(folder, f"{len(keys)} images")
