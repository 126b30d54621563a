"""Reward models: from pictures and their prompts to scores.

A scorer is named in the settings: ``embedded`` (the rule of the miniature world), ``pickscore`` (or
``pickscore:FOLDER_OR_HUB_ID``), or ``module:function`` for a function of your own.  Weights are read from
safetensors only, and no code of a repository is run.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from smpo_fast.config import SettingsError

if TYPE_CHECKING:
    from PIL.Image import Image

PICKSCORE = "yuvalkirstain/PickScore_v1"
PICKSCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # what PickScore was tuned from
CHOICES = "'embedded', 'pickscore', 'pickscore:FOLDER_OR_HUB_ID' or 'module:function'"
_CLIP_BATCH = 16


class Scorer(Protocol):
    name: str
    identity: str  # differs when the scores would

    def __call__(self, images: Sequence[Image], prompts: Sequence[str]) -> np.ndarray:
        """One score per picture, float32 [N], higher is better. images: N RGB pictures of any sizes."""
        ...

    def parts(self, images: Sequence[Image], prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """The score under 'reward', first, and whatever it is made of under its name, float32 [N] each."""
        ...


def load_scorer(name: str, device: torch.device) -> Scorer:
    """The scorer that a setting names; raises SettingsError when there is none, or it cannot be loaded."""
    check_scorer(name, "scorer")
    kind, _, rest = name.partition(":")
    if name == "embedded":
        return _Embedded()
    if kind == "pickscore":
        return _PickScore(name, rest or PICKSCORE, device)
    return _UserFunction(name, kind, rest)


def check_scorer(name: str, key: str) -> None:
    """Raise SettingsError, naming the setting ``key``, for a scorer that there is not; loads nothing heavy."""
    kind, _, rest = name.partition(":")
    if name == "embedded" or kind == "pickscore":
        return
    if not (kind and rest):
        raise SettingsError(f"{key}: scorer '{name}' is unknown; there are {CHOICES}")
    if _module_file(kind) is None:
        raise SettingsError(f"{key}: '{name}': there is no module '{kind}' (is its folder on PYTHONPATH?)")


def scorer_identity(name: str) -> str:
    """What a scorer's scores depend on, without loading it: '' for no scorer.

    Follows the content of a local folder or of the module's file; a hub id stands for itself.
    """
    kind, _, rest = name.partition(":")
    if kind == "pickscore":
        return _folder_identity(rest or PICKSCORE)
    file = _module_file(kind) if rest else None
    return name if file is None else f"{name}@{_digest([file])}"


class _Base(ABC):
    """A scorer whose score has no parts."""

    name: str
    identity: str

    @abstractmethod
    def __call__(self, images: Sequence[Image], prompts: Sequence[str]) -> np.ndarray: ...

    def parts(self, images: Sequence[Image], prompts: Sequence[str]) -> dict[str, np.ndarray]:
        return {"reward": self(images, prompts)}


class _Embedded(_Base):
    """The rule of the embedded world."""

    name = identity = "embedded"

    def __call__(self, images: Sequence[Image], prompts: Sequence[str]) -> np.ndarray:
        return self.parts(images, prompts)["reward"]

    def parts(self, images: Sequence[Image], prompts: Sequence[str]) -> dict[str, np.ndarray]:
        from smpo_fast.embedded import reward

        try:  # one by one: pictures may differ in size
            scores = [asdict(reward.score(np.asarray(i)[None], [p])) for i, p in zip(images, prompts, strict=True)]
        except ValueError as error:
            raise SettingsError(f"scorer 'embedded' knows the embedded world only: {error}") from error
        names = [field.name for field in fields(reward.Scores)]
        return {name: np.array([score[name][0] for score in scores], dtype=np.float32) for name in names}


class _PickScore(_Base):
    """Cosine of CLIP's picture and text embeddings, without the logit scale (0.2 is usual, 0.01 is a point)."""

    def __init__(self, name: str, source: str, device: torch.device) -> None:
        from transformers import CLIPModel  # loads slowly, and most runs score nothing

        self.name, self.identity, self.device = name, _folder_identity(source), device
        try:
            model: Any = CLIPModel.from_pretrained(source, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise SettingsError(
                f"scorer '{name}': {source} cannot be loaded as a CLIP model from safetensors: {error}"
            ) from error
        self.model = model.to(device).eval()
        self.processor = _clip_processor(name, source)

    @torch.no_grad()
    def __call__(self, images: Sequence[Image], prompts: Sequence[str]) -> np.ndarray:
        scores = [
            self._score(images[i : i + _CLIP_BATCH], prompts[i : i + _CLIP_BATCH])
            for i in range(0, len(images), _CLIP_BATCH)
        ]
        return np.concatenate(scores) if scores else np.zeros(0, np.float32)

    def _score(self, images: Sequence[Image], prompts: Sequence[str]) -> np.ndarray:
        length = self.model.config.text_config.max_position_embeddings
        inputs = self.processor(
            text=list(prompts),
            images=list(images),
            return_tensors="pt",
            padding="max_length",
            truncation=True,
            max_length=length,
        ).to(self.device)
        out = self.model(**inputs)
        cosine = torch.nn.functional.cosine_similarity(out.image_embeds.float(), out.text_embeds.float(), dim=-1)
        return cosine.cpu().numpy()


class _UserFunction(_Base):
    """``function(images, prompts)`` of a module of yours: numbers [N] in any array, higher is better."""

    def __init__(self, name: str, module: str, function: str) -> None:
        self.name, self.identity = name, scorer_identity(name)
        found = getattr(importlib.import_module(module), function, None)
        if not callable(found):
            raise SettingsError(f"scorer '{name}': module '{module}' has no function '{function}'")
        self.function: Callable[[list[Image], list[str]], Any] = found

    def __call__(self, images: Sequence[Image], prompts: Sequence[str]) -> np.ndarray:
        given = self.function(list(images), list(prompts))
        scores = np.asarray(given.detach().cpu() if isinstance(given, torch.Tensor) else given, dtype=np.float32)
        if scores.shape != (len(images),):
            raise SettingsError(
                f"scorer '{self.name}' gave an array {list(scores.shape)} for {len(images)} pictures; "
                f"[{len(images)}] would be right"
            )
        return scores


def _clip_processor(name: str, source: str) -> Any:
    from transformers import CLIPProcessor

    errors = []
    for place in (source, PICKSCORE_PROCESSOR):
        try:
            return CLIPProcessor.from_pretrained(place)
        except (OSError, ValueError, TypeError) as error:
            errors.append(f"{place}: {error}")
    raise SettingsError(f"scorer '{name}': no CLIP processor: {'; '.join(errors)}")


def _folder_identity(source: str) -> str:
    """Of a folder the hash of what is read from it, else the hub id."""
    folder = Path(source)
    if not folder.is_dir():
        return f"pickscore:{source}"
    read = sorted(f for pattern in ("*.json", "*.txt", "*.safetensors") for f in folder.glob(pattern))
    return f"pickscore@{_digest(read)}"


def _module_file(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except (ModuleNotFoundError, ValueError):
        return None
    return Path(spec.origin) if spec is not None and spec.origin else None


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(f"{file.name}\0".encode() + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]
