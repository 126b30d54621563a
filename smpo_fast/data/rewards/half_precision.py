"""Whether a reward model may compute in float16: a comparison with float32 on a sample of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from smpo_fast.common.errors import ConfigError
from smpo_fast.common.runtime import print0, warn0
from smpo_fast.data.rewards.scorers import KINDS, load_scorer

if TYPE_CHECKING:
    from PIL.Image import Image

SAMPLE = 64  # images
TOLERANCE = 0.05  # largest difference, in standard deviations of the sample's scores


def check_supports_half(name: str) -> None:
    """Raise ConfigError for a scorer that cannot compute in float16."""
    if name.partition(":")[0] not in KINDS:
        raise ConfigError(f"--half: '{name}' has no half precision: only {', '.join(KINDS)} have")


def compare(
    names: Sequence[str], images: Sequence[Image], prompts: Sequence[str], device: torch.device
) -> dict[str, Any]:
    """Score a sample in float32 and in float16, with each of the scorers ``names``; the manifest of the comparison.

    'half': whether each scorer's difference is tolerable; 'difference' and 'limit' as text; 'pictures': the sample's
    size.
    """
    manifest: dict[str, Any] = {"half": {}, "difference": {}, "limit": {}, "pictures": len(images)}
    for name in names:
        full, half = (load_scorer(name, device, half=half)(images, prompts) for half in (False, True))
        difference, limit = float(np.abs(half - full).max(initial=0)), TOLERANCE * float(full.std())
        manifest["half"][name] = difference <= limit  # false for NaN
        manifest["difference"][name], manifest["limit"][name] = repr(difference), repr(limit)
    return manifest


def report(manifest: dict[str, Any]) -> None:
    """Print the result of ``compare``."""
    for name, tolerable in manifest["half"].items():
        text = (
            f"{name}: float16 differs from float32 by at most {float(manifest['difference'][name]):.3g} over "
            f"{manifest['pictures']} images; {float(manifest['limit'][name]):.3g} is allowed"
        )
        if tolerable:
            print0(text)
        else:
            warn0(f"{text}: float32 is used")
