"""Settings, inputs and edits for tests of networks in diffusers layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from smpo_fast.config import loading
from smpo_fast.config.schema import Model
from smpo_fast.method.batch import Conditioning

CPU = torch.device("cpu")
Maker = Callable[[str], Path]  # the fixture sd15_pipeline


def settings(path: Path | str, **values: object) -> Model:
    """The section [model] for a pipeline."""
    return loading.from_dict({"model": {"path": str(path), **values}}).model


def unet_inputs(cross: int, sdxl: bool) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    """x [3, 2, 4, 8, 8], timesteps [3] and conditioning of three pairs."""
    seeded = torch.Generator().manual_seed(1)
    x = torch.randn(3, 2, 4, 8, 8, generator=seeded)
    prompt = torch.randn(3, 16, cross, generator=seeded)
    if not sdxl:
        return x, torch.tensor([999, 500, 0]), Conditioning(prompt)
    pooled = torch.randn(3, 48, generator=seeded)
    return x, torch.tensor([999, 500, 0]), Conditioning(prompt, pooled, torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 3))


def edit_json(file: Path, **values: object) -> None:
    """Change some keys of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
