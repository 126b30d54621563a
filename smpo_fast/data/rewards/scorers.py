"""Reward models by name: from pictures and their prompts to scores.

A scorer is named in the settings: one of ``KINDS``, with ``:FOLDER_OR_HUB_ID`` behind it for weights of another
place, ``embedded`` (the rule of the miniature world), or ``module:function`` for a function of your own.  No code of
a repository is run, and no objects are made of weight files.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch

from smpo_fast.common.errors import UserError
from smpo_fast.data.rewards import reward_models
from smpo_fast.data.rewards.reward_models import CLIP_H, CLIP_L, Aesthetic, ClipCosine, Hps, ImageReward, RewardModel

if TYPE_CHECKING:
    from PIL.Image import Image

_TERM = re.compile(r"(?:^|\+)\s*(-?\d+(?:\.\d+)?)\s*\*")
_FILES = ("*.json", "*.txt", "*.safetensors", "*.pt", "*.pth")


class Scorer(Protocol):
    name: str
    identity: str  # differs when the scores would

    def __call__(self, images: Sequence[Image], prompts: Sequence[str]) -> np.ndarray:
        """One score per picture, float32 [N], higher is better. images: N RGB pictures of any sizes."""
        ...

    def parts(self, images: Sequence[Image], prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """The score under 'reward', first, and whatever it is made of under its name, float32 [N] each."""
        ...


class Kind(NamedTuple):
    """A reward model that is known by name."""

    place: str  # where its weights are published
    network: Callable[[str, torch.device, bool], RewardModel]  # of a place, on a device, in float16 or not
    what: str


KINDS: dict[str, Kind] = {
    "pickscore": Kind(
        reward_models.PICKSCORE,
        lambda place, device, half: ClipCosine(place, device, half, [CLIP_H]),
        "cosine of a tuned CLIP ViT-H, 0.2 is usual",
    ),
    "hpsv2.1": Kind(
        "xswu/HPSv2",
        lambda place, device, half: Hps(place, device, half, "HPS_v2.1_compressed.pt"),
        "cosine of a tuned CLIP ViT-H, 0.28 is usual",
    ),
    "hpsv2": Kind(
        "xswu/HPSv2",
        lambda place, device, half: Hps(place, device, half, "HPS_v2_compressed.pt"),
        "the version before",
    ),
    "imagereward": Kind("THUDM/ImageReward", ImageReward, "BLIP, about standard normal"),
    "aesthetic": Kind("trl-lib/ddpo-aesthetic-predictor", Aesthetic, "CLIP ViT-L/14 without the prompt, 1 to 10"),
    "clip": Kind(
        CLIP_L,
        lambda place, device, half: ClipCosine(place, device, half, [CLIP_L]),
        "cosine of CLIP ViT-L/14: fits the prompt, not: pleases",
    ),
}
CHOICES = f"'embedded', {', '.join(map(repr, KINDS))} (or 'pickscore:FOLDER_OR_HUB_ID', ..), 'module:function'"


def load_scorer(name: str, device: torch.device, *, half: bool = False) -> Scorer:
    """The scorer that a setting names; half: in float16, where it is one of KINDS.

    Raises SettingsError when there is none, it cannot be loaded, or does not compute in half precision.
    """
    check_scorer(name, "scorer")
    kind, _, rest = name.partition(":")
    if kind in KINDS:
        return _Known(name, kind, rest or KINDS[kind].place, device, half)
    if half:
        raise UserError(f"scorer '{name}' has no half precision: only {', '.join(KINDS)} have")
    return _Embedded() if name == "embedded" else _UserFunction(name, kind, rest)


def check_scorer(name: str, key: str) -> None:
    """Raise SettingsError, naming the setting ``key``, for a scorer that there is not; loads nothing heavy."""
    if len(terms(name)) > 1 or terms(name)[0] != (1.0, name):
        raise UserError(
            f"{key}: '{name}' combines scorers, which are standardised over a whole table: score the table first "
            "(smpo score), and give data.scores"
        )
    kind, _, rest = name.partition(":")
    if name == "embedded" or kind in KINDS:
        return
    if not (kind and rest):
        raise UserError(f"{key}: scorer '{name}' is unknown; there are {CHOICES}")
    if _module_file(kind) is None:
        raise UserError(f"{key}: '{name}': there is no module '{kind}' (is its folder on PYTHONPATH?)")


def terms(name: str) -> list[tuple[float, str]]:
    """Weights and names of a combination, as in ``0.7*pickscore + 0.3*aesthetic``; of a plain name (1, name)."""
    if not _TERM.match(name.strip()):
        return [(1.0, name)]
    _, *found = _TERM.split(name.strip())
    return [(float(weight), scorer.strip()) for weight, scorer in zip(found[::2], found[1::2], strict=True)]


def scorer_identity(name: str) -> str:
    """What a scorer's scores depend on, without loading it: '' for no scorer.

    Follows the content of a local folder or file, or of the module's file; a hub id stands for itself.
    """
    kind, _, rest = name.partition(":")
    if kind in KINDS:
        return _place_identity(kind, rest or KINDS[kind].place)
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
            raise UserError(f"scorer 'embedded' knows the embedded world only: {error}") from error
        names = [field.name for field in fields(reward.Scores)]
        return {name: np.array([score[name][0] for score in scores], dtype=np.float32) for name in names}


class _Known(_Base):
    """A reward model of KINDS."""

    def __init__(self, name: str, kind: str, place: str, device: torch.device, half: bool) -> None:
        self.name, self.identity = name, _place_identity(kind, place)
        try:
            self.network = KINDS[kind].network(place, device, half)
        except UserError as error:
            raise UserError(f"scorer '{name}': {error}") from error

    def __call__(self, images: Sequence[Image], prompts: Sequence[str]) -> np.ndarray:
        return self.network(images, prompts)


class _UserFunction(_Base):
    """``function(images, prompts)`` of a module of yours: numbers [N] in any array, higher is better."""

    def __init__(self, name: str, module: str, function: str) -> None:
        self.name, self.identity = name, scorer_identity(name)
        found = getattr(importlib.import_module(module), function, None)
        if not callable(found):
            raise UserError(f"scorer '{name}': module '{module}' has no function '{function}'")
        self.function: Callable[[list[Image], list[str]], Any] = found

    def __call__(self, images: Sequence[Image], prompts: Sequence[str]) -> np.ndarray:
        given = self.function(list(images), list(prompts))
        scores = np.asarray(given.detach().cpu() if isinstance(given, torch.Tensor) else given, dtype=np.float32)
        if scores.shape != (len(images),):
            raise UserError(
                f"scorer '{self.name}' gave an array {list(scores.shape)} for {len(images)} pictures; "
                f"[{len(images)}] would be right"
            )
        return scores


def _place_identity(kind: str, place: str) -> str:
    """Of a folder or file the hash of what is read from it, else the hub id."""
    path = Path(place).expanduser()
    if not path.exists():
        return f"{kind}:{place}"
    read = sorted(f for pattern in _FILES for f in path.glob(pattern)) if path.is_dir() else [path]
    return f"{kind}@{_digest(read)}"


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
