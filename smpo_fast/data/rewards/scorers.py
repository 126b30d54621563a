"""Reward models by name: from images and their prompts to scores.

A setting names a scorer: one of ``KINDS``, optionally followed by ``:FOLDER_OR_HUB_ID`` for other weights; or
``embedded`` (the rule of the embedded world); or ``module:function`` for a user's own function. Apart from that
function, nothing that is loaded is executed: no code of a repository, and only tensors of weight files.
"""

from __future__ import annotations

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

from smpo_fast.common.errors import ConfigError, DataError, ModelError, UserError
from smpo_fast.common.storage import sha256, sha256_of
from smpo_fast.data.rewards import reward_models
from smpo_fast.data.rewards.reward_models import CLIP_H, CLIP_L, Aesthetic, ClipCosine, Hps, ImageReward, RewardModel

if TYPE_CHECKING:
    from PIL.Image import Image

_TERM = re.compile(r"(?:^|\+)\s*(-?\d+(?:\.\d+)?)\s*\*")
_FILES = ("*.json", "*.txt", "*.safetensors", "*.pt", "*.pth")


class Scorer(Protocol):
    """What scores images."""

    name: str
    identity: str  # differs if the scores might differ

    def __call__(self, images: Sequence[Image], prompts: Sequence[str]) -> np.ndarray:
        """One score per image, float32 [N], higher is better. images: N RGB images of any sizes."""
        ...

    def parts(self, images: Sequence[Image], prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """The score as 'reward', then its components by name, if it has any: float32 [N] each."""
        ...


class Kind(NamedTuple):
    """A kind of reward model."""

    location: str  # where its weights are published
    network: Callable[[str, torch.device, bool], RewardModel]  # from a location, on a device, in float16 or not
    about: str


KINDS: dict[str, Kind] = {
    "pickscore": Kind(
        reward_models.PICKSCORE,
        lambda location, device, half: ClipCosine(location, device, half, [CLIP_H]),
        "cosine of a fine-tuned CLIP ViT-H, usually about 0.2",
    ),
    "hpsv2.1": Kind(
        "xswu/HPSv2",
        lambda location, device, half: Hps(location, device, half, "HPS_v2.1_compressed.pt"),
        "cosine of a fine-tuned CLIP ViT-H, usually about 0.28",
    ),
    "hpsv2": Kind(
        "xswu/HPSv2",
        lambda location, device, half: Hps(location, device, half, "HPS_v2_compressed.pt"),
        "the version before",
    ),
    "imagereward": Kind("THUDM/ImageReward", ImageReward, "BLIP, approximately standard normal"),
    "aesthetic": Kind("trl-lib/ddpo-aesthetic-predictor", Aesthetic, "CLIP ViT-L/14, ignores the prompt, 1 to 10"),
    "clip": Kind(
        CLIP_L,
        lambda location, device, half: ClipCosine(location, device, half, [CLIP_L]),
        "cosine of CLIP ViT-L/14: how well the image fits the prompt",
    ),
}
CHOICES = f"'embedded', {', '.join(map(repr, KINDS))} (or 'pickscore:FOLDER_OR_HUB_ID', ..), 'module:function'"


def load_scorer(name: str, device: torch.device, *, half: bool = False) -> Scorer:
    """Load the scorer of a name. half: compute in float16, which the scorers of KINDS can.

    Raises ConfigError for an unknown name and for ``half`` with another scorer, ModelError if its weights cannot be
    loaded, and EnvironmentProblem if the hub fails.
    """
    check_scorer(name, "scorer")
    kind, _, rest = name.partition(":")
    if kind in KINDS:
        return _PublishedScorer(name, kind, rest or KINDS[kind].location, device, half)
    if half:
        raise ConfigError(f"scorer '{name}' has no half precision: only {', '.join(KINDS)} have")
    return _EmbeddedScorer() if name == "embedded" else _UserFunction(name, kind, rest)


def check_scorer(name: str, key: str) -> None:
    """Raise ConfigError, naming the setting ``key``, for an unknown scorer or a combination; loads no weights."""
    if len(terms(name)) > 1 or terms(name)[0] != (1.0, name):
        raise ConfigError(
            f"{key}: '{name}' combines scorers, which are standardized over a whole table: score the table first "
            "(smpo score), and set data.scores"
        )
    kind, _, rest = name.partition(":")
    if name == "embedded" or kind in KINDS:
        return
    if not (kind and rest):
        raise ConfigError(f"{key}: scorer '{name}' is unknown; known are {CHOICES}")
    if _module_file(kind) is None:
        raise ConfigError(f"{key}: '{name}': there is no module '{kind}' (is its folder on PYTHONPATH?)")


def terms(name: str) -> list[tuple[float, str]]:
    """Weights and names of a combination such as ``0.7*pickscore + 0.3*aesthetic``; (1, name) of a single name."""
    if not _TERM.match(name.strip()):
        return [(1.0, name)]
    _, *found = _TERM.split(name.strip())
    return [(float(weight), scorer.strip()) for weight, scorer in zip(found[::2], found[1::2], strict=True)]


def scorer_identity(name: str) -> str:
    """What identifies a scorer's scores, without loading it: '' for no scorer.

    It depends on the content of a local folder or file, or of the module's file; a hub id is taken as it is.
    """
    kind, _, rest = name.partition(":")
    if kind in KINDS:
        return _location_identity(kind, rest or KINDS[kind].location)
    file = _module_file(kind) if rest else None
    return name if file is None else f"{name}@{_digest([file])}"


class _BaseScorer(ABC):
    """A scorer whose score has no components."""

    name: str
    identity: str

    @abstractmethod
    def __call__(self, images: Sequence[Image], prompts: Sequence[str]) -> np.ndarray: ...

    def parts(self, images: Sequence[Image], prompts: Sequence[str]) -> dict[str, np.ndarray]:
        return {"reward": self(images, prompts)}


class _EmbeddedScorer(_BaseScorer):
    """The rule of the embedded world."""

    name = identity = "embedded"

    def __call__(self, images: Sequence[Image], prompts: Sequence[str]) -> np.ndarray:
        return self.parts(images, prompts)["reward"]

    def parts(self, images: Sequence[Image], prompts: Sequence[str]) -> dict[str, np.ndarray]:
        from smpo_fast.embedded import reward

        try:  # one by one: images may differ in size
            scores = [asdict(reward.score(np.asarray(i)[None], [p])) for i, p in zip(images, prompts, strict=True)]
        except ValueError as error:
            raise DataError(f"scorer 'embedded' can only score images of the embedded world: {error}") from error
        names = [field.name for field in fields(reward.Scores)]
        return {name: np.array([score[name][0] for score in scores], dtype=np.float32) for name in names}


class _PublishedScorer(_BaseScorer):
    """A reward model of KINDS."""

    def __init__(self, name: str, kind: str, location: str, device: torch.device, half: bool) -> None:
        self.name, self.identity = name, _location_identity(kind, location)
        try:
            self.network = KINDS[kind].network(location, device, half)
        except UserError as error:
            raise type(error)(f"scorer '{name}': {error}") from error

    def __call__(self, images: Sequence[Image], prompts: Sequence[str]) -> np.ndarray:
        return self.network(images, prompts)


class _UserFunction(_BaseScorer):
    """A user's ``function(images, prompts)``: returns N numbers in any kind of array, higher is better."""

    def __init__(self, name: str, module: str, function: str) -> None:
        self.name, self.identity = name, scorer_identity(name)
        found = getattr(importlib.import_module(module), function, None)
        if not callable(found):
            raise ConfigError(f"scorer '{name}': module '{module}' has no function '{function}'")
        self.function: Callable[[list[Image], list[str]], Any] = found

    def __call__(self, images: Sequence[Image], prompts: Sequence[str]) -> np.ndarray:
        given = self.function(list(images), list(prompts))
        scores = np.asarray(given.detach().cpu() if isinstance(given, torch.Tensor) else given, dtype=np.float32)
        if scores.shape != (len(images),):
            raise ModelError(
                f"scorer '{self.name}' returned an array of shape {list(scores.shape)} for {len(images)} images, "
                f"instead of [{len(images)}]"
            )
        return scores


def _location_identity(kind: str, location: str) -> str:
    """The hash of what is read from a folder or file; otherwise the hub id."""
    path = Path(location).expanduser()
    if not path.exists():
        return f"{kind}:{location}"
    read = sorted(f for pattern in _FILES for f in path.glob(pattern)) if path.is_dir() else [path]
    return f"{kind}@{_digest(read)}"


def _module_file(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except (ModuleNotFoundError, ValueError):
        return None
    return Path(spec.origin) if spec is not None and spec.origin else None


def _digest(files: Sequence[Path]) -> str:
    """A short hash of files' names and contents."""
    facts = [f"{file.name}\0".encode() + bytes.fromhex(sha256(file)) for file in files]
    return sha256_of(b"".join(facts)).hex()[:16]
